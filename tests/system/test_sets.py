"""plumbing/formats.py: the released formats written by sets.py, read to the letter and trained
on."""
import contextlib
import io
import itertools
import json
import re
import shutil
import sys
import types
import unittest.mock
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import train as train_py
from conftest import run, torchrun
from data import Sample, fill_rows
from model import read_config
from plumbing import streams
from plumbing.examples import IMAGE, BadSample, Example
from plumbing.folders import data_files
from plumbing.formats import split_images
from plumbing.runs import recorded
from plumbing.settings import InputError
from plumbing.streams import DataSet, Documents, Position, deal, steps_of
from sets import (FORMATS, PAGES, documents_of, messages, no_hang, one_epoch,  # noqa: F401
                  outcome, tokenizer, write_lines, write_parquet)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, tuple]:
    """Every format's path and expected examples, by name."""
    return {name: write(tmp_path_factory.mktemp("set")) for name, write in FORMATS.items()}


def read_all(path: Path | str) -> tuple[list[Example], Counter]:
    """The examples of a data set, and its bad samples by kind."""
    data_set = DataSet([str(path)], seed=0)
    examples = []
    kinds = Counter()
    for reference in one_epoch(data_set):
        try:
            examples.append(data_set.read(*reference))
        except BadSample as bad:
            kinds[bad.args[0]] += 1
    return examples, kinds


def check_examples(examples: list[Example], expected: list[tuple]) -> None:
    """The same turns and the same images, each once; a JPEG may be off by a little."""
    def order(example):
        turns, images = example
        return repr(turns), [image.size for image in images]

    ours = [([(turn.role, turn.parts) for turn in e.turns], e.images) for e in examples]
    ours.sort(key=order)
    expected = sorted(expected, key=order)
    assert list(map(order, ours)) == list(map(order, expected))
    for (_, images), (_, theirs) in zip(ours, expected):
        for image, other in zip(images, theirs):
            difference = np.abs(np.asarray(image, float) - np.asarray(other, float))
            assert difference.mean() < 3
    assert len({e.key for e in examples}) == len(examples)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read_to_the_letter(written, name):
    path, expected = written[name]
    examples, kinds = read_all(path)
    check_examples(examples, expected)
    failed_downloads = {"missing field": 2} if name == "img2dataset" else {}
    assert kinds == failed_downloads


def test_a_data_sets_own_marker_becomes_an_image_position():
    assert split_images("<image>\nQ") == [IMAGE, "\nQ"]
    assert split_images("a<|image|>b <image>") == ["a", IMAGE, "b ", IMAGE]
    assert split_images("no < image > here") == ["no < image > here"] and split_images("") == []


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA, indented", "MS-Swift", "DocDownstream"])
@pytest.mark.parametrize("block", [64, 700])
def test_records_that_straddle_blocks_come_once(written, monkeypatch, name, block):
    monkeypatch.setattr(streams, "BLOCK", block)
    path, expected = written[name]
    examples, kinds = read_all(path)
    check_examples(examples, expected)
    assert not kinds and len(DataSet([str(path)], 0).shards) > 2


def test_a_glob_below_a_folder_with_brackets(tmp_path, monkeypatch):
    """The folder's name is no part of the pattern."""
    folder = tmp_path / "my [docs]" / "mine"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("{}\n")
    monkeypatch.chdir(folder.parent)
    assert data_files("mine/tr*.jsonl") == (folder, [folder / "train.jsonl"])


@pytest.mark.parametrize("weight", ["0", "0.0", 400 * "9"])
def test_a_weight_is_a_finite_number_above_0(tmp_path, weight):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="a weight is a finite number above 0"):
        Documents([f"{tmp_path / 'a.jsonl'}:{weight}"], 0, None)


def test_folders_files_and_globs(written):
    folder, expected = written["img2dataset"]
    for spec in (folder / "*.tar", f"{folder}/", folder / "0000?.tar"):
        assert len(read_all(spec)[0]) == len(expected)
    assert len(read_all(folder / "00000.tar")[0]) == len(expected) // 2
    parts = [str(folder / f"{shard:05}.tar") for shard in range(2)]
    assert len(one_epoch(DataSet(parts, 0))) == len(expected) + 2


