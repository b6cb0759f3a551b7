"""plumbing/formats.py: the released formats written by sets.py and read to the letter, trained on, packed."""
import contextlib
import functools
import io
import itertools
import json
import random
import re
import sys
import types
import unittest.mock
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from PIL import Image

import train as train_py
from conftest import close, randomise, run, torchrun
from data import IGNORE, IMAGE, Sample, fill_rows, pack_row, prepare
from plumbing.examples import BadSample, Example, Turn
from model import ALIGNVLM_PRESETS, AlignVLM
from plumbing import streams
from plumbing.streams import DataSet, Documents, Position, deal, steps_of
from plumbing.settings import InputError
from sets import FORMATS, PAGES, TOY, no_hang, one_epoch, outcome, tokenizer, write_lines, write_parquet


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every format's path and expected examples, by name."""
    return {name: write(tmp_path_factory.mktemp("set")) for name, write in FORMATS.items()}


def read_all(path):
    """The examples of a data set, and its bad samples by kind."""
    data_set, examples, kinds = DataSet([str(path)], seed=0), [], Counter()
    for reference in one_epoch(data_set):
        try:
            examples.append(data_set.read(*reference))
        except BadSample as bad:
            kinds[bad.args[0]] += 1
    return examples, kinds


def check_examples(examples, expected):
    """The same turns and the same images, each once; a JPEG may be off by a little."""
    def order(example):
        return repr(example[0]), [image.size for image in example[1]]

    ours = sorted([([(turn.role, turn.parts) for turn in e.turns], e.images) for e in examples], key=order)
    expected = sorted(expected, key=order)
    assert list(map(order, ours)) == list(map(order, expected))
    for (_, images), (_, theirs) in zip(ours, expected):
        for image, other in zip(images, theirs):
            assert np.abs(np.asarray(image, float) - np.asarray(other, float)).mean() < 3
    assert len({e.key for e in examples}) == len(examples)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read_to_the_letter(written, name):
    path, expected = written[name]
    examples, kinds = read_all(path)
    check_examples(examples, expected)
    assert kinds == ({"missing field": 2} if name == "img2dataset" else {})    # its failed downloads


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA, indented", "MS-Swift", "DocDownstream"])
@pytest.mark.parametrize("block", [64, 700])
def test_records_that_straddle_blocks_come_once(written, monkeypatch, name, block):
    monkeypatch.setattr(streams, "BLOCK", block)
    path, expected = written[name]
    examples, kinds = read_all(path)
    check_examples(examples, expected)
    assert not kinds and len(DataSet([str(path)], 0).shards) > 2


def test_folders_files_and_globs(written):
    folder, expected = written["img2dataset"]
    for spec in (folder / "*.tar", f"{folder}/", folder / "0000?.tar"):
        assert len(read_all(spec)[0]) == len(expected)
    assert len(read_all(folder / "00000.tar")[0]) == len(expected) // 2
    parts = [str(folder / f"{shard:05}.tar") for shard in range(2)]
    assert len(one_epoch(DataSet(parts, 0))) == len(expected) + 2


def test_image_ids_instead_of_images_name_the_columns(tmp_path, tokenizer):
    write_parquet(tmp_path / "train.parquet", {"sample_id": ["1"] * 3, "img_id": ["a"] * 3, "query": [["?"]] * 3,
                                               "annotations": [["!"]] * 3})
    items = outcome(tmp_path, tokenizer)
    assert [bad.kind for bad in items] == ["missing field"] * 3
    for name in ("img_id", "image", "query", "annotations"):
        assert name in items[0].why


# ---------------------------------------------------------------------------------------------------------------------
# Training on them


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The toy's stages after one step each, for the next stage to start from."""
    out = tmp_path_factory.mktemp("run")
    train("--steps", 1, "--batch-size", 2, "--held-out", 0, "--out", out)
    return out


def train(*options, code=0):
    """train.py in this process: starting Python and torch for each format would take most of the suite's time."""
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          unittest.mock.patch.object(sys, "argv", ["train.py", *map(str, options)])):
        try:
            status = train_py.main() or 0
        except SystemExit as exit:
            status = exit.code
        except InputError as error:
            print(f"train.py: {error}", file=sys.stderr)
            status = 2
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    assert status == code, err.getvalue()
    return types.SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def stage_log(out, stage):
    return [json.loads(line) for line in (out / f"stage{stage}" / "log.jsonl").read_text().splitlines()]


