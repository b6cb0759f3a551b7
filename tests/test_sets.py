"""plumbing/formats.py and streams.py: the released formats written here, read back, resumed, damaged, trained on."""
import contextlib
import io
import itertools
import json
import random
import re
import shutil
import signal
import sys
import tarfile
import time
import types
import unittest.mock
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from PIL import Image
from torch.utils.data import DataLoader

import train as train_py
from conftest import ROOT, alone, close, randomise, run, torchrun
from data import IGNORE, IMAGE, READ, BadSample, Example, Sample, Tokenizer, Turn, fill_rows, pack, prepare
from model import ALIGNVLM_PRESETS, AlignVLM
from plumbing import streams
from plumbing.formats import VCR_PROMPT
from plumbing.streams import BAD_KINDS, Bad, DataSet, Documents, Position, deal, steps_of
from plumbing.weights import InputError
from toy.pages import draw, held_out_documents, write_toy_tokenizer
from vision import SIGLIP_PRESETS

TOY = SIGLIP_PRESETS["toy"]
N = 12                                                                  # samples of a data set, where one will do
PAGES = [(draw(page), page.text, prompt, gold) for page, prompt, gold in held_out_documents(N, seed=5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_toy_tokenizer(path)
    return Tokenizer(path)


# ---------------------------------------------------------------------------------------------------------------------
# The formats, as they are released. A writer returns what --data takes and the examples that must come out of it:
# ([(role, parts), ...], images).


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turns_of(*asked_and_answered):
    return [(role, parts) for asked, answered in asked_and_answered
            for role, parts in [("user", asked), ("assistant", [answered])]]


def add_member(tar, name, content=b"", **header):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def add_sample(tar, key, image, caption, status="success"):
    """The members of one sample of img2dataset; a download that failed has no image."""
    row = {"url": f"https://example.com/{key}.jpg", "caption": caption, "key": key, "status": status,
           "error_message": None, "width": image.width, "height": image.height, "original_width": 800,
           "original_height": 600, "exif": "{}", "sha256": "00"}
    if status == "success":
        add_member(tar, f"{key}.jpg", encoded(image, "JPEG", quality=95))
        add_member(tar, f"{key}.txt", caption.encode())
    add_member(tar, f"{key}.json", json.dumps(row).encode())


def write_img2dataset(folder, failures=True):
    """Two tars with a failed download each; beside each tar lie its parquet and its statistics."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard, N, 2):
                add_sample(tar, f"{shard:05}{i:04}", PAGES[i][0], PAGES[i][1])
            if failures:
                add_sample(tar, f"{shard:05}9999", PAGES[0][0], "gone", status="failed_to_download")
        write_parquet(folder / f"{shard:05}.parquet", {"url": ["https://example.com"], "caption": ["a sidecar"]})
        (folder / f"{shard:05}_stats.json").write_text('{"count": 7, "successes": 6, "status_dict": {"success": 6}}')
    return folder, [(turns_of(([IMAGE], text)), [image]) for image, text, _, _ in PAGES]


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def write_bigdocs(folder):
    """Two configs below the folder, the first one in several row groups, the second with two questions a page."""
    image = [{"bytes": encoded(image), "path": f"{i}.png"} for i, (image, *_) in enumerate(PAGES)]
    common = {"dataset_name": ["-"] * N, "image_sha256": ["-"] * N, "sample_id": list(map(str, range(N))),
              "image": image}
    for config, split, query, annotations in [
            ("ArxivOCR", "train", [[READ]] * N, [[text] for _, text, _, _ in PAGES]),
            ("TextOCR", "train", [[q, "again: " + q] for _, _, q, _ in PAGES], [[a, a + "!"] for *_, a in PAGES]),
            ("TextOCR", "val", [["a page of"]] * N, [["the evaluation"]] * N)]:
        (folder / config).mkdir(exist_ok=True)
        write_parquet(folder / config / f"{split}-00000-of-00001.parquet",
                      {**common, "query": query, "annotations": annotations}, row_group_size=5)
    return folder, [(turns_of(*pairs), [image]) for image, text, q, a in PAGES
                    for pairs in ([([IMAGE, READ], text)], [([IMAGE, q], a), (["again: " + q], a + "!")])]


def write_vcr(folder):
    images = [{"bytes": encoded(image), "path": None} for image, *_ in PAGES]
    other = [{"bytes": encoded(Image.new("RGB", (9, 9))), "path": None}] * N
    write_parquet(folder / "train-00000-of-00001.parquet",
                  {"question_id": list(range(N)), "image": other, "caption": ["-"] * N, "stacked_image": images,
                   "only_it_image": other, "only_it_image_small": other,
                   "crossed_text": [[a, "second"] for *_, a in PAGES]}, row_group_size=4)
    return folder, [(turns_of(([IMAGE, VCR_PROMPT], f"{a}, second")), [image]) for image, _, _, a in PAGES]


def write_docdownstream(folder):
    pngs = "imgs/DUE_Benchmark/DocVQA/pngs"
    (folder / pngs).mkdir(parents=True)
    for i, (image, *_) in enumerate(PAGES):
        image.save(folder / pngs / f"{i}.png")
    rows = [{"image": [f"./{pngs}/{i}.png"], "messages": [{"role": "user", "content": "<|image|>" + q},
             {"role": "assistant", "content": a}], "task_name": "qa_sft", "dataset_name": "DocVQA"}
            for i, (_, _, q, a) in enumerate(PAGES)]
    write_lines(folder / "train.jsonl", rows)
    for row in rows:
        row["messages"][1]["content"] = "the evaluation"
    write_lines(folder / "val.jsonl", rows)
    (folder / "test").mkdir()
    write_lines(folder / "test" / "DocVQA_test.jsonl", rows)
    return folder, [(turns_of(([IMAGE, q], a)), [image]) for image, _, q, a in PAGES]


def write_llava(folder, indent=None):
    """One JSON list. The texts hold what a search for records could take for one."""
    decoy = 'Größe {"conversations": [{"from": "gpt", "value": "no"}]}, ] \\ {}[{ 木'
    rows, expected = [], []
    for i, (image, _, q, a) in enumerate(PAGES):
        image.save(folder / f"{i}.png")
        first = {"from": "human", "value": f"{q}\n<image>"}, {"from": "gpt", "value": a}
        again = {"from": "human", "value": decoy}, {"from": "gpt", "value": decoy + a}
        rows.append({"id": f"{i}", "image": f"{i}.png", "conversations": [*first, *again]})
        expected.append((turns_of(([f"{q}\n", IMAGE], a), ([decoy], decoy + a)), [image]))
    (folder / "llava.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    return folder, expected


def write_swift(folder):
    """MS-Swift: two images with marks and without, several turns with a system message, text alone."""
    for i, (image, *_) in enumerate(PAGES):
        image.save(folder / f"{i}.png")
    rows, expected = [], []
    for i, (image, text, q, a) in enumerate(PAGES):
        other = (i + 1) % N
        system, pair = {"role": "system", "content": "Be brief."}, [("Q", a), ("<b>", text)]
        said = [{"role": role, "content": content} for turn in pair
                for role, content in zip(("user", "assistant"), turn)]
        asked = {"role": "user", "content": f"<image>{q}<image>?"}, {"role": "assistant", "content": text}
        rows += [{"messages": [system, *said], "images": [f"{i}.png", f"{other}.png"]},
                 {"messages": list(asked), "images": [f"{i}.png", f"{other}.png"]},
                 {"messages": said}]
        expected += [([("system", ["Be brief."]), *turns_of(([IMAGE, IMAGE, "Q"], a), (["<b>"], text))],
                      [image, PAGES[other][0]]),
                     (turns_of(([IMAGE, q, IMAGE, "?"], text)), [image, PAGES[other][0]]),
                     (turns_of((["Q"], a), (["<b>"], text)), [])]
    write_lines(folder / "swift.jsonl", rows)
    return folder / "swift.jsonl", expected


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FORMATS = {"img2dataset": write_img2dataset, "BigDocs": write_bigdocs, "VCR-wiki": write_vcr,
           "DocDownstream": write_docdownstream, "LLaVA": write_llava,
           "LLaVA, indented": lambda folder: write_llava(folder, indent=2), "MS-Swift": write_swift}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every format's path and expected examples, by name."""
    return {name: write(tmp_path_factory.mktemp("set")) for name, write in FORMATS.items()}


def one_epoch(data_set):
    return [ref for ref, _ in itertools.takewhile(lambda item: item[0] is not None, data_set.references())]


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
        Documents([f"{written['LLaVA'][0]}:{weight}"], seed=0)


def test_two_processes_with_uneven_steps_learn_what_one_does(started, tmp_path, tokenizer):
    """Steps of three samples, two of them on rank 0. Where one rank has more rows the other one runs empty ones, and
    with text alone it runs the vision encoder all the same if the other has images, or both hang."""
    rows = []
    for i, (image, _, q, a) in enumerate(PAGES):
        image.save(tmp_path / f"{i}.png")
        rows.append({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
                     "images": [f"{i}.png"] if i % 2 == 0 else []})
    write_lines(tmp_path / "train.jsonl", rows)
    documents = Documents([str(tmp_path)], 0, tokenizer=tokenizer, config=TOY, max_tiles=1, max_text=99, max_tokens=120)
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
    tokens, _, pixels, lengths = pack(samples)
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
        total = sum(model(*pack(row)) for row in rows)
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


# ---------------------------------------------------------------------------------------------------------------------
# Order


def write_texts(folder, name, n):
    question = {"role": "user", "content": "?"}
    write_lines(folder / f"{name}.jsonl", [
        {"messages": [question, {"role": "assistant", "content": f"{name}{i}"}]} for i in range(n)])


@pytest.fixture
def small_groups(monkeypatch):
    """Shards of a few lines and groups of a few shards, so that both borders matter."""
    monkeypatch.setattr(streams, "BLOCK", 400)
    monkeypatch.setattr(streams, "GROUP", 15)


def texts(path, tokenizer, seed=0):
    return Documents([str(path)] if isinstance(path, Path) else path, seed, tokenizer=tokenizer, config=TOY,
                     max_text=1024, max_tokens=2048)


def steps(documents, world=1, workers=0, batch_size=10, position=None, n=None):
    """(keys in the order in which they are dealt, Position after them) of n steps, or to the end of the epoch."""
    position = position or Position()
    loaders = [steps_of(DataLoader(documents, batch_size=None, num_workers=workers,
                                   sampler=deal(documents.draws(position), batch_size, rank, world)))
               for rank in range(world)]
    done = []
    for shares in zip(*loaders):
        assert all(p == shares[0][1] for _, p in shares), "the ranks are not at the same place"
        keys = [s.key for together in itertools.zip_longest(*(samples for samples, _ in shares)) for s in together if s]
        done.append((keys, shares[0][1]))
        if len(done) == n or n is None and shares[0][1].epoch > position.epoch:
            return done


@pytest.mark.parametrize("n", [103, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_sample_comes_once_an_epoch(small_groups, tmp_path, tokenizer, world, n):
    """For any number of ranks and workers the same steps; the last one of an epoch is short, if it has to be."""
    for i in range(3):
        write_texts(tmp_path, f"part{i}", n // 3 + (i < n % 3))
    documents = texts(tmp_path, tokenizer)
    alone = steps(documents)
    assert [len(keys) for keys, _ in alone] == [10] * (n // 10) + [n % 10] * (n % 10 > 0)
    assert len({key for keys, _ in alone for key in keys}) == n
    for workers in (0, 1, 2):
        assert steps(documents, world, workers) == alone


def test_epochs_and_seeds_have_orders_of_their_own(small_groups, tmp_path, tokenizer):
    write_texts(tmp_path, "a", 50)
    runs = [[key for keys, _ in steps(texts(tmp_path, tokenizer, seed), n=11, batch_size=9) for key in keys]
            for seed in (0, 0, 1)]
    assert runs[0] == runs[1] and runs[0] != runs[2]
    first, second = runs[0][:50], runs[0][50:]
    assert len(set(first)) == 50 and first != second != sorted(second)
    in_file = sorted(first, key=lambda key: int(key.rpartition(":")[2]))
    assert np.mean([abs(in_file.index(key) - i) for i, key in enumerate(first)]) > 10, "groups alone are shuffled"


def restored(position):
    """A Position as a checkpoint brings it back."""
    return Position(**json.loads(json.dumps(asdict(position))))


def test_a_stop_anywhere_changes_nothing(small_groups, tmp_path, tokenizer):
    """Two epochs and more of a mixture, on two ranks; a restart goes on on two or on three."""
    write_texts(tmp_path, "a", 43)
    write_texts(tmp_path, "b", 17)
    documents = texts([f"{tmp_path / 'a.jsonl'}:5", f"{tmp_path / 'b.jsonl'}:1"], tokenizer)
    whole = steps(documents, world=2, n=14, batch_size=8)
    for stop in range(1, 14):
        position = restored(whole[stop - 1][1])
        for world in (2, 3):
            rest = steps(documents, world, position=position, n=14 - stop, batch_size=8)
            assert [keys for keys, _ in rest] == [keys for keys, _ in whole[stop:]], (stop, world)


def test_weights_mix_and_an_epoch_ends_with_the_first_set(small_groups, tmp_path, tokenizer):
    write_texts(tmp_path, "a", 40)
    write_texts(tmp_path, "b", 30)
    documents = texts([f"{tmp_path / 'a.jsonl'}:5", f"{tmp_path / 'b.jsonl'}:1"], tokenizer)
    drawn, epochs = [], []
    for reference, _ in documents.draws(Position()):
        if reference is not None:
            drawn.append(documents[reference].key)
        elif len(epochs := [*epochs, len(drawn)]) == 7:
            break
    assert epochs[0] == 48 and documents.epoch_samples() == pytest.approx(48, rel=0.15)
    for start, end in zip([0, *epochs], epochs):
        from_a = ["a.jsonl" in key for key in drawn[start:end]]
        for i in range(1, len(from_a) + 1):
            assert abs(sum(from_a[:i]) - 5 * i / 6) <= 1
    for name, n in [("a.jsonl", 40), ("b.jsonl", 30)]:      # each set goes on from epoch to epoch until all have come
        keys = [key for key in drawn if name in key]
        assert len(keys) > n and all(len(set(keys[i:i + n])) == len(keys[i:i + n]) for i in range(0, len(keys), n))


# ---------------------------------------------------------------------------------------------------------------------
# Large sets


PEAK = """
def peak():     # MB; ru_maxrss would be that of the process from which this one was forked, if that is larger
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
"""
READER = PEAK + """
import sys, time
start, (root, path) = float(sys.argv[1]), sys.argv[2:]
sys.path.insert(0, root)
import itertools
import torch
from torch.utils.data import DataLoader
from data import Tokenizer
from plumbing.streams import Documents, Position, deal, steps_of
from toy.pages import write_toy_tokenizer
from vision import SIGLIP_PRESETS
torch.set_num_threads(1)
write_toy_tokenizer(__import__("pathlib").Path(path).parent / "tokenizer.model")
tokenizer = Tokenizer(__import__("pathlib").Path(path).parent / "tokenizer.model")
documents = Documents([path], 0, tokenizer=tokenizer, config=SIGLIP_PRESETS["toy"], max_text=1024, max_tokens=16384)
documents.epoch_samples()
loader = DataLoader(documents, batch_size=None, sampler=deal(documents.draws(Position()), 64, 0, 1))
samples, _ = next(steps_of(loader))
seconds = time.time() - start
assert len(samples) == 64 and len({s.key for s in samples}) == 64 and all(len(s.tokens) for s in samples)
n = sum(1 for _ in itertools.islice(documents.draws(Position()), 2000))
print(seconds, peak())
"""


def read_in_a_process(path):
    done = run("-c", READER, time.time(), ROOT, path, start=alone)
    seconds, megabytes = map(float, done.stdout.split())
    print(f"{path.name}: first batch after {seconds:.1f} s, {megabytes:.0f} MB")
    return megabytes


def test_a_million_samples_cost_no_memory(tmp_path):
    """And no scan: `pytest -s` shows the seconds from the process's start to its first batch, imports included."""
    line = json.dumps({"messages": [{"role": "user", "content": "what is it?"},
                                    {"role": "assistant", "content": "K7Q2"}]}) + "\n"
    with open(tmp_path / "million.jsonl", "w") as file:
        for _ in range(100):
            file.write(line * 10_000)
    (tmp_path / "thousand.jsonl").write_text(line * 1000)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        for i in range(1000):
            add_sample(tar, f"{i:09}", PAGES[i % N][0], PAGES[i % N][1])
    for i in range(1, 1000):
        (tmp_path / "tars" / f"{i:05}.tar").hardlink_to(tmp_path / "tars" / "00000.tar")
    base = read_in_a_process(tmp_path / "thousand.jsonl")
    for large in ("million.jsonl", "tars"):
        assert read_in_a_process(tmp_path / large) < base + 300
    (tmp_path / "million.jsonl").unlink()
    shutil.rmtree(tmp_path / "tars")


# ---------------------------------------------------------------------------------------------------------------------
# Damage: none of it ends or hangs a run, each piece is a hole of its kind, its neighbours are read


@pytest.fixture(autouse=True)
def no_hang():
    """Whatever a damaged file makes the reader do, it ends."""
    def alarm(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(path, tokenizer):
    """Sample or Bad for every sample of an epoch, in the order of the files."""
    documents = texts(path, tokenizer)
    items = [documents[0, *reference] for reference in sorted(one_epoch(documents.sets[0]))]
    for bad in (item for item in items if isinstance(item, Bad)):
        assert bad.kind in BAD_KINDS and isinstance(bad.why, str) and documents.where(bad)
    return items


def kinds_of(items):
    return Counter(item.kind for item in items if isinstance(item, Bad))


def in_one_file(name, folder):
    """A format's file to be damaged; the folder has its images."""
    write_img2dataset(folder, failures=False) if name == "img2dataset" else FORMATS[name](folder)
    return next(file for pattern in ("*.tar", "*.parquet", "*/*.parquet", "train.jsonl", "*.jsonl", "*.json")
                for file in sorted(folder.glob(pattern)) if not file.name.startswith("0000") or file.suffix == ".tar")


@pytest.mark.parametrize("tenths", range(10))
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_cut_off(tmp_path, tokenizer, name, tenths):
    """What was whole before the cut is read, the rest is one hole: nobody knows how many samples it was."""
    path = in_one_file(name, tmp_path)
    whole, references = outcome(path, tokenizer), one_epoch(DataSet([str(path)], 0))
    assert not kinds_of(whole)
    good = path.read_bytes()
    length = len(good) * tenths // 10
    path.write_bytes(good[:length])
    other = tmp_path / "other.jsonl"                        # a data set with nothing to read would be an error
    write_texts(tmp_path, "other", 3)
    items = outcome([str(path), str(other)], tokenizer)
    read = [item for item in items if isinstance(item, Sample)]
    kind = "broken record" if path.suffix in (".json", ".jsonl") and length else "unreadable file"
    assert kinds_of(items) == {kind: 1}
    by_key = {s.key: s for s in whole}
    for s in read[:-3]:
        assert torch.equal(s.tokens, by_key[s.key].tokens) and torch.equal(s.pixels, by_key[s.key].pixels)
    if path.suffix == ".parquet":                           # its index is at the end
        assert len(read) == 3
    else:
        complete = sum(stop <= length for _, _, stop in references)
        assert complete - (path.suffix == ".tar") <= len(read) - 3 <= complete      # a tar's last may miss a member


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bytes(tmp_path, tokenizer, name):
    """Anything may come of 20 wrong bytes, but not an exception; 15 times."""
    path = in_one_file(name, tmp_path)
    good, other = path.read_bytes(), tmp_path / "other.jsonl"
    write_texts(tmp_path, "other", 3)
    for seed in range(15):
        rng, broken = random.Random(seed), bytearray(good)
        for _ in range(20):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        items = outcome([str(path), str(other)], tokenizer)
        assert sum(isinstance(item, Sample) for item in items) >= 3 and len(items) >= 4


@pytest.mark.parametrize("mode, kind", [
    ("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"),
    ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("F", "TIFF"), ("YCbCr", "JPEG"), ("LAB", "TIFF"), ("P", "GIF")])
def test_images_of_any_mode_are_read(tmp_path, tokenizer, mode, kind):
    options = {"transparency": 0} if mode == "P" else {}
    (tmp_path / "page.png").write_bytes(encoded(Image.new(mode, (40, 30)), kind, **options))
    write_lines(tmp_path / "train.jsonl", [image_record("page.png")])
    [sample] = outcome(tmp_path / "train.jsonl", tokenizer)
    assert sample.pixels.shape == (1, 3, 112, 112)


def image_record(*names):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
            "images": list(names)}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_images_cut_off(tmp_path, tokenizer, kind):
    good = encoded(Image.effect_noise((90, 90), 50), kind)
    for tenths in range(10):
        (tmp_path / f"{tenths}.png").write_bytes(good[:len(good) * tenths // 10])
    (tmp_path / "whole.png").write_bytes(good)
    write_lines(tmp_path / "train.jsonl", [image_record("whole.png"), *(image_record(f"{t}.png") for t in range(10))])
    first, *rest = outcome(tmp_path / "train.jsonl", tokenizer)
    assert isinstance(first, Sample) and kinds_of(rest) == {"unreadable image": 10}


def said(content, asked="?", more=""):
    """A line with this question and this answer as JSON, and more fields."""
    return '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": %s}]%s}' % (
        asked, content, more)


def shown(images, asked="?"):
    """A line with these images as JSON."""
    return said('"!"', asked, f', "images": {images}')


USER, TOLD = '{"role": "user", "content": "?"}', '{"role": "assistant", "content": "!"}'
BAD_LINES = {
    "half a record": (said('"!"')[:40], "broken record"),
    "two records": (said('"!"') * 2, "broken record"),
    "no JSON": ("these are words", "broken record"),
    "single quotes": (said('"!"').replace('"', "'"), "broken record"),
    "zeros": ("\0" * 300, "broken record"),
    "control character": (said('"\x01"'), "broken record"),
    "not UTF-8": (said('"').encode() + b'\xff\xfe"}]}', "broken record"),
    "Latin-1": (said('"Größe"').encode("latin-1"), "broken record"),
    "lone surrogate": (said(r'"\ud800"'), "broken record"),
    "lone surrogate, raw": (said('"').encode()[:-3] + b'\xed\xa0\x80"}]}', "broken record"),
    "lone surrogate in a question": (said('"!"').replace("?", r"\udfff"), "broken record"),
    "deep list": ("[" * 100_000, "broken record"),
    "deep object": ('{"a":' * 100_000, "broken record"),
    "deep and whole": ('{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}", "broken record"),
    "long number": ('{"messages": 1' + "0" * 5000 + "}", "broken record"),
    "a million spaces": (said(json.dumps(" " * 1_500_000 + "x")), "broken record"),
    "list": ("[1, 2]", "missing field"), "number": ("3", "missing field"), "null": ("null", "missing field"),
    "string": ('"messages"', "missing field"), "no keys": ("{}", "missing field"),
    "foreign keys": ('{"text": "a", "label": 3}', "missing field"),
    "null messages": ('{"messages": null}', "missing field"),
    "number of messages": ('{"messages": 3}', "missing field"),
    "no messages": ('{"messages": []}', "missing field"), "message of text": ('{"messages": "?"}', "missing field"),
    "null message": ('{"messages": [null]}', "missing field"),
    "nested": ('{"messages": [[%s, %s]]}' % (USER, TOLD), "missing field"),
    "message without content": ('{"messages": [%s, {"role": "assistant"}]}' % USER, "missing field"),
    "message without role": ('{"messages": [%s, {"content": "!"}]}' % USER, "missing field"),
    "foreign role": ('{"messages": [%s, %s, {"role": "tool", "content": ""}]}' % (USER, TOLD), "missing field"),
    "role in a list": ('{"messages": [%s, {"role": ["assistant"], "content": "!"}]}' % USER, "missing field"),
    "role in an object": ('{"messages": [%s, {"role": {}, "content": "!"}]}' % USER, "missing field"),
    "number for a role": ('{"messages": [%s, {"role": 1, "content": "!"}]}' % USER, "missing field"),
    "question alone": ('{"messages": [%s]}' % USER, "missing field"),
    "number for an answer": (said("3"), "missing field"), "null for an answer": (said("null"), "missing field"),
    "parts for an answer": (said('[{"type": "text", "text": "!"}]'), "missing field"),
    "true for an image": (said('"!"', more=', "image": true'), "missing field"),
    "number for images": (shown('7'), "missing field"),
    "null in images": (shown('[null]'), "missing field"),
    "numbers in images": (shown('[1, 2]'), "missing field"),
    "list in images": (shown('[["page.png"]]'), "missing field"),
    "mark without image": (said('"!"').replace("?", "<image>"), "missing field"),
    "more marks than images": (shown('["page.png"]', "<image><image>"), "missing field"),
    "fewer marks than images": (shown('["page.png", "page.png"]', "<image>"), "missing field"),
    "empty answer": (said('""'), "empty answer"), "white answer": (said(r'" \n\t"'), "empty answer"),
    "one of two answers empty": ('{"messages": [%s, %s, %s, %s]}' % (USER, TOLD, USER, TOLD.replace("!", "")),
                                 "empty answer"),
    "missing image": (shown('["gone.png"]'), "image not found"),
    "one missing image": (shown('["page.png", "gone.png"]'), "image not found"),
    "empty name in a list": (shown('[""]'), "image not found"),
    "folder for an image": (shown('["."]'), "image not found"),
    "object for an image": (shown('[{"bytes": "", "path": "page.png"}]'), "missing field"),
    "long name": (shown('["%s.png"]') % ("a" * 5000), "image not found"),
    "zero in a name": (shown(r'["a\u0000b.png"]'), "image not found"),
    "surrogate in a name": (shown(r'["a\ud800.png"]'), "image not found"),
    "URL": (shown('["https://example.com/a.png"]'), "image not found"),
    "image above the folder": (shown('["../x.png"]'), "image outside the folder"),
    "image above, by detours": (shown('["a/../../x.png"]'), "image outside the folder"),
    "absolute image": (shown('["/etc/passwd"]'), "image outside the folder"),
    "text for an image": (shown('["train.jsonl"]'), "unreadable image"),
    "too many images": (shown(json.dumps(["page.png"] * 40)), "too long"),
    "long question": (said('"!"').replace("?", "? " * 3000), "too long"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(tmp_path, tokenizer, name):
    line, kind = BAD_LINES[name]
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")         # it is there, and not the data set's
    Image.new("RGB", (50, 50)).save(folder / "page.png")
    good = shown('["page.png"]').encode()
    (folder / "train.jsonl").write_bytes(b"\n".join([good, line if isinstance(line, bytes) else line.encode(), good]))
    items = outcome(folder, tokenizer)
    assert [getattr(item, "kind", "good") for item in items] == ["good", kind, "good"]
    assert "train.jsonl, line 2" in texts(folder, tokenizer).where(items[1])


@pytest.mark.parametrize("first", [b"these are words\n", b'"id": 1}\n', b"\n\n\n", b"\xef\xbb\xbf"],
                         ids=["words", "half", "empty lines", "BOM"])
def test_a_bad_first_line_costs_no_other(tmp_path, tokenizer, first):
    write_texts(tmp_path, "train", 5)
    path = tmp_path / "train.jsonl"
    path.write_bytes(first + path.read_bytes())
    items = outcome(tmp_path, tokenizer)
    assert sum(isinstance(item, Sample) for item in items) >= (4 if first == b"\xef\xbb\xbf" else 5)
    assert kinds_of(items) in ({}, {"broken record": 1})


@pytest.mark.parametrize("middle, kinds", [
    ('{"id": 1}', {"missing field": 1}), ('{"id": 1}, {"id": 2}, {"id": 3}', {"missing field": 3}),
    ("7", {"missing field": 1}), ('{"conversations": [}', {"broken record": 1}),
    ('{"conversations": []', {"broken record": 1}), ("words", {"broken record": 1}),
    ('{"conversations": [{"from": "gpt", "value": ""}]}', {"empty answer": 1}),
    ('{"a":' * 300_000, {"broken record": 1}), ("[" * 300_000, {"broken record": 1}),
    ('{"' * 300_000, {"broken record": 1})],
    ids=["foreign", "three foreign", "number", "broken", "unclosed", "words", "empty", "deep objects", "deep lists",
         "quotes"])
def test_bad_records_in_a_list(tmp_path, tokenizer, middle, kinds):
    good = '{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}'
    (tmp_path / "train.json").write_text(f"[{good}, {middle}, {good}]")
    items = outcome(tmp_path, tokenizer)
    assert kinds_of(items) == kinds
    assert isinstance(items[0], Sample) and isinstance(items[-1], Sample)


def pax_sparse(name, size):
    """The header of a sparse member that claims `size` bytes, none of them stored."""
    info = tarfile.TarInfo(name)
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(size),
                        "GNU.sparse.map": "0,0"}
    return info.tobuf(tarfile.PAX_FORMAT)


def with_size(field, kind=tarfile.REGTYPE):
    """A header with these 12 bytes for a size, and the checksum that goes with it."""
    header = bytearray(tarfile.TarInfo("000001.jpg").tobuf(tarfile.USTAR_FORMAT)[:512])
    header[124:136], header[156:157] = field, kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def members(*parts):
    """The bytes in a tar of (name, content or header's attributes)."""
    file = io.BytesIO()
    tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)
    for name, content in parts:
        add_member(tar, name, content) if isinstance(content, bytes) else add_member(tar, name, **content)
    return file.getvalue()          # never closed: no zeros at its end


PAGE = encoded(PAGES[0][0])
SYMLINK, LOOP = ({"type": tarfile.SYMTYPE, "linkname": name} for name in ("/etc/passwd", "1.jpg"))
HARDLINK = {"type": tarfile.LNKTYPE, "linkname": "gone"}
BAD_MEMBERS = {
    "no image": (members(("1.txt", b"caption")), {"missing field": 1}),
    "no caption": (members(("1.jpg", PAGE)), {"missing field": 1}),
    "caption in a list": (members(("1.jpg", PAGE), ("1.json", b'["caption"]')), {"missing field": 1}),
    "null caption": (members(("1.jpg", PAGE), ("1.json", b'{"caption": null}')), {"missing field": 1}),
    "foreign keys": (members(("1.jpg", PAGE), ("1.json", b'{"text": "a"}')), {"missing field": 1}),
    "broken JSON": (members(("1.jpg", PAGE), ("1.json", b'{"caption')), {"broken record": 1}),
    "deep JSON": (members(("1.jpg", PAGE), ("1.json", b"[" * 100_000)), {"broken record": 1}),
    "not UTF-8": (members(("1.jpg", PAGE), ("1.txt", b"\xff\xfe\xfd")), {"broken record": 1}),
    "empty caption": (members(("1.jpg", PAGE), ("1.txt", b"")), {"empty answer": 1}),
    "white caption": (members(("1.jpg", PAGE), ("1.txt", b" \n")), {"empty answer": 1}),
    "empty image": (members(("1.jpg", b""), ("1.txt", b"a")), {"unreadable image": 1}),
    "text for an image": (members(("1.jpg", b"words"), ("1.txt", b"a")), {"unreadable image": 1}),
    "half an image": (members(("1.jpg", PAGE[:300]), ("1.txt", b"a")), {"unreadable image": 1}),
    "foreign members": (members(("1.mp4", b"0"), ("1.cls", b"3")), {"missing field": 1}),
    "link": (members(("1.jpg", SYMLINK), ("1.txt", b"a")), {"missing field": 1}),
    "hard link": (members(("1.jpg", HARDLINK), ("1.txt", b"a")), {"missing field": 1}),
    "link to itself": (members(("1.jpg", LOOP), ("1.txt", b"a")), {"missing field": 1}),
    "device": (members(("1.jpg", {"type": tarfile.CHRTYPE}), ("1.txt", b"a")), {"missing field": 1}),
    "sparse terabyte": (pax_sparse("1.jpg", 2 ** 40) + members(("1.txt", b"a")), {"broken record": 1}),
}
# From one of these on nobody knows where a member begins.
BAD_HEADERS = {
    "8 GB": with_size(b"77777777777\0"), "a terabyte": with_size(b"\x80" + (2 ** 40).to_bytes(11, "big")),
    "2 ** 70 bytes": with_size(b"\x80" + (2 ** 70).to_bytes(11, "big")),
    "2 ** 63 bytes": with_size(b"\x80" + (2 ** 63).to_bytes(11, "big")),
    "-512 bytes": with_size(b"\xff" * 10 + b"\xfe\x00"), "-1024 bytes": with_size(b"\xff" * 10 + b"\xfc\x00"),
    "no number": with_size(b"words, words"),
    "wrong checksum": with_size(b"00000000000\0")[:-1] + b"x", "noise": bytes(range(256)) * 2,
    "broken pax": with_size(b"00000000010\0", tarfile.XHDTYPE) + b"0 a=b\n\0".ljust(512, b"\0"),
    "pax of 8 GB": with_size(b"77777777777\0", tarfile.XHDTYPE),
}


def tar_with(middle, folder):
    """Good sample, the middle, good sample."""
    good = [members((f"{i}.jpg", PAGE), (f"{i}.txt", b"caption")) for i in (0, 2)]
    (folder / "00000.tar").write_bytes(good[0] + middle + good[1] + bytes(1024))
    return folder


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_members(tmp_path, tokenizer, name):
    middle, kinds = BAD_MEMBERS[name]
    items = outcome(tar_with(middle, tmp_path), tokenizer)
    assert kinds_of(items) == kinds
    assert isinstance(items[0], Sample) and isinstance(items[-1], Sample)


def test_a_tars_folders_are_no_samples(tmp_path, tokenizer):
    folders = [("./", {"type": tarfile.DIRTYPE}), ("./a/", {"type": tarfile.DIRTYPE})]
    tar_with(members(*folders, ("./a/1.jpg", PAGE), ("./a/1.txt", b"b")), tmp_path)
    assert [type(item) for item in outcome(tmp_path, tokenizer)] == [Sample] * 3


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers(tmp_path, tokenizer, name):
    items = outcome(tar_with(BAD_HEADERS[name], tmp_path), tokenizer)
    assert kinds_of(items) == {"unreadable file": 1}
    assert len(items) == 1 or isinstance(items[0], Sample)


def column(values, kind):
    return pyarrow.array(values, kind)


NUMBER, TEXT = pyarrow.int64(), pyarrow.string()
IMAGES, LISTS = pyarrow.struct([("bytes", pyarrow.binary()), ("path", TEXT)]), pyarrow.list_(TEXT)
GOOD = {"image": ({"bytes": PAGE, "path": None}, IMAGES), "query": (["?"], LISTS), "annotations": (["!"], LISTS)}
BAD_CELLS = {
    "null image": ({"image": (None, IMAGES)}, "missing field"),
    "no bytes": ({"image": ({"bytes": None, "path": "a.png"}, IMAGES)}, "missing field"),
    "empty bytes": ({"image": ({"bytes": b"", "path": "a.png"}, IMAGES)}, "missing field"),
    "words for an image": ({"image": ({"bytes": b"words", "path": None}, IMAGES)}, "unreadable image"),
    "half an image": ({"image": ({"bytes": PAGE[:300], "path": None}, IMAGES)}, "unreadable image"),
    "null questions": ({"query": (None, LISTS)}, "missing field"),
    "null answers": ({"annotations": (None, LISTS)}, "missing field"),
    "no questions": ({"query": ([], LISTS)}, "missing field"),
    "no answers": ({"annotations": ([], LISTS)}, "missing field"),
    "null in questions": ({"query": ([None], LISTS)}, "missing field"),
    "null in answers": ({"annotations": ([None], LISTS)}, "missing field"),
    "empty answer": ({"annotations": ([""], LISTS)}, "empty answer"),
    "more answers than questions": ({"annotations": (["!", "?"], LISTS)}, "missing field"),
    "more questions than answers": ({"query": (["!", "?"], LISTS)}, "missing field"),
}
BAD_COLUMNS = {     # of another type than released ones have
    "path for an image": {"image": ("a.png", TEXT)},
    "bare bytes": {"image": (PAGE, pyarrow.binary())},
    "number for an image": {"image": (3, NUMBER)},
    "list of images": {"image": ([{"bytes": PAGE, "path": None}], pyarrow.list_(IMAGES))},
    "text for bytes": {"image": ({"bytes": "words", "path": None}, pyarrow.struct([("bytes", TEXT), ("path", TEXT)]))},
    "number for questions": {"query": (3, NUMBER)},
    "numbers for answers": {"annotations": ([3], pyarrow.list_(NUMBER))},
    "text for questions": {"query": ("what is it?", TEXT)},
    "text for both": {"query": ("abc", TEXT), "annotations": ("xyz", TEXT)},
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_bad_cells(tmp_path, tokenizer, name):
    cells, kind = BAD_CELLS[name]
    rows = [GOOD, {**GOOD, **cells}, GOOD]
    columns = {key: column([row[key][0] for row in rows], GOOD[key][1]) for key in GOOD}
    write_parquet(tmp_path / "train.parquet", columns)
    assert [getattr(item, "kind", "good") for item in outcome(tmp_path, tokenizer)] == ["good", kind, "good"]


@pytest.mark.parametrize("cell", [[None], [None, "word"], [""], []], ids=str)
def test_bad_crossed_texts(tmp_path, tokenizer, cell):
    write_parquet(tmp_path / "train.parquet", {"stacked_image": column([GOOD["image"][0]] * 3, IMAGES),
                                               "crossed_text": column([["word"], cell, ["word"]], LISTS)})
    kind = "empty answer" if cell == [""] else "missing field"
    assert [getattr(item, "kind", "good") for item in outcome(tmp_path, tokenizer)] == ["good", kind, "good"]


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_columns(tmp_path, tokenizer, name):
    row = {**GOOD, **BAD_COLUMNS[name]}
    write_parquet(tmp_path / "train.parquet", {key: column([value] * 2, kind) for key, (value, kind) in row.items()})
    assert kinds_of(outcome(tmp_path, tokenizer)) == {"missing field": 2}


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("content", [
    b"", b"\n \n", b"garbage", bytes(4096), b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"{", b"[", b"[{]",
    bytes(257) + b"ustar" + bytes(300), b"\x1f\x8b\x08" + bytes(50), bytes(range(256)) * 30], ids=lambda b: repr(b[:8]))
def test_garbage_with_the_right_suffix_is_one_hole(tmp_path, tokenizer, suffix, content):
    """Beside a good file; alone it would stop the run at its start."""
    (tmp_path / f"a{suffix}").write_bytes(content)
    write_texts(tmp_path, "good", 3)
    items = outcome([str(tmp_path / f"a{suffix}"), str(tmp_path / "good.jsonl")], tokenizer)
    kind = "broken record" if content in (b"{", b"[", b"[{]") else "unreadable file"
    assert kinds_of(items) == {kind: 1} and sum(isinstance(item, Sample) for item in items) == 3


def test_a_folder_called_like_a_file_is_one_hole(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").mkdir()
    write_texts(tmp_path, "good", 3)
    for path in (tmp_path, tmp_path / "*"):
        items = outcome([str(path)], tokenizer)
        assert kinds_of(items) == {"unreadable file": 1} and len(items) == 4


def png_chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_bombs_cost_no_memory(tmp_path):
    """KB that claim gigabytes: an image of 100,000 x 100,000, profiles and texts that inflate, sparse members."""
    header = PAGE[:16] + (100_000).to_bytes(4, "big") * 2 + PAGE[24:29]
    size = PAGE[:8] + png_chunk(b"IHDR", header[16:]) + PAGE[33:]
    gigabyte = zlib.compress(bytes(2 ** 26)) * 16
    profile = PAGE[:33] + png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 ** 30 // 2))) + PAGE[33:]
    text = PAGE[:33] + png_chunk(b"zTXt", b"a\0\0" + gigabyte) + PAGE[33:]
    for name, image in {"size": size, "profile": profile, "text": text}.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add_member(tar, "1.png", image)
            add_member(tar, "1.txt", b"caption")
    (tmp_path / "sparse.tar").write_bytes(pax_sparse("1.png", 2 ** 31) + members(("1.txt", b"a")) + bytes(1024))
    script = PEAK + """
import sys
sys.path.insert(0, sys.argv[1])
from data import BadSample
from plumbing.streams import DataSet
from vision import ImageError
grown = {}
for path in sys.argv[2:]:
    before = peak()
    try:
        DataSet([path], 0).read(0, *DataSet([path], 0).index(0)[0])
        kind = "good"
    except ImageError:
        kind = "unreadable image"
    except BadSample as bad:
        kind = bad.args[0]
    grown[path] = kind, peak() - before
print(grown)
"""
    paths = [str(tmp_path / f"{name}.tar") for name in ("size", "profile", "text", "sparse")]
    done = run("-c", script, ROOT, *paths, start=alone, timeout=100)
    grown = eval(done.stdout)
    assert {Path(path).stem: kind for path, (kind, _) in grown.items()}["size"] == "unreadable image"
    assert all(megabytes < 100 for _, megabytes in grown.values()), grown
