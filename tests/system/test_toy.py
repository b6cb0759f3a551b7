"""toy/: drawn pages against themselves, and what the lessons are made of."""
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from conftest import alone, run, start
from data import Sample
from model import IGNORE
from sets import outcome
from small_tokenizers import tokenizer  # noqa: F401: a fixture
from toy.looks import CELL, LOOKS, Page, draw, glyph
from toy.pages import (KINDS, ToyDocuments, drawn_page, eye_chart, held_out_documents, plain_text)
from vision import SIGLIP_PRESETS, tile

TOY = SIGLIP_PRESETS["toy"]


def pages_of(kinds, seed: int) -> list[Page]:
    """A small and a large page of each kind."""
    rng = random.Random(seed)
    return [drawn_page(rng, kind, large, "train") for kind in kinds for large in (False, True)]


def cells_of(page: Page) -> list[list[str]]:
    """What stands in each cell, row by row."""
    cells = [[" "] * page.columns for _ in range(page.rows)]
    for row, column, word in page.words:
        cells[row][column:column + len(word)] = word
    return cells


# --------------------------------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize("kind, large", [*itertools.product(KINDS, (False, True)),
                                         ("report", True)])
def test_drawn_pages(kind, large):
    rng = random.Random(f"{kind}{large}")
    for _ in range(50):
        page = drawn_page(rng, kind, large, "train")
        cells = [(row, column + i) for row, column, word in page.words for i in range(len(word))]
        assert len(cells) == len(set(cells)), "words overlap"
        assert all(0 <= row < page.rows and 0 <= column < page.columns for row, column in cells)
        assert page.large == large and (len(tile(draw(page), TOY)) > 1) == large
        prompts = [prompt for prompt, _ in page.questions]
        assert prompts and len(prompts) == len(set(prompts)), "a question with two answers"
        assert all(gold in page.text for _, gold in page.questions)
        words = "".join(word for _, _, word in page.words)
        assert sorted("".join(page.text.split())) == sorted(words)


def test_reports_take_up_to_nine_tiles_and_their_fields_stand_apart():
    """What one reads aloud is what a reader of the cells sees: row by row, words where there is a
    gap."""
    rng = random.Random(0)
    tiles = Counter()
    for _ in range(100):
        page = drawn_page(rng, "report", True, "train")
        tiles[len(tile(draw(page), TOY)) - 1] += 1
        for _, column, word in page.words:
            assert column // 8 == (column + len(word) - 1) // 8, f"{word} lies in two tiles"
        lines = ["".join(row) for row in cells_of(page)]
        assert page.text.split() == [word for line in lines for word in line.split()]
    assert set(tiles) == {4, 6, 9} and min(tiles.values()) > 20


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_keeps_size_and_place(look):
    """Drawn the same each time; where it is darkest, specks apart, the clean page has ink within
    half a cell, of the same character unless they are set proportionally."""
    for page in pages_of(KINDS, seed=1):
        image = draw(page, look)
        plain = draw(page)
        assert image.size == plain.size and image.mode == "RGB"
        assert image.tobytes() == draw(page, look).tobytes()
        assert (image.tobytes() == plain.tobytes()) == (look == "clean")
        near_ink = np.asarray(plain.convert("L").filter(ImageFilter.MinFilter(15))) < 128
        grey = image.convert("L").filter(ImageFilter.MedianFilter(3))
        around = grey.filter(ImageFilter.BoxBlur(20))
        darkness = np.asarray(grey, np.float32) - np.asarray(around, np.float32)
        darkness = darkness[8:-8]           # without the edges, which may be dark themselves
        darkest = darkness < np.quantile(darkness, 0.02)
        assert near_ink[8:-8][darkest].mean() > 0.9
        empty = Page(page.kind, page.columns, page.rows)
        assert draw(empty, look).size == image.size


def test_plain_text_is_what_the_patches_show():
    for page in [*pages_of([*KINDS, "report"], seed=0), eye_chart(random.Random(0))]:
        pixels = tile(draw(page), TOY)                                      # (T, 3, 112, 112)
        patches = pixels[:, 0].unfold(1, CELL, CELL).unfold(2, CELL, CELL)  # (T, 8, 8, CELL, CELL)
        patches = patches.flatten(0, 2).numpy()                             # (T * 64, CELL, CELL)
        text = plain_text(page, TOY)
        assert len(text) == len(patches)
        for i, (character, patch) in enumerate(zip(text, patches)):
            if len(pixels) > 1 and i < TOY.n_patches:
                assert character == " "     # the whole page, scaled down
                continue
            ink = np.zeros((CELL, CELL))
            if character != " ":
                ink = np.asarray(glyph(character), np.float32) / 255
            assert np.abs(patch - -2 * ink).max() < 0.02, (page.kind, character)


# --------------------------------------------------------------------------------------------------
# Splits