def from_stage(started, stage, out):
    """A new run's folder that has the stage before."""
    out.mkdir(exist_ok=True)
    (out / f"stage{stage - 1}").symlink_to(started / f"stage{stage - 1}")
    return out


@pytest.mark.parametrize("name, stage", list(zip(FORMATS, [1, 2, 3, 3, 2, 3, 3])))
def test_each_format_trains(written, started, tmp_path, name, stage):
    out = from_stage(started, stage, tmp_path)
    train("--stage", stage, "--data", written[name][0], "--steps", 2, "--batch-size", 4, "--held-out", 0, "--out", out)
    losses = [line["loss"] for line in stage_log(out, stage)]
    assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]


def test_bad_samples_are_shown_counted_and_too_many_stop_the_run(started, tmp_path):
    """Nine of twelve lines are good, the rest are bad in two ways."""
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
            for _, text, _, _ in PAGES]
    rows[3]["images"], rows[5]["images"], rows[7] = ["gone.png"], ["gone, too.png"], {"text": "other keys"}
    write_lines(tmp_path / "train.jsonl", rows)
    common = ["--stage", 3, "--data", tmp_path, "--batch-size", 5, "--held-out", 0]
    done = run("train.py", *common, "--steps", 4, "--out", from_stage(started, 3, tmp_path / "a"), "--max-bad", 0.5)
    shown = [line for line in done.stderr.splitlines() if "bad sample" in line]
    assert len(shown) == 2                                              # the first of each kind
    assert any(re.search(r"image not found: .*train\.jsonl, line [46]: gone", line) for line in shown)
    assert any(re.search(r"missing field: .*train\.jsonl, line 8: ", line) for line in shown)
    lines = stage_log(tmp_path / "a", 3)
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1] and all(np.isfinite(line["loss"]) for line in lines)
    assert lines[2]["bad"] == {"image not found": 2, "missing field": 1}
    done = train(*common, "--max-bad", 0, "--out", from_stage(started, 3, tmp_path / "b"), code=2)
    end = done.stderr[done.stderr.index("train.py: "):].splitlines()
    assert "3 of 12" in end[0] and "--max-bad" in end[0]
    assert sorted(line.split(maxsplit=1) for line in end[1:]) == [["1", "missing field"], ["2", "image not found"]]
    assert not (tmp_path / "b" / "stage3").exists()


def test_an_epoch_ends_with_its_last_sample(started, tmp_path):
    """Also where the last step is a whole one, and though the toy's recipe counts steps."""
    for n, steps in [(8, 2), (9, 3)]:
        rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}] * n
        write_lines(tmp_path / f"{n}.jsonl", rows)
        out = from_stage(started, 3, tmp_path / str(n))
        train("--stage", 3, "--data", tmp_path / f"{n}.jsonl", "--batch-size", 4, "--held-out", 0, "--out", out)
        assert len(stage_log(out, 3)) == steps


def test_steps_beyond_an_epoch_go_on_where_they_stopped(started, tmp_path):
    """Text alone: the encoder gets no gradient before the state is saved."""
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(8)]
    write_lines(tmp_path / "train.jsonl", rows)
    losses = {}
    for name, stops in [("whole", []), ("stopped", [["--max-steps", 3]])]:
        out = from_stage(started, 2, tmp_path / name)
        for stop in [*stops, []]:
            train("--stage", 2, "--data", tmp_path / "train.jsonl", "--batch-size", 4, "--steps", 5, "--held-out", 0,
                  "--out", out, *stop)
        lines = stage_log(out, 2)
        assert [line["resumed"] for line in lines if "resumed" in line] == ([3] if stops else [])
        losses[name] = [(line["step"], line["epoch"], line["loss"]) for line in lines if "loss" in line]
    assert losses["stopped"] == losses["whole"] and [epoch for _, epoch, _ in losses["whole"]] == [0, 0, 1, 1, 2]


