"""Predictions on disk: what each rank has written so far, and the file that they become.

    OUT/DocVQA.settings.json        what they were made with: only the same is continued
    OUT/DocVQA.rank0, .rank1, ...   a line for each sample that is done, until all are
    OUT/DocVQA.jsonl                then the benchmark's rows, in order, each with its prediction
"""
import json
import re
from pathlib import Path

from paper.benchmarks import Benchmark
from paper.noise import summary
from plumbing.files import write_text
from plumbing.settings import InputError, read_json


def begin_predictions(stem: str, settings: dict, n: int) -> set[int]:
    """Make STEM's folder ready, and say which of n samples are done.

    Writes the settings. Raises InputError if predictions are there that were made with others.
    """
    record, complete = Path(f"{stem}.settings.json"), Path(f"{stem}.jsonl")
    parts = partial_files(stem)
    if parts or complete.exists():
        before = read_json(record) if record.exists() else {}
        changed = [f"{key} {before.get(key)}, not {value}" for key, value in settings.items()
                   if before.get(key) != value]
        if changed:
            raise InputError(f"{complete}: predictions with {', '.join(changed)}: take another "
                             f"--out, or delete {stem}.jsonl and {stem}.rank0, ...")
    else:
        complete.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(settings, indent=2) + "\n")
    if complete.exists():
        return set(range(n))
    return set(read_parts(parts))


def partial_files(stem: str) -> list[Path]:
    """What each rank has written so far, of this run or of one before it on other ranks."""
    name = re.escape(Path(stem).name)
    return sorted(path for path in Path(stem).parent.glob("*.rank*")
                  if re.fullmatch(rf"{name}\.rank\d+", path.name))


def read_parts(parts: list[Path]) -> dict[int, dict]:
    """The lines of the ranks' files by sample; one that a kill has cut off does not count."""
    lines = {}
    for path in parts:
        text = path.read_bytes()
        whole = text[:text.rfind(b"\n") + 1]
        for line in read_lines(path, whole):
            is_ours = isinstance(line.get("sample"), int)
            if not is_ours or not isinstance(line.get("prediction"), str):
                raise InputError(f"{path}: not predictions of this program: delete it")
            lines[line["sample"]] = line
    return lines


def join_predictions(benchmark: Benchmark, stem: str, settings: dict) -> list[dict]:
    """The ranks' files -> STEM.jsonl, whose rows are returned; the ranks' files go.

    What the noise did is added to STEM.settings.json. Raises InputError.
    """
    complete = Path(f"{stem}.jsonl")
    parts = partial_files(stem)
    if not complete.exists():
        lines = read_parts(parts)
        missing = len(benchmark.rows) - len(lines)
        if missing:
            raise InputError(f"{stem}.rank*: {missing:,} predictions are missing: do all nodes "
                             "share this folder?")
        if settings["noise"]:
            measured = summary([lines[i]["measured"] for i in range(len(benchmark.rows))])
            record = {**settings, "measured": measured}
            write_text(Path(f"{stem}.settings.json"), json.dumps(record, indent=2) + "\n")
        rows = [{**row, "prediction": lines[i]["prediction"]}
                for i, row in enumerate(benchmark.rows)]
        write_text(complete, "".join(json.dumps(row) + "\n" for row in rows))
    for part in parts:
        part.unlink()
    rows = read_predictions(complete)
    if len(rows) != len(benchmark.rows):
        raise InputError(f"{complete}: {len(rows):,} of {len(benchmark.rows):,} predictions are "
                         "left: delete it")
    return rows


def read_predictions(path: Path) -> list[dict]:
    """A file of predictions -> its rows (index, question, answers, split, prediction).

    Raises InputError.
    """
    try:
        rows = read_lines(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    for number, row in enumerate(rows, 1):
        if not is_prediction(row):
            raise InputError(f"{path}, row {number}: no question, answers (a list) and prediction, "
                             "all of them texts, or a split, document or values that are none")
    if not rows:
        raise InputError(f"{path}: not a single prediction there")
    if not any(gold.strip() for row in rows for gold in row["answers"]):
        raise InputError(f"{path}: not a single answer beside these predictions to score them by")
    return [{"split": None, **row} for row in rows]


def is_prediction(row: dict) -> bool:
    golds = row.get("answers")
    if not isinstance(golds, list) or not golds:
        return False
    texts = [row.get("question"), row.get("prediction"), *golds]
    return (all(isinstance(text, str) for text in texts)
            and isinstance(row.get("split"), str | None)
            and isinstance(row.get("document"), str | None)
            and type(row.get("values", 1)) is int and 1 <= row.get("values", 1) <= 10 ** 6)


def read_lines(path: Path, text: bytes) -> list[dict]:
    """The objects in the text of a JSONL file. Raises InputError."""
    lines = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not a prediction ({error})") from None
        lines.append(value)
    return lines