def test_held_out_documents_are_in_equal_shares_and_open_ended():
    documents = held_out_documents(300, seed=0)
    kinds = [page.kind for page, _, _ in documents]
    assert all(kinds.count(kind) == 60 for kind in KINDS)
    assert sum(page.large for page, _, _ in documents) == 100
    symbols = [sum(c.isalnum() for c in gold) for _, _, gold in documents]
    assert np.mean(symbols) >= 3
    assert len({gold for _, _, gold in documents}) > 280, "answers repeat: they could be guessed"

    def texts(documents):
        return [page.text for page, _, _ in documents]

    assert texts(documents[:20]) == texts(held_out_documents(20, seed=0))
    assert texts(documents[:20]) != texts(held_out_documents(20, seed=1))


def test_no_document_is_in_both_splits():
    held_out = {page.text for page, _, _ in held_out_documents(500, seed=0)}
    rng = random.Random(0)
    train = {drawn_page(rng, kind, False, "train").text for kind in KINDS for _ in range(400)}
    assert not held_out & train
    # By construction, not by chance: a page's text alone decides.
    forms = [drawn_page(random.Random(i), "form", False, "held-out").text for i in range(200)]
    assert not train & {*forms}


# --------------------------------------------------------------------------------------------------
# Lessons


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_toy_samples_depend_on_seed_and_index_alone(tokenizer, stage):
    documents = ToyDocuments(stage, 100, 7, tokenizer, TOY)
    indices = range(0, 100, 9)
    backwards = {i: documents[i] for i in reversed(indices)}
    loader = torch.utils.data.DataLoader(documents, sampler=indices, batch_size=None, num_workers=2)
    for i, sample in zip(indices, loader):
        same = backwards[i]
        assert sample.key == same.key
        assert torch.equal(sample.tokens, same.tokens) and torch.equal(sample.pixels, same.pixels)
        assert (sample.labels != IGNORE).any()
        assert (len(sample.pixels) == 0) == (stage == 0)
    other = ToyDocuments(stage, 100, 8, tokenizer, TOY)
    assert any(not torch.equal(documents[i].tokens, other[i].tokens) for i in range(5))


def test_hard_pages_come_in_over_the_second_quarter_of_stage_1(tokenizer):
    n = 60
    clean = ToyDocuments(1, n, 0, tokenizer, TOY, look="clean")
    hard = ToyDocuments(1, n, 0, tokenizer, TOY, look="hard")
    same = [torch.equal(clean[i].pixels, hard[i].pixels) for i in range(n)]
    assert all(same[:15]) and 0 < sum(same[15:30]) < 15 and not any(same[30:])
    assert all(torch.equal(clean[i].tokens, hard[i].tokens) for i in range(n))


def test_hard_pages_are_the_same_pages_but_for_stage_3_which_has_reports(tokenizer):
    def samples(stage, split, look) -> list[Sample]:
        documents = ToyDocuments(stage, 60, 0, tokenizer, TOY, split, look=look)
        return [documents[i] for i in range(60)]

    for stage, split in [(1, "held-out"), (2, "train"), (2, "held-out")]:
        for clean, hard in zip(samples(stage, split, "clean"), samples(stage, split, "hard")):
            assert torch.equal(clean.tokens, hard.tokens)
            assert not torch.equal(clean.pixels, hard.pixels)
    for split in ("train", "held-out"):
        most = {look: max(len(sample.pixels) for sample in samples(3, split, look))
                for look in ("clean", "hard")}
        assert most["clean"] <= 4 and most["hard"] == 10


# --------------------------------------------------------------------------------------------------
# The command


def test_draw_command(tmp_path):
    for name, how in [("a", start), ("b", alone)]:      # whatever the seed of str's hash is
        run("-m", "toy.pages", "--draw", 10, "--seed", 3, tmp_path / name, start=how)
    lines = (tmp_path / "a" / "questions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 10 and {"image", "prompt", "answer", "kind"} == set(rows[0])
    for row in rows:
        image = tmp_path / "a" / row["image"]
        assert image.read_bytes() == (tmp_path / "b" / row["image"]).read_bytes()
        assert Image.open(image).format == "PNG"


def test_drawn_pages_as_training_data(tmp_path, tokenizer):
    run("-m", "toy.pages", "--draw", 10, "--seed", 3, "--train", tmp_path)
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    samples = outcome(tmp_path / "train.jsonl", tokenizer)
    answers = [tokenizer.decode(sample.labels[sample.labels != IGNORE].tolist()[:-1])
               for sample in samples]
    assert sorted(answers) == sorted(row["answer"] for row in rows)
    for sample in samples:
        assert len(sample.pixels) > 0


def test_the_sheet_has_five_pages_in_every_look(tmp_path):
    run("-m", "toy.pages", "--sheet", tmp_path / "new" / "looks.png")
    assert Image.open(tmp_path / "new" / "looks.png").height > 2 * len(LOOKS) * 8 * CELL
    done = run("-m", "toy.pages", "--sheet", tmp_path / "looks.words", code=2)
    assert "looks.words" in done.stderr.splitlines()[-1]