def test_image_ids_instead_of_images_name_the_columns(tmp_path, tokenizer):
    columns = {"sample_id": ["1"] * 3, "img_id": ["a"] * 3, "query": [["?"]] * 3,
               "annotations": [["!"]] * 3}
    write_parquet(tmp_path / "train.parquet", columns)
    items = outcome(tmp_path, tokenizer)
    assert [bad.kind for bad in items] == ["missing field"] * 3
    for name in ("img_id", "image", "query", "annotations"):
        assert name in items[0].why


# --------------------------------------------------------------------------------------------------
# Training on them


def train(*options, code=0) -> types.SimpleNamespace:
    """train.py in this process: starting Python and torch for each format would take most of the
    suite's time."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["train.py", *map(str, options)]
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          unittest.mock.patch.object(sys, "argv", argv)):
        try:
            status = train_py.main() or 0
        except SystemExit as end:
            status = end.code
        except InputError as error:
            print(f"train.py: {error}", file=sys.stderr)
            status = 2
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    assert status == code, err.getvalue()
    return types.SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """The toy's stages after one step each, for the next stage to start from."""
    out = tmp_path_factory.mktemp("run")
    train("--steps", 1, "--batch-size", 2, "--held-out", 0, "--out", out)
    return out


def stage_log(out: Path, stage: int) -> list[dict]:
    lines = (out / f"stage{stage}" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def from_stage(started: Path, stage: int, out: Path) -> Path:
    """A new run's folder that has the stage before."""
    out.mkdir(exist_ok=True)
    (out / f"stage{stage - 1}").symlink_to(started / f"stage{stage - 1}")
    return out


@pytest.mark.parametrize("name, stage", list(zip(FORMATS, [1, 2, 3, 3, 2, 3, 3])))
def test_each_format_trains(written, started, tmp_path, name, stage):
    out = from_stage(started, stage, tmp_path)
    path, _ = written[name]
    train("--stage", stage, "--data", path, "--steps", 2, "--batch-size", 4, "--held-out", 0,
          "--max-bad", 0.2, "--out", out)       # one of the tars' eight is bad
    losses = [line["loss"] for line in stage_log(out, stage)]
    assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]


def test_bad_samples_are_shown_counted_and_too_many_stop_the_run(started, tmp_path):
    """Nine of twelve lines are good, the rest are bad in two ways."""
    rows = [{"messages": messages(("?", text))} for _, text, _, _ in PAGES]
    rows[3]["images"] = ["gone.png"]
    rows[5]["images"] = ["gone, too.png"]
    rows[7] = {"text": "other keys"}
    write_lines(tmp_path / "train.jsonl", rows)
    common = ["--stage", 3, "--data", tmp_path, "--batch-size", 5, "--held-out", 0]
    out = from_stage(started, 3, tmp_path / "a")
    done = run("train.py", *common, "--steps", 4, "--out", out, "--max-bad", 0.5)
    shown = [line for line in done.stderr.splitlines() if "bad sample" in line]
    assert len(shown) == 2                              # the first of each kind
    assert any(re.search(r"image not found: .*train\.jsonl, line [46]: gone", s) for s in shown)
    assert any(re.search(r"missing field: .*train\.jsonl, line 8: ", s) for s in shown)
    lines = stage_log(out, 3)
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[2]["bad"] == {"image not found": 2, "missing field": 1}
    out = from_stage(started, 3, tmp_path / "b")
    done = train(*common, "--max-bad", 0, "--out", out, code=2)
    [end] = done.stderr[done.stderr.index("train.py: "):].splitlines()
    assert "3 of 12 samples were bad, more than --max-bad 0.0: " in end
    assert "image not found 2" in end and "missing field 1" in end
    assert not (out / "stage3").exists()