def test_a_step_of_nothing_but_bad_samples_is_survived(started, tmp_path):
    """All ranks run on: the counts stand in the log, the weights stay."""
    write_lines(tmp_path / "train.jsonl", [{"text": "other keys"}] * 4)
    out = from_stage(started, 3, tmp_path / "out")
    train("--stage", 3, "--data", tmp_path, "--batch-size", 2, "--steps", 1, "--held-out", 0, "--max-bad", 1,
          "--out", out)
    assert stage_log(out, 3)[0]["bad"] == {"missing field": 2}


@pytest.mark.parametrize("content, flags, word", [
    (None, ["--stage", 3], "no such file"), (b"no format at all\n", ["--stage", 3], "train.txt"),
    (b"", ["--stage", 3], "train.txt"), (b"[]", ["--stage", 3], "train.txt"),
    (b"{}\n", [], "--stage"), (b"{}\n", ["--stage", 0], "--stage")])
def test_data_that_cannot_be_used_is_one_line(started, tmp_path, content, flags, word):
    if content is not None:
        (tmp_path / "train.txt").write_bytes(content)
    out = from_stage(started, 3, tmp_path / "out")
    done = run("train.py", *flags, "--data", tmp_path / "train.txt", "--steps", 1, "--batch-size", 2, "--out", out,
               code=2, timeout=60)
    assert word in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("weight", ["0", "1.2.3", "."])
def test_a_weight_that_is_none_is_one_line(written, weight):
    with pytest.raises(InputError, match="weight|no such file"):
        Documents([f"{written['LLaVA'][0]}:{weight}"], seed=0, prepare=None)


