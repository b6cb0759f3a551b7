"""toy/: drawn pages against themselves, and what the lessons are made of."""
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import alone, run, start
from model import IGNORE
from sets import outcome
from small_tokenizers import tokenizer  # noqa: F401: a fixture
from toy.pages import (CELL, KINDS, LESSONS, READ, Page, ToyDocuments, draw, drawn_page, eye_chart,
                       glyph, held_out_documents, plain_text, reading_and_questions)
from vision import SIGLIP_PRESETS, tile

TOY = SIGLIP_PRESETS["toy"]


def pages_of(kinds, seed: int) -> list[Page]:
    """A small and a large page of each kind."""
    rng = random.Random(seed)
    return [drawn_page(rng, kind, large, "train") for kind in kinds for large in (False, True)]


# --------------------------------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize("large", (False, True))
@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_stands_where_its_question_says(kind):
    """Behind its label, or in a table in the row of its key and under the column's name."""
    rng = random.Random(kind)
    for i in range(40):
        page = drawn_page(rng, kind, i % 2 == 1, "train")
        at = {(row, column): word for row, column, word in page.words}
        for prompt, gold in page.questions:
            name, _, key = prompt.removeprefix("what is ").removesuffix("?").partition(" of ")
            if kind == "table":
                [column] = [x for (y, x), word in at.items() if word == name and y == 0]
                [row] = [y for (y, x), word in at.items() if word == key and x == 0]
                assert at[row, column] == gold
            else:
                assert {f"{name} {gold}", f"{name}:{gold}"} & {*page.lines}


def test_plain_text_is_what_the_patches_show():
    for page in [*pages_of(KINDS, seed=0), eye_chart(random.Random(0))]:
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


def test_what_is_smudged_is_not_asked_for(tokenizer, monkeypatch):
    """And of a chart's cells all others are, each by its own place."""
    smudged = []

    def remember(self, rng, sample, smudge=ToyDocuments.smudge):
        before = sample.tokens.clone()
        smudge(self, rng, sample)
        smudged.append((before, sample))

    monkeypatch.setattr(ToyDocuments, "smudge", remember)
    documents = ToyDocuments(0, 100, 7, tokenizer, TOY)
    for i in range(20):
        documents[i]
    assert len(smudged) > 3
    n_asked = 0
    for before, sample in smudged:
        header_ends = (before == tokenizer.special["<|end_header_id|>"]).nonzero()[:, 0]
        cells, answers = header_ends[0] + 2, header_ends[1] + 1     # labels: a place earlier
        characters = before[cells:cells + TOY.n_patches]
        labels = sample.labels[answers:answers + TOY.n_patches]
        stays = sample.tokens[cells:cells + TOY.n_patches] == characters
        n_asked += (labels != IGNORE).sum()
        assert torch.equal(labels[labels != IGNORE], characters[labels != IGNORE])
        assert stays[labels != IGNORE].all() and not stays.all()
    assert n_asked > 50


def test_a_page_is_read_then_asked_about_in_the_shares_that_are_asked_for():
    [page] = pages_of(["invoice"], seed=0)[1:]
    n = Counter()
    for seed in range(1000):
        asked = reading_and_questions(random.Random(seed), page, read=0.2, ask=0.7)
        prompts = [prompt for prompt, _ in asked]
        n["read" if prompts == [READ] else "ask" if READ not in prompts else "both"] += 1
        assert READ not in prompts[1:] and len(prompts) == len(set(prompts))
    assert [round(n[what] / 1000, 1) for what in ("read", "ask", "both")] == [0.2, 0.7, 0.1]


def test_lessons_become_what_they_are_to_be():
    """Stage 0 is charts and dense pages for an eighth, without the latter from three eighths on;
    stage 1 charts alone for three fifths; stage 2 has ever more pages of several tiles for a
    fifth."""
    def kinds(stage: int, progress: float) -> Counter:
        pages = [LESSONS[stage](random.Random(i), progress, "train")[0] for i in range(300)]
        return Counter({kind: sum(page.kind == kind for page in pages) for kind in
                        ("chart", "dense", "sticker")} | {"large": sum(p.large for p in pages)})

    assert kinds(0, 0.12).total() == kinds(0, 0.12)["chart"] + kinds(0, 0.12)["dense"] == 300
    assert kinds(0, 0.38)["dense"] == 0 < kinds(0, 0.38)["chart"]
    assert kinds(1, 0.5)["chart"] == 300 and 150 < kinds(1, 1.0)["sticker"] < 210
    assert kinds(2, 0.0)["large"] == 0 < kinds(2, 0.1)["large"] < 150 < kinds(2, 0.2)["large"] < 240


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