def test_an_epoch_ends_with_its_last_sample(started, tmp_path):
    """Also where the last step is a whole one, and though the toy's recipe counts steps."""
    for n, steps in [(8, 2), (9, 3)]:
        path = tmp_path / f"{n}.jsonl"
        write_lines(path, [{"messages": messages(("?", "!"))}] * n)
        out = from_stage(started, 3, tmp_path / str(n))
        train("--stage", 3, "--data", path, "--batch-size", 4, "--held-out", 0, "--out", out)
        assert len(stage_log(out, 3)) == steps


def test_the_learning_rate_falls_over_all_epochs(started, tmp_path):
    """Four steps of two epochs, from the toy's 5e-4 along a cosine to 0."""
    path = tmp_path / "train.jsonl"
    write_lines(path, [{"messages": messages(("?", "!"))}] * 8)
    out = from_stage(started, 3, tmp_path / "run")
    train("--stage", 3, "--data", path, "--batch-size", 4, "--epochs", 2, "--held-out", 0,
          "--out", out)
    rates = [line["lr"] for line in stage_log(out, 3)]
    assert rates == pytest.approx([5e-4, 5e-4, 3.75e-4, 1.25e-4])


def test_the_last_step_of_an_odd_epoch_learns_too(started, tmp_path):
    """Three steps of nine samples: the rate is not at 0 before the end."""
    path = tmp_path / "train.jsonl"
    write_lines(path, [{"messages": messages(("?", "!"))}] * 9)
    out = from_stage(started, 3, tmp_path / "run")
    train("--stage", 3, "--data", path, "--batch-size", 4, "--held-out", 0, "--out", out)
    rates = [line["lr"] for line in stage_log(out, 3)]
    assert rates == pytest.approx([5e-4, 5e-4, 2.5e-4])


def test_steps_beyond_an_epoch_go_on_where_they_stopped(started, tmp_path):
    """Text alone: the encoder gets no gradient before the state is saved."""
    path = tmp_path / "train.jsonl"
    write_lines(path, [{"messages": messages(("?", f"{i}!"))} for i in range(8)])
    losses = {}
    for name, stops in [("whole", []), ("stopped", [["--max-steps", 3]])]:
        out = from_stage(started, 2, tmp_path / name)
        for stop in [*stops, []]:
            train("--stage", 2, "--data", path, "--batch-size", 4, "--steps", 5, "--held-out", 0,
                  "--out", out, *stop)
        lines = stage_log(out, 2)
        resumed = [line["resumed"] for line in lines if "resumed" in line]
        assert resumed == ([3] if stops else [])
        losses[name] = [(line["step"], line["epoch"], line["loss"]) for line in lines
                        if "loss" in line]
    assert losses["stopped"] == losses["whole"]
    assert [epoch for _, epoch, _ in losses["whole"]] == [0, 0, 1, 1, 2]


def test_a_bad_held_out_sample_is_left_out(started, tmp_path):
    good = [{"messages": messages(("?", "!"))}] * 3
    write_lines(tmp_path / "train.jsonl", good)
    write_lines(tmp_path / "val.jsonl", [*good, {"text": "other keys"}])
    out, losses = from_stage(started, 3, tmp_path / "out"), []
    for held_out in ("train.jsonl", "val.jsonl"):
        train("--stage", 3, "--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / held_out,
              "--batch-size", 3, "--steps", 1, "--eval-every", 1, "--held-out", 0, "--out", out)
        losses += [line["held_out_loss"] for line in stage_log(out, 3) if "held_out_loss" in line]
        shutil.rmtree(out / "stage3")
    assert losses[0] == pytest.approx(losses[1]) and losses[0] > 0