def test_two_processes_with_uneven_steps_learn_what_one_does(started, tmp_path, tokenizer):
    """Steps of three samples, two of them on rank 0. Where one rank has more rows the other one runs empty ones, and
    with text alone it runs the vision encoder all the same if the other has images, or both hang."""
    rows = []
    for i, (image, _, q, a) in enumerate(PAGES):
        image.save(tmp_path / f"{i}.png")
        rows.append({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
                     "images": [f"{i}.png"] if i % 2 == 0 else []})
    write_lines(tmp_path / "train.jsonl", rows)
    documents = Documents([str(tmp_path)], 0, functools.partial(
        prepare, tokenizer=tokenizer, config=TOY, max_tiles=1, max_text=99, max_tokens=120))
    shares = [steps_of(map(documents.__getitem__, deal(documents.draws(Position()), 3, rank, 2))) for rank in range(2)]
    shares = [[samples for samples, _ in step] for step in itertools.islice(zip(*shares), 6)]
    assert all(isinstance(sample, Sample) for step in shares for samples in step for sample in samples)
    n_rows = [[len(fill_rows(samples, 120)) for samples in step] for step in shares]
    images = [[any(len(s.pixels) for s in samples) for samples in step] for step in shares]
    assert [2, 1] in n_rows and [True, False] in images and [False, True] in images, (n_rows, images)
    losses = {}
    for processes in (1, 2):
        out = from_stage(started, 2, tmp_path / str(processes))
        options = ["--stage", 2, "--data", tmp_path / "train.jsonl", "--batch-size", 3, "--row-tokens", 120,
                   "--max-tiles", 1, "--steps", 6, "--out", out]
        train(*options) if processes == 1 else torchrun(2, "train.py", *options, timeout=100)
        losses[processes] = [line["loss"] for line in stage_log(out, 2)]
    assert len(losses[1]) == 6 and losses[2] == pytest.approx(losses[1], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Packing


@pytest.fixture(scope="module")
def model():
    return randomise(AlignVLM(ALIGNVLM_PRESETS["toy"])).eval()


def mixed_samples(tokenizer, word="K7Q2", shade=0):
    """One tile; several; two images; text alone, short and long: the second one can be changed without its length."""
    def page(width, height, shade=0):
        return Image.fromarray(np.random.default_rng(shade).integers(0, 255, (height, width, 3), dtype=np.uint8))

    examples = [([page(50, 90)], [IMAGE, "what?"], "A1"), ([page(112, 224, shade)], [IMAGE, word], word + "."),
                ([], ["a question of text alone " * 3], "yes"),
                ([page(30, 30), page(200, 112)], [IMAGE, "or", IMAGE], "no"), ([], ["?"], "!")]
    return [prepare(Example(images, [Turn("user", asked), Turn("assistant", [told])], ""), tokenizer, TOY)
            for images, asked, told in examples]


def logits_of(model, samples):
    tokens, _, pixels, lengths = pack_row(samples)
    logits = nnf.linear(model.llm.hidden(model.embed(tokens, pixels), lengths), model.llm.head)     # (1, L, V)
    return logits[0].split(lengths)


def test_packed_equals_one_by_one(model, tokenizer):
    samples = mixed_samples(tokenizer)
    assert len({len(s.tokens) for s in samples}) == 5 and [len(s.pixels) for s in samples] == [1, 3, 0, 4, 0]
    with torch.no_grad():
        for ours, sample in zip(logits_of(model, samples), samples):
            close(ours, logits_of(model, [sample])[0])
    gradients, losses = [], []
    for rows in ([samples], [[sample] for sample in samples]):
        model.zero_grad()
        total = sum(model(*pack_row(row)) for row in rows)
        total.backward()
        losses.append(total.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    largest = max(g.abs().max().item() for g in gradients[1].values())
    for name, g in gradients[1].items():        # a bias of keys has no gradient but rounding errors
        close(gradients[0][name], g, scale=max(g.abs().max().item(), 1e-3 * largest))


def test_a_sample_sees_nothing_of_its_neighbours(model, tokenizer):
    with torch.no_grad():
        before = logits_of(model, mixed_samples(tokenizer))
        after = logits_of(model, mixed_samples(tokenizer, word="ABCD", shade=1))
    for i, (a, b) in enumerate(zip(before, after)):
        assert (a - b).abs().max() > 1e-2 if i == 1 else torch.equal(a, b), i


def test_rows_hold_every_sample_and_no_more_than_their_budget():
    rng, filled = random.Random(0), []
    for _ in range(20):
        lengths = [729 * rng.randint(1, 10) + rng.randint(20, 400) for _ in range(64)]
        samples = [Sample(torch.zeros(n), None, None, str(i)) for i, n in enumerate(lengths)]
        rows = fill_rows(samples, 16_384)
        lengths = [sum(len(s.tokens) for s in row) for row in rows]
        assert max(lengths) <= 16_384 and sorted(s.key for row in rows for s in row) == sorted(s.key for s in samples)
        filled.append(sum(lengths) / (16_384 * len(rows)))
    print(f"rows are filled to {np.mean(filled):.1%}")
    assert np.mean(filled) >= 0.95
    assert fill_rows([], 16_384) == []


def test_a_long_sample_loses_text_and_never_an_image(tokenizer):
    images = [Image.new("RGB", (112, 112)), Image.new("RGB", (112, 224))]
    turns = [Turn("user", [IMAGE, "Q" * 30]), Turn("assistant", ["A" * 30]),
             Turn("user", [IMAGE]), Turn("assistant", ["B" * 30])]
    example, visual = Example(images, turns, ""), 4 * 64
    whole = prepare(example, tokenizer, TOY)
    text = len(whole.tokens) - visual
    for room in (text + 1, text, text - 10, 45):
        for limits in ({"max_text": room, "max_tokens": 10 ** 6}, {"max_text": 10 ** 6, "max_tokens": room + visual}):
            sample = prepare(example, tokenizer, TOY, **limits)
            assert (sample.tokens == IMAGE).sum() == visual and torch.equal(sample.pixels, whole.pixels)
            kept = whole.tokens[whole.tokens != IMAGE][:room]
            assert torch.equal(sample.tokens[sample.tokens != IMAGE], kept)
            assert (sample.labels != IGNORE).any()
            supervised = sample.labels[sample.labels != IGNORE]
            assert torch.equal(supervised, whole.labels[whole.labels != IGNORE][:len(supervised)])
    for limits in ({"max_text": 30, "max_tokens": 10 ** 6}, {"max_text": 10 ** 6, "max_tokens": visual - 1},
                   {"max_text": 10 ** 6, "max_tokens": visual + 30}):
        with pytest.raises(BadSample) as bad:       # no answer is left
            prepare(example, tokenizer, TOY, **limits)
        assert bad.value.args[0] == "too long"
