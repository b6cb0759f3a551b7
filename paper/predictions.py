"""Predictions on disk: what each rank has written so far, and the file that they become.

    OUT/DocVQA.settings.json        what the predictions were made with: only the same is continued
    OUT/DocVQA.rank0, .rank1, ...   a line for each sample that is done, until all are
    OUT/DocVQA.jsonl                then the benchmark's rows, in its order, each with its prediction
"""
import json
import os
from pathlib import Path

from paper.benchmarks import Benchmark
from paper.noise import summary
from plumbing.settings import InputError, read_json


def write_text(path: Path, text: str) -> None:
    """Write a whole file, beside its place first."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_lines(path: Path, text: bytes) -> list[dict]:
    """The objects in the text of a JSONL file. Raises InputError."""
    lines = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            try:
                lines.append(json.loads(line))
                if not isinstance(lines[-1], dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not a prediction ({error})") from None
    return lines


def read_predictions(path: Path) -> list[dict]:
    """A file of predictions -> its rows (index, question, answers, split, prediction). Raises InputError."""
    try:
        rows = read_lines(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    for number, row in enumerate(rows, 1):
        texts = row.get("answers")
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
                and isinstance(row.get("question"), str) and isinstance(row.get("prediction"), str)
                and isinstance(row.get("split"), str | None)):
            raise InputError(f"{path}, row {number}: no question, answers (a list) and prediction, all of them texts, "
                             "or a split that is none")
    if not rows:
        raise InputError(f"{path}: not a single prediction there")
    return [{"split": None, **row} for row in rows]


def begin_predictions(stem: str, settings: dict, n: int) -> set[int]:
    """Make STEM's folder ready, and say which of n samples are done. Raises InputError if they were made otherwise."""
    record, complete = Path(f"{stem}.settings.json"), Path(f"{stem}.jsonl")
    parts = partial_files(stem)
    if parts or complete.exists():
        before = read_json(record) if record.exists() else {}
        changed = [f"{key} {before.get(key)}, not {value}" for key, value in settings.items()
                   if before.get(key) != value]
        if changed:
            raise InputError(f"{complete}: predictions with {', '.join(changed)}: take another --out, or delete "
                             f"{stem}.*")
    else:
        complete.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(settings, indent=2) + "\n")
    return set(range(n)) if complete.exists() else set(made(parts))


def partial_files(stem: str) -> list[Path]:
    """What each rank has written so far, of this run or of one before it on other ranks."""
    return sorted(Path(stem).parent.glob(f"{Path(stem).name}.rank*"))


def made(parts: list[Path]) -> dict[int, dict]:
    """The lines of the ranks' files by sample; one that a kill has cut off does not count."""
    lines = {}
    for path in parts:
        text = path.read_bytes()
        for line in read_lines(path, text[:text.rfind(b"\n") + 1]):
            if not (isinstance(line.get("sample"), int) and isinstance(line.get("prediction"), str)):
                raise InputError(f"{path}: not predictions of this program: delete it")
            lines[line["sample"]] = line
    return lines


def join_predictions(benchmark: Benchmark, stem: str, settings: dict) -> list[dict]:
    """The ranks' files -> STEM.jsonl, and beside the settings what the noise did."""
    complete, parts = Path(f"{stem}.jsonl"), partial_files(stem)
    if not complete.exists():
        lines = made(parts)
        if missing := len(benchmark.rows) - len(lines):
            raise InputError(f"{stem}.rank*: {missing:,} predictions are missing: do all nodes share this folder?")
        if settings["noise"]:
            measured = summary([lines[i]["measured"] for i in range(len(benchmark.rows))])
            write_text(Path(f"{stem}.settings.json"), json.dumps({**settings, "measured": measured}, indent=2) + "\n")
        rows = [{**row, "prediction": lines[i]["prediction"]} for i, row in enumerate(benchmark.rows)]
        write_text(complete, "".join(json.dumps(row) + "\n" for row in rows))
    for part in parts:
        part.unlink()
    return read_predictions(complete)