def test_a_step_of_nothing_but_bad_samples_is_survived(started, tmp_path):
    """All ranks run on: the counts stand in the log. Two good samples are in two steps at most."""
    rows = [{"text": "other keys"}] * 6 + [{"messages": messages(("?", "!"))}] * 2
    write_lines(tmp_path / "train.jsonl", rows)
    out = from_stage(started, 3, tmp_path / "out")
    train("--stage", 3, "--data", tmp_path, "--batch-size", 2, "--steps", 4, "--held-out", 0,
          "--max-bad", 1, "--out", out)
    log = stage_log(out, 3)
    assert log[-1]["bad"] == {"missing field": 6}
    assert sum(line["loss"] is None for line in log) >= 2


@pytest.mark.parametrize("content, flags, word", [
    (None, ["--stage", 3], "no such file"), (b"no format at all\n", ["--stage", 3], "train.txt"),
    (b"", ["--stage", 3], "train.txt"), (b"[]", ["--stage", 3], "train.txt"),
    (b"{}\n", [], "--stage"), (b"{}\n", ["--stage", 0], "--stage")])
def test_data_that_cannot_be_used_is_one_line(started, tmp_path, content, flags, word):
    path = tmp_path / "train.txt"
    if content is not None:
        path.write_bytes(content)
    out = from_stage(started, 3, tmp_path / "out")
    done = run("train.py", *flags, "--data", path, "--steps", 1, "--batch-size", 2, "--out", out,
               code=2, timeout=60)
    assert word in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("weight", ["0", "1.2.3", "."])
def test_a_weight_that_is_none_is_one_line(written, weight):
    path, _ = written["LLaVA"]
    with pytest.raises(InputError, match="weight|no such file"):
        Documents([f"{path}:{weight}"], seed=0, prepare=lambda example: example)


def test_two_processes_with_uneven_steps_learn_what_one_does(started, tmp_path, tokenizer):
    """Steps of three samples, two of them on rank 0. Where one rank has more rows the other one
    runs empty ones, and with text alone it runs the vision encoder all the same if the other has
    images, or both hang."""
    path = tmp_path / "train.jsonl"
    rows = []
    for i, (image, _, q, a) in enumerate(PAGES):
        image.save(tmp_path / f"{i}.png")
        rows.append({"messages": messages((q, a)), "images": [f"{i}.png"] if i % 2 == 0 else []})
    write_lines(path, rows)
    check_that_steps_are_uneven(documents_of(tmp_path, tokenizer, max_tiles=1, max_text=99,
                                             max_tokens=120))
    losses = {}
    for processes in (1, 2):
        out = from_stage(started, 2, tmp_path / str(processes))
        options = ["--stage", 2, "--data", path, "--batch-size", 3, "--row-tokens", 120,
                   "--max-tiles", 1, "--steps", 6, "--out", out]
        if processes == 1:
            train(*options)
        else:
            torchrun(2, "train.py", *options, timeout=100)
        losses[processes] = [line["loss"] for line in stage_log(out, 2)]
        # It answers as it has learnt, and so does what starts from it.
        assert read_config(out / "stage2").vision.max_tiles == 1
        assert recorded(out / "stage2", "max_tiles") == 1
    train("--stage", 3, "--data", path, "--batch-size", 3, "--steps", 1, "--out", out)
    assert read_config(out / "stage3").vision.max_tiles == 1
    assert recorded(out / "stage3", "max_tiles") == 1
    assert len(losses[1]) == 6 and losses[2] == pytest.approx(losses[1], rel=1e-5)


def check_that_steps_are_uneven(documents: Documents) -> None:
    """In six steps of two ranks: one has more rows than the other, and either one alone images."""
    ranks = []
    for rank in range(2):
        order = deal(documents.draws(Position()), 3, rank, 2)
        steps = steps_of(map(documents.__getitem__, order))
        ranks.append([samples for samples, _ in itertools.islice(steps, 6)])
    assert all(isinstance(s, Sample) for steps in ranks for samples in steps for s in samples)
    n_rows = [[len(fill_rows(samples, 120)) for samples in step] for step in zip(*ranks)]
    images = [[any(len(s.pixels) for s in samples) for samples in step] for step in zip(*ranks)]
    assert [2, 1] in n_rows and [True, False] in images and [False, True] in images
