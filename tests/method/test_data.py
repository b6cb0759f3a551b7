"""data.py: the tokenizer and chat format against hand-written expectations, the drawn documents against themselves."""
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from conftest import alone, run, start
from data import IGNORE, IMAGE, Tokenizer, encode_chat, pack_row, prepare
from plumbing.examples import Example, Turn
from model import LLAMA_PRESETS
from paper.metrics import edit_distance
from plumbing.formats import split_images
from toy.looks import CELL, LOOKS, draw, glyph
from toy.pages import (KINDS, Page, ToyDocuments, drawn_page, eye_chart, held_out_documents, plain_text,
                       write_toy_tokenizer)
from vision import SIGLIP_PRESETS, tile

TOY = SIGLIP_PRESETS["toy"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_toy_tokenizer(path)
    return Tokenizer(path)


def test_tokenizer_has_llama3s_layout(tokenizer):
    assert len(tokenizer) == LLAMA_PRESETS["toy"].vocab_size
    first = len(tokenizer) - 256
    names = sorted(tokenizer.special, key=tokenizer.special.get)
    assert [tokenizer.special[n] for n in names] == list(range(first, first + 256))
    for offset, name in [(0, "begin_of_text"), (1, "end_of_text"), (4, "finetune_right_pad_id"), (6, "start_header_id"),
                         (7, "end_header_id"), (8, "eom_id"), (9, "eot_id"), (10, "python_tag"), (11, "image"),
                         (12, "reserved_special_token_2"), (255, "reserved_special_token_245")]:
        assert tokenizer.special[f"<|{name}|>"] == first + offset


@pytest.mark.parametrize("text", ["", "INVOICE\nTAX 4.75", "what is the page of it?", "  \n\n \t", "Größe 木 🙂", "\x00\x7f", "users"])
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_of_the_toy_are_single_tokens(tokenizer):
    for word in ["user", "assistant", "\n\n", "what", " is", "read", " the", " page"]:
        assert len(tokenizer.encode(word)) == 1, word
    assert tokenizer.encode("K7Q2") == list(b"K7Q2")       # and a page's characters are tokens of their own


def test_user_text_never_becomes_a_special_token(tokenizer):
    text = "".join(tokenizer.special) + "<image>"
    first = min(tokenizer.special.values())
    assert all(i < first for i in tokenizer.encode(text)) and tokenizer.decode(tokenizer.encode(text)) == text
    tokens, _ = encode_chat([Turn("user", [IMAGE, text])], tokenizer, [3])
    plain, _ = encode_chat([Turn("user", [IMAGE, "x"])], tokenizer, [3])
    assert (tokens >= first).sum() == (plain >= first).sum() and (tokens == IMAGE).sum() == 3


def test_a_data_sets_own_marker_becomes_an_image_position():
    assert split_images("<image>\nQ") == [IMAGE, "\nQ"]
    assert split_images("a<|image|>b <image>") == ["a", IMAGE, "b ", IMAGE]
    assert split_images("no < image > here") == ["no < image > here"] and split_images("") == []


def test_encode_chat_is_llama3s_format_with_labels_on_answers_only(tokenizer):
    turns = [Turn("user", [IMAGE, "Q1", IMAGE]), Turn("assistant", ["A1"]), Turn("user", ["Q2"]), Turn("assistant", ["A2"])]
    tokens, labels = encode_chat(turns, tokenizer, [2, 1])
    s = {name: tokenizer.special[f"<|{name}|>"] for name in ["begin_of_text", "start_header_id", "end_header_id", "eot_id"]}
    words = tokenizer.encode

    def header(role):
        return [s["start_header_id"], *words(role), s["end_header_id"], *words("\n\n")]

    expected = [(t, False) for t in [s["begin_of_text"], *header("user"), IMAGE, IMAGE, *words("Q1"), IMAGE, s["eot_id"],
                                     *header("assistant")]]
    expected += [(t, True) for t in [*words("A1"), s["eot_id"]]]
    expected += [(t, False) for t in [*header("user"), *words("Q2"), s["eot_id"], *header("assistant")]]
    expected += [(t, True) for t in [*words("A2"), s["eot_id"]]]
    assert tokens.tolist() == [t for t, _ in expected]
    assert labels.tolist() == [t if supervised else IGNORE for t, supervised in expected[1:]] + [IGNORE]
    # A prompt to be answered is the same sequence up to its answer.
    prompt, nothing = encode_chat(turns[:1], tokenizer, [2, 1])
    assert prompt.tolist() == tokens[:len(prompt)].tolist() and (nothing == IGNORE).all()


def test_prepare_gives_every_tile_its_positions(tokenizer):
    images = [Image.new("RGB", (112, 224)), Image.new("RGB", (50, 60))]
    sample = prepare(Example(images, [Turn("user", [IMAGE, IMAGE, "?"])], "k"), tokenizer, TOY)
    assert sample.pixels.shape == (4, 3, 112, 112) and (sample.tokens == IMAGE).sum() == 4 * 64
    text = prepare(Example([], [Turn("user", ["?"])], "k"), tokenizer, TOY)
    tokens, labels, pixels, lengths = pack_row([sample, text])
    assert tokens.shape == labels.shape == (1, sum(lengths)) and pixels.shape[0] == 4 and len(lengths) == 2


@pytest.mark.parametrize("kind, large", [*itertools.product(KINDS, (False, True)), ("report", True)])
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
        for _, gold in page.questions:
            assert gold in page.text
        assert sorted("".join(page.text.split())) == sorted("".join(word for _, _, word in page.words))


def test_reports_take_up_to_nine_tiles_and_their_fields_stand_apart():
    """What one reads aloud is what a reader of the cells sees: row by row, words where there is a gap."""
    rng, tiles = random.Random(0), Counter()
    for _ in range(100):
        page = drawn_page(rng, "report", True, "train")
        tiles[len(tile(draw(page), TOY)) - 1] += 1
        cells = [[" "] * page.columns for _ in range(page.rows)]
        for row, column, word in page.words:
            cells[row][column:column + len(word)] = word
            assert column // 8 == (column + len(word) - 1) // 8, f"{word} lies in two tiles"
        assert page.text.split() == [word for row in cells for word in "".join(row).split()]
    assert set(tiles) == {4, 6, 9} and min(tiles.values()) > 20


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_keeps_size_and_place(look):
    """Drawn the same each time; where it is darkest, specks apart, the clean page has ink within half a cell,
    of the same character unless they are set proportionally."""
    rng = random.Random(1)
    for page in [drawn_page(rng, kind, large, "train") for kind in KINDS for large in (False, True)]:
        image, plain = draw(page, look), draw(page)
        assert image.size == plain.size and image.mode == "RGB" and image.tobytes() == draw(page, look).tobytes()
        assert (image.tobytes() == plain.tobytes()) == (look == "clean")
        near = np.asarray(plain.convert("L").filter(ImageFilter.MinFilter(15)))[8:-8] < 128      # without its edges
        grey = image.convert("L").filter(ImageFilter.MedianFilter(3))
        local = np.asarray(grey, np.float32) - np.asarray(grey.filter(ImageFilter.BoxBlur(20)), np.float32)
        local = local[8:-8]
        assert near[local < np.quantile(local, 0.02)].mean() > 0.9
        assert draw(Page(page.kind, page.columns, page.rows), look).size == image.size      # without a word


def test_hard_pages_come_in_over_the_second_quarter_of_stage_1(tmp_path):
    write_toy_tokenizer(tmp_path / "tokenizer.model")
    tokenizer, n = Tokenizer(tmp_path), 60
    clean, hard = (ToyDocuments(1, n, 0, tokenizer, TOY, look=look) for look in ("clean", "hard"))
    same = [torch.equal(clean[i].pixels, hard[i].pixels) for i in range(n)]
    assert all(same[:15]) and 0 < sum(same[15:30]) < 15 and not any(same[30:])
    assert all(torch.equal(clean[i].tokens, hard[i].tokens) for i in range(n))


def test_hard_pages_are_the_same_pages_but_for_stage_3_which_has_reports(tmp_path):
    write_toy_tokenizer(tmp_path / "tokenizer.model")
    tokenizer, n = Tokenizer(tmp_path), 60

    def samples(stage, split, look):
        documents = ToyDocuments(stage, n, 0, tokenizer, TOY, split, look=look)
        return [documents[i] for i in range(n)]

    for stage, split in [(1, "held-out"), (2, "train"), (2, "held-out")]:
        for clean, hard in zip(samples(stage, split, "clean"), samples(stage, split, "hard")):
            assert torch.equal(clean.tokens, hard.tokens) and not torch.equal(clean.pixels, hard.pixels)
    for split in ("train", "held-out"):
        clean, hard = (max(len(s.pixels) for s in samples(3, split, look)) for look in ("clean", "hard"))
        assert clean <= 4 and hard == 10


def test_plain_text_is_what_the_patches_show():
    rng = random.Random(0)
    for page in [drawn_page(rng, kind, large, "train") for kind in [*KINDS, "report"] for large in (False, True)] + [eye_chart(rng)]:
        pixels = tile(draw(page), TOY)                                                      # (T, 3, 112, 112)
        patches = pixels.unfold(2, CELL, CELL).unfold(3, CELL, CELL)[:, 0].flatten(0, 2)    # (T * 64, CELL, CELL)
        text = plain_text(page, TOY)
        assert len(text) == len(patches)
        for i, (character, patch) in enumerate(zip(text, patches)):
            if len(pixels) > 1 and i < TOY.n_patches:
                assert character == " "     # the whole page, scaled down
            else:
                ink = np.asarray(glyph(character), np.float32) / 255 if character != " " else np.zeros((CELL, CELL))
                assert np.abs(patch.numpy() - -2 * ink).max() < 0.02, (page.kind, character)


def test_held_out_documents_are_in_equal_shares_and_open_ended():
    documents = held_out_documents(300, seed=0)
    kinds = [page.kind for page, _, _ in documents]
    assert all(kinds.count(kind) == 60 for kind in KINDS)
    assert sum(page.large for page, _, _ in documents) == 100
    symbols = [sum(c.isalnum() for c in gold) for _, _, gold in documents]
    assert np.mean(symbols) >= 3
    assert len({gold for _, _, gold in documents}) > 280, "answers repeat: they could be guessed"
    assert [d[0].text for d in documents[:20]] == [d[0].text for d in held_out_documents(20, seed=0)]
    assert [d[0].text for d in documents[:20]] != [d[0].text for d in held_out_documents(20, seed=1)]


def test_no_document_is_in_both_splits(tokenizer):
    held_out = {page.text for page, _, _ in held_out_documents(500, seed=0)}
    rng = random.Random(0)
    train = {drawn_page(rng, kind, False, "train").text for kind in KINDS for _ in range(400)}
    assert not held_out & train
    # By construction, not by chance: a page's text alone decides.
    page = Page("letter", 8, 8)
    page.write(0, (0, "TO"), (3, "X"))
    assert sum(drawn_page(random.Random(i), "form", False, "held-out").text in train for i in range(200)) == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_toy_samples_depend_on_seed_and_index_alone(tokenizer, stage):
    documents = ToyDocuments(stage, 100, 7, tokenizer, TOY)
    backwards = {i: documents[i] for i in reversed(range(0, 100, 9))}
    loader = torch.utils.data.DataLoader(documents, sampler=range(0, 100, 9), batch_size=None, num_workers=2)
    for i, sample in zip(range(0, 100, 9), loader):
        assert sample.key == backwards[i].key
        assert torch.equal(sample.tokens, backwards[i].tokens) and torch.equal(sample.pixels, backwards[i].pixels)
        assert (sample.labels != IGNORE).any()
        assert (len(sample.pixels) == 0) == (stage == 0)
    other = ToyDocuments(stage, 100, 8, tokenizer, TOY)
    assert any(not torch.equal(documents[i].tokens, other[i].tokens) for i in range(5))


def test_edit_distance():
    for a, b, distance in [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2),
                           ("abc", "abc", 0), ("ab", "ba", 2)]:
        assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_draw_command(tmp_path):
    for name, how in [("a", start), ("b", alone)]:      # whatever the seed of str's hash is
        run("-m", "toy.pages", "--draw", 10, "--seed", 3, tmp_path / name, start=how)
    rows = [json.loads(line) for line in (tmp_path / "a" / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and {"image", "prompt", "answer", "kind"} == set(rows[0])
    for row in rows:
        assert (tmp_path / "a" / row["image"]).read_bytes() == (tmp_path / "b" / row["image"]).read_bytes()
        assert Image.open(tmp_path / "a" / row["image"]).format == "PNG"
