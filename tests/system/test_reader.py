"""The reader's pages: the same every time, in no font that is kept apart, and labelled as drawn."""
import argparse
import itertools
import json
import os
import random
import re
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT, close, randomise
from connector import ConnectorConfig
from data import IGNORE, READ, Tokenizer, encode_chat
from model import AlignVLM, AlignVLMConfig, Llama, LlamaConfig
from paper.benchmarks import folder_pages, open_benchmark
from paper.metrics import METRICS
from paper.recipes import RECIPES
from plumbing.examples import IMAGE, Turn
from plumbing.runs import recorded
from plumbing.settings import InputError
from reader import encoder, lessons, llm, training, words
from reader.drawing import CHARACTERS, CLASS, SMUDGE, Page
from reader.encoder import LARGE
from reader.enlarge import POSITIONS, enlarge, enlarged
from reader.fonts import HELD_OUT, NEVER, face_paths, faces
from reader.hard.make import KINDS as HARD
from reader.hard.make import LETTERS, PAGES, changed
from reader.join import join, target, teach_align
from reader.join import scores_on as join_scores
from reader.lessons import (FOR_A_LINE, FOR_THE_NEXT_LINE, FOR_THE_REST, WEIGHTS, ReaderDocuments,
                            class_tokens, misread, mixtures, places, turns_about, write_tokenizer)
from reader.pages import KINDS, PRACTICE, SIDE, facts_in_table, held_out, write_page
from reader.quick import quicken
from reader.sheet import Sheet
from small_models import small_llama
from train import build, make_larger
from vision import SigLIP, SigLIPConfig, choose_grid, tile, tile_boxes

CONFIG = SigLIPConfig(image_size=224)


def has_fonts() -> bool:
    try:
        return bool(face_paths())
    except InputError:
        return False


# .ci/run installs them: there these tests fail without.
needs_fonts = pytest.mark.skipif(not has_fonts() and not os.environ.get("CI"),
                                 reason="not all fonts of reader/fonts.json")


def test_no_face_is_of_a_family_that_is_kept_apart():
    every = faces("train") + faces("held-out")
    assert not [f for f in every if any(f.family.lower().startswith(n.lower()) for n in NEVER)]
    assert {f.family for f in faces("held-out")} == set(HELD_OUT) and len(set(HELD_OUT)) == 12
    assert not {f.family for f in faces("train")} & set(HELD_OUT)
    assert len(faces("train")) >= 120
    assert not {f.sha256 for f in faces("train")} & {f.sha256 for f in faces("held-out")}


def test_words_say_only_what_a_page_can_show():
    rng = random.Random(0)
    text = "".join(words.anything(rng) + words.sentence(rng) + words.title(rng)
                   for _ in range(3000))
    assert set(text) <= set(CHARACTERS)


def test_each_character_is_one_token(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path)
    assert len(set(class_tokens(tokenizer))) == len(CHARACTERS) + 2
    assert tokenizer.decode(tokenizer.encode("user: £5 – é")) == "user: £5 – é"
    assert len(tokenizer.encode("user 2,100.50")) == 13 and tokenizer.stop


def test_a_mixture_tells_its_characters_and_their_order():
    sums = {round(sum(w for i, w in enumerate(WEIGHTS) if n >> i & 1), 6) for n in range(16)}
    assert len(sums) == 16 and max(sums) == 1
    classes = np.array([[CLASS["l"], 0, 0, 0], [CLASS["l"], CLASS["l"], 0, 0], [0, 0, 0, 0]])
    ids, weights = mixtures(random.Random(0), classes[None], np.arange(200), doubt=0.0)
    of_l = (weights * (ids == CLASS["l"])).sum(-1)
    np.testing.assert_allclose(of_l, [0.52, 0.78, 0], atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_a_misread_answer_has_other_tokens_of_it_and_the_same_labels(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.model")
    turns = [Turn("user", [IMAGE, READ]), Turn("assistant", ["abcdefgh" * 40]),
             Turn("user", ["what?"]), Turn("assistant", ["ijklmnop" * 40])]
    tokens, labels = encode_chat(turns, Tokenizer(tmp_path), [64])
    shares, answers = set(), torch.zeros(len(tokens), dtype=torch.bool)
    answers[1:] = (labels[:-1] != IGNORE) & (labels[1:] != IGNORE)
    assert int(answers.sum()) == 640
    for seed in range(20):
        changed = misread(random.Random(seed), tokens, labels)
        wrong = changed != tokens
        assert not wrong[~answers].any()                # neither what was asked nor an answer's end
        assert set(changed[wrong].tolist()) <= set(tokens[answers].tolist())
        shares.add(round(wrong.sum().item() / 640, 1))
    assert shares == {0.0, 0.1}


def test_larger_tiles_keep_where_a_patch_is():
    """A position that is its row, or its column, is still that, in the new patches' measure."""
    places = torch.arange(36)
    positions = enlarged(torch.stack([places // 6, places % 6], 1).float(), 10).view(10, 10, 2)
    middle = (torch.arange(10) + 0.5) * 6 / 10 - 0.5        # the centre of a new patch, in old ones
    middle = middle.clamp(0, 5)                             # beyond the outer ones nothing is known
    torch.testing.assert_close(positions[..., 0], middle[:, None].expand(10, 10))
    torch.testing.assert_close(positions[..., 1], middle.expand(10, 10))


def small_reader(folder: Path) -> AlignVLM:
    """A model with tiles of 84 pixels, saved in `folder`."""
    tokenizer = folder.parent / "tokenizer.model"
    write_tokenizer(tokenizer)
    small = SigLIPConfig(hidden_size=16, n_layers=1, n_heads=2, intermediate_size=32, image_size=84)
    llm = LlamaConfig(vocab_size=540, hidden_size=16, n_layers=1, n_heads=1, n_kv_heads=1,
                      head_dim=16, intermediate_size=32)
    model = AlignVLM(AlignVLMConfig(small, llm))
    model.init_weights()
    model.save_pretrained(folder, tokenizer, torch.float32)
    return model


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_larger_tiles_are_those_of_the_stage_1_that_is_there(tmp_path, one_process):
    """Stage 2 is of a stage 1 by its id: with another stage 1 its start is made anew, once."""
    small, large = tmp_path / "stage1", tmp_path / "stage1-large"
    make_larger(small, large)
    assert not large.exists()
    for name in "a", "b":
        model = small_reader(small)
        (small / "recipe.json").write_text(json.dumps({"id": name}))
        make_larger(small, large)
        assert recorded(large, "id") == name
        written = (large / "model.safetensors").stat().st_ino
        make_larger(small, large)
        assert (large / "model.safetensors").stat().st_ino == written
        expected = model.connector.W1.weight
        found = AlignVLM.from_pretrained(large, torch.float32).connector.W1.weight
        assert torch.equal(found, expected)


@pytest.mark.parametrize("preset, is_kept", [("reader", True), ("toy", False)])
def test_the_readers_stage_1_keeps_the_align_that_has_been_taught(tmp_path, one_process, preset,
                                                                  is_kept):
    """Another's is new, and its W2 the LLM's head."""
    model = small_reader(tmp_path / "stage0")
    args = argparse.Namespace(preset=preset, llm=None, seed=0, shard_size=None, recompute=False,
                              compile=False, offload=False, timeout=timedelta(minutes=1))
    built = build(1, tmp_path / "stage0", RECIPES[preset][1], ConnectorConfig(), args,
                  torch.device("cpu"))
    W1, W2 = (built.connector.get_parameter(f"{name}.weight").full_tensor()
              for name in ("W1", "W2"))
    assert torch.equal(W1, model.connector.W1.weight) == is_kept
    assert torch.equal(W2, model.connector.W2.weight if is_kept else model.llm.head)


def test_nothing_else_changes_with_larger_tiles(tmp_path):
    model = small_reader(tmp_path / "small")
    small = model.config.vision
    enlarge(tmp_path / "small", tmp_path / "large")
    larger = AlignVLM.from_pretrained(tmp_path / "large", torch.float32)
    assert larger.config.vision == replace(small, image_size=448)
    before, after = model.state_dict(), larger.state_dict()
    assert after[POSITIONS].shape == (32 * 32, 16)
    assert all(torch.equal(before[name], after[name]) for name in before if name != POSITIONS)


@needs_fonts
@pytest.mark.parametrize("kind", [*KINDS, *PRACTICE])
def test_a_page_is_the_same_every_time_and_answers_stand_on_it(kind):
    pages = [write_page(random.Random(f"same/{kind}"), kind, "train", CONFIG) for _ in range(2)]
    assert pages[0].text == pages[1].text and pages[0].questions == pages[1].questions
    np.testing.assert_array_equal(pages[0].draw(), pages[1].draw())
    assert set(pages[0].text) <= set(CHARACTERS) | {"\n"}
    for _, answer in pages[0].questions:
        assert answer in pages[0].text.replace("\n", " ")


@needs_fonts
def test_the_held_out_pages_are_those_that_the_code_draws():
    folder = ROOT / "reader" / "held-out"
    there = [json.loads(line) for line in (folder / "questions.jsonl").open()]
    drawn = held_out(20, 0, SigLIPConfig(image_size=SIDE))
    for row, (page, prompt, answer) in zip(there[:len(drawn)], drawn, strict=True):
        assert (row["text"], row["prompt"], row["answer"]) == (page.text, prompt, answer)
        with Image.open(folder / row["image"]) as image:
            shown = np.asarray(image.convert("RGB"), float)
        assert np.abs(shown - np.asarray(page.draw(), float)).mean() < 4       # WebP loses some


@needs_fonts
def test_a_fact_is_asked_for_once_and_stands_on_its_page():
    for i in range(40):
        page = write_page(random.Random(f"facts/{i}"), "facts", "train", CONFIG, [(1, 1)])
        prompts = [prompt for prompt, _ in page.questions]
        assert len(set(prompts)) == len(prompts)
        assert all(answer in page.text.replace("\n", " ") for _, answer in page.questions)


@needs_fonts
def test_a_cell_is_asked_for_by_its_column_and_by_what_its_row_alone_has(monkeypatch):
    written, write_row = [], Sheet.row

    def row(self, *args) -> list:
        runs = write_row(self, *args)
        written.append([run.text for run in runs])
        return runs

    monkeypatch.setattr(Sheet, "row", row)
    monkeypatch.setitem(PRACTICE, "facts", facts_in_table)
    cells, later = 0, 0
    for i in range(60):
        written.clear()         # a page may be begun more than once
        page = write_page(random.Random(f"cells/{i}"), "facts", "train", CONFIG, [(1, 1)])
        header, *rows = [texts for texts in written if " ".join(filter(None, texts)) in page.lines]
        for prompt, answer in page.questions:
            if (found := re.fullmatch(r"what stands under (.+) for (.+)\?", prompt)) is None:
                continue
            [column] = [j for j, name in enumerate(header) if name.lower() == found[1].lower()]
            # The name of its column may stand before that of the row: "parcel 3".
            named = [(j, texts) for texts in rows for j, text in enumerate(texts)
                     if text and found[2] in (text, f"{header[j].lower()} {text}")]
            assert [texts[column] for _, texts in named] == [answer]
            cells += 1
            later += named[0][0] > 0                    # its row is named by a later column
    assert cells > 30 and later > 3


@needs_fonts
@pytest.mark.parametrize("kind", ["receipt", "invoice"])
def test_what_is_bought_is_asked_for_by_its_line(kind):
    """Its price ends the line; how many there are is a whole number before."""
    form = re.compile(r"(how much is the|what does the|what is the price of|how many|what is the "
                      r"quantity of) (.+?)( cost| were ordered)?\?")
    n = Counter()
    for i in range(60):
        page = write_page(random.Random(f"goods/{i}"), kind, "train", CONFIG, [(1, 1)])
        for prompt, answer in page.questions:
            found = form.fullmatch(prompt)
            good = found and found[2]
            lines = [line for line in page.lines if good in words.GOODS and good in line.lower()]
            if not lines:           # another question, or a name that was cut
                continue
            is_number = "many" in prompt or "quantity" in prompt
            n["number" if is_number else "price"] += 1
            assert answer.isdigit() == is_number
            assert any(answer in line.split()[:-1] if is_number else line.endswith(answer)
                       for line in lines)
    assert n["number"] > 10 and n["price"] > 10


@needs_fonts
@pytest.mark.parametrize("kind", ["columns", "notes", "receipt"])
def test_a_place_is_named_by_what_stands_there_once(kind):
    n = Counter()
    for i in range(10):
        rng = random.Random(f"places/{i}")
        page = write_page(rng, kind, "train", CONFIG, [(1, 1)])
        asked = places(rng, page, 5)
        assert len(asked) <= 5
        for prompt, answer in asked:
            form, words = next((form, found[1]) for form in (*FOR_A_LINE, *FOR_THE_NEXT_LINE,
                                                             *FOR_THE_REST)
                               if (found := re.fullmatch(re.escape(form).replace(r"\{\}", "(.+)"),
                                                         prompt)))
            [at] = [at for at, line in enumerate(page.lines) if words.lower() in line.lower()]
            line = page.lines[at]
            if form in FOR_A_LINE:
                assert answer == line
            elif form in FOR_THE_NEXT_LINE:
                assert answer == page.lines[at + 1]
            else:
                assert line.endswith(answer)
                assert words.lower() in line.removesuffix(answer).lower()
            n[form] += 1
    assert len(n) > 4


def test_a_page_is_read_first_or_last_and_has_questions_enough():
    page = Page("test", 224, 224, lines=["Tea 1.50", "Bread 2.25", "Milk 3.75", "Rice 4.10"],
                questions=[("what is the total?", "7.50")])
    n = Counter()
    for i in range(200):
        turns = turns_about(random.Random(i), [page], 0.3, 0.4, 4, 3)
        prompts = [turn.parts[-1].lower() for turn in turns[::2]]
        assert [i for i, turn in enumerate(turns) if IMAGE in turn.parts] == [0]
        if prompts == [READ]:
            n["read"] += 1
            continue
        assert len(prompts) == 3 + (READ in prompts)
        n["first" if prompts[0] == READ else "last" if prompts[-1] == READ else "ask"] += 1
    assert n["read"] + n["first"] + n["last"] + n["ask"] == 200
    assert 40 < n["read"] < 80 and 60 < n["ask"] < 100 and n["first"] > 15 and n["last"] > 15
    assert len(turns_about(random.Random(0), [page], 0, 1)) == 2        # its own question alone


@pytest.fixture
def samples(tmp_path, monkeypatch):
    """samples(stage, seed, split): 200 of them, all about one page, which needs no font."""
    questions = [(f"what is number {i}?", f"it is {7 * i}") for i in range(20)]
    page = Page("test", 84, 84, lines=["some words", "on a page"], questions=questions)
    monkeypatch.setattr(lessons, "lesson_page", lambda *_, **options: page)
    write_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path)
    config = SigLIPConfig(image_size=84, max_tiles=1)

    def make(stage: int, seed: int = 0, split: str = "train") -> list:
        return [*map(ReaderDocuments(stage, 200, seed, tokenizer, config, split).__getitem__,
                     range(200))]
    return make


def test_samples_depend_on_their_seed_and_split(samples):
    kinds = [(2, 0, "train"), (2, 0, "train"), (2, 1, "train"), (2, 0, "held-out"), (3, 0, "train")]
    drawn = [[sample.tokens.tolist() for sample in samples(*kind)[:20]] for kind in kinds]
    assert drawn[0] == drawn[1]
    for other in drawn[2:]:
        assert sum(a == b for a, b in zip(drawn[0], other)) < 5


@pytest.mark.parametrize("stage, read, ask", [(1, 1.0, 0.0), (2, 0.35, 0.4), (3, 0.25, 0.6)])
def test_samples_are_read_and_asked_in_their_stages_shares(samples, stage, read, ask):
    """And what the LLM has said before is misread here and there, but never what it should say."""
    n, misread_ones = Counter(), 0
    for sample in samples(stage):
        tokens, labels = sample.tokens[1:], sample.labels[:-1]
        right = torch.where(labels == IGNORE, tokens, labels)
        misread_ones += not torch.equal(right, tokens)
        text = bytes(i for i in right.tolist() if 0 <= i < 256).decode(errors="replace")
        reads, asks = READ in text, "hat is number" in text
        n["read" if not asks else "both" if reads else "ask"] += 1
        assert "some words\non a page" in text if reads else "it is" in text
    assert n["read"] / 200 == pytest.approx(read, abs=0.1)
    assert n["ask"] / 200 == pytest.approx(ask, abs=0.1)
    assert 60 < misread_ones < 150


@needs_fonts
def test_samples_have_as_many_tiles_and_tokens_as_the_model(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path)
    one = replace(CONFIG, max_tiles=1)
    data = ReaderDocuments(3, 40, 0, tokenizer, one, tile_tokens=64)    # as the Perceiver's
    for sample in map(data.__getitem__, range(20)):
        assert len(sample.pixels) == sample.n_images <= 2
        assert (sample.tokens == IMAGE).sum() == 64 * sample.n_images


@needs_fonts
def test_pages_of_several_tiles_come_from_stage_2_on(tmp_path, monkeypatch):
    """Each has its small copy besides. The second page of a sample of two has one tile."""
    monkeypatch.setattr(lessons, "UP_TO_FOUR", {(1, 1): 0.2, (1, 2): 0.4, (3, 1): 0.4})
    write_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path)

    def tiles(stage: int, config: SigLIPConfig = LARGE) -> set[int]:
        data = ReaderDocuments(stage, 100, 0, tokenizer, config)
        return {len(s.pixels) - (s.n_images - 1) for s in map(data.__getitem__, range(12))}

    assert tiles(1) == {1}
    assert tiles(2) == tiles(3) == {1, 3, 4}
    assert tiles(3, replace(LARGE, max_tiles=2)) == {1, 3}


@needs_fonts
@pytest.mark.parametrize("degrees", [0, 7, -7])
def test_classes_name_the_characters_where_they_are_drawn(degrees):
    face = faces("train")[0]
    page = Page("test", 224, 224, degrees=degrees)
    page.put("Wide", 28, 50, face, 40, (0, 0, 0))
    classes = page.classes((0, 0, 224, 224), 224, 14).reshape(16, 16, -1)
    ink = 255 - np.asarray(page.draw()).min(-1).reshape(16, 14, 16, 14).min((1, 3))
    rows, columns = np.nonzero(classes[..., 0])
    in_order = sorted(zip(columns, rows))
    assert "".join(CHARACTERS[classes[r, c, 0] - 2] for c, r in in_order) == "Wide"
    assert all(ink[r, c] > 100 for r, c in zip(rows, columns))


@needs_fonts
def test_type_that_tiles_cannot_show_is_a_smudge():
    page = write_page(random.Random(3), "letter", "train", CONFIG, [(3, 3)])
    classes = page.all_classes(CONFIG)
    assert len(classes) == len(tile_boxes(page.width, page.height, CONFIG)) > 1
    whole, tiles = classes[0, :, 0], classes[1:, :, 0]
    assert (whole == SMUDGE).any() and (tiles > SMUDGE).sum() > (tiles == SMUDGE).sum()


def test_whole_a4_pages_are_cut_into_nine_tiles_and_the_whole():
    benchmark = open_benchmark("reader-a4")
    assert len(benchmark.rows) == 12
    for i in range(len(benchmark.rows)):
        [image] = benchmark.images(i)
        assert choose_grid(*image.size, LARGE.image_size) == (3, 3)


def test_what_is_asked_about_a_scan_stands_in_it():
    benchmark = open_benchmark("reader-scans")
    assert len(benchmark.rows) == 18 and len(benchmark.images(17)) == 1
    for read, asked in zip(benchmark.rows[::2], benchmark.rows[1::2]):
        assert read["question"] == READ != asked["question"]
        assert asked["answers"][0] in read["answers"][0]


def test_hard_pages_are_counted_by_what_is_hard_about_them():
    benchmark = open_benchmark("reader-hard")
    assert len(benchmark.rows) == 2 * (5 * len(PAGES) + 2) and len(benchmark.images(0)) == 1
    assert {row["split"] for row in benchmark.rows} == set(HARD)
    printed = {tuple(row["answers"]) for row in open_benchmark("reader-pages").rows}
    assert printed.issuperset(tuple(row["answers"]) for row in benchmark.rows
                              if row["split"] not in LETTERS)
    said = [{**row, "prediction": row["answers"][0] * (row["split"] != "askew")}
            for row in benchmark.rows]
    scores = METRICS["reader-hard"](said)
    assert scores["exact_match askew"] == 0 and scores["character_errors askew"] == 1
    assert scores["exact_match Greek"] == 1 and scores["character_errors photograph"] == 0


def test_hard_pages_are_made_again():
    """All but the letters, which need a font."""
    numbers = np.random.default_rng(0)
    for name in PAGES:
        with Image.open(ROOT / "reader" / "printed" / name) as page:
            images = changed(page, numbers)
        for kind, image in images.items():
            path = ROOT / "reader" / "hard" / f"{kind.replace(' ', '-')}-{name[:-4]}.webp"
            with Image.open(path) as there:
                there = np.asarray(there.convert("RGB"), float)
            assert np.abs(there - np.asarray(image, float)).mean() < 4     # WebP loses some


def test_pages_by_others_are_scored_aloud_and_asked():
    benchmark = open_benchmark("reader-pages")
    assert len(benchmark.rows) == 50 and len(benchmark.images(0)) == 1
    assert {row["split"] for row in benchmark.rows} <= set(KINDS)
    right = [{**row, "prediction": row["answers"][0]} for row in benchmark.rows]
    scores = METRICS["reader-pages"](right)
    assert scores["exact_match"] == 1 and scores["character_errors"] == 0
    assert scores["exact_match letter"] == 1 and np.isnan(scores["exact_match notes"])


def test_characters_are_counted_over_all_pages_and_answers_by_the_whole():
    def row(question: str, gold: str, prediction: str, kind: str) -> dict:
        return {"question": question, "answers": [gold], "prediction": prediction, "split": kind}

    rows = [row(READ, "Rye loaf\n6.50", "Rye  loaf 6.5O ", "receipt"),      # 1 of 13
            row(READ, "a" * 27, "", "letter"),                              # 27 of 27
            row("what is the total?", "6.50", "6.5", "receipt"),
            row("who signed?", "Ann  Lee", "Ann Lee\n", "letter")]
    scores = METRICS["reader-pages"](rows)
    assert scores["character_errors"] == 28 / 40 and scores["exact_match"] == 0.5
    assert scores["character_errors receipt"] == 1 / 13 and scores["exact_match receipt"] == 0
    low, high = METRICS["reader-pages"].intervals(rows)["character_errors"]
    assert low < 28 / 40 < high
    longer = METRICS["reader-pages"]([row(READ, "ab", "ab" * 4, "letter"), rows[0]])
    assert longer["character_errors"] == (6 + 1) / (2 + 13)         # it may be more than all


@pytest.mark.parametrize("line", ["[]", "{}", "{", '{"image": "a.png", "text": "a"}'])
def test_a_damaged_folder_of_pages_is_named(tmp_path, line):
    (tmp_path / "questions.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="questions.jsonl"):
        folder_pages(tmp_path)


# --------------------------------------------------------------------------------------------------
# Stage 0


def test_quick_attention_is_attention():
    """The encoder's, and the LLM's over samples of one row."""
    small = SigLIPConfig(24, 1, 3, 32, image_size=84)
    encoder_part = randomise(SigLIP(small))
    decoder = randomise(Llama(small_llama(n_heads=2, n_kv_heads=2)))
    pixels, x = torch.randn(2, 3, 84, 84), torch.randn(1, 20, decoder.config.hidden_size)
    plain = encoder_part(pixels), decoder.hidden(x, [7, 13])
    quicken(encoder_part)
    quicken(decoder)
    close(encoder_part(pixels), plain[0])
    close(decoder.hidden(x, [7, 13]), plain[1])


def test_the_encoders_lesson_has_the_pixels_that_it_will_see():
    page = Image.effect_noise((224, 224), 90).convert("RGB")
    pixels = torch.from_numpy(np.array(page))[None]
    seen = encoder.normalise(pixels, encoder.CONFIG)
    torch.testing.assert_close(seen, tile(page, encoder.CONFIG))


def test_blank_slots_count_less_in_the_encoders_loss():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 4, 9, generator=generator)
    classes = torch.randint(3, (2, 3, 4), generator=generator)
    total = weights = 0.0
    for place in itertools.product(range(2), range(3), range(4)):
        right = classes[place].item()
        weight = 1.0 if right else (0.15, 0.15, 0.08, 0.04)[place[-1]]
        total -= weight * scores[place].log_softmax(-1)[right].item()
        weights += weight
    assert encoder.loss_of(scores, classes).item() == pytest.approx(total / weights)


def test_the_llms_lesson_mixes_embeddings_where_the_image_is():
    decoder = randomise(Llama(small_llama()))
    E_text = decoder.embed_tokens.weight
    ids = torch.tensor([[3, 4], [5, 5], [6, 0]])
    weights = torch.tensor([[0.5, 0.5], [1, 0], [0.2, 0.8]])
    x = llm.embed(decoder, torch.tensor([[7, IMAGE, IMAGE, 8, IMAGE]]), ids, weights)
    expected = [E_text[7], (E_text[3] + E_text[4]) / 2, E_text[5], E_text[8],
                0.2 * E_text[6] + 0.8 * E_text[0]]
    close(x[0], torch.stack(expected))


def test_a_held_out_page_is_read_from_its_question_alone(tmp_path):
    """Not from the first token of what it should say."""
    write_tokenizer(tmp_path / "tokenizer.model")
    tokenizer, golds, lengths, samples = Tokenizer(tmp_path), ["a page", "more"], [], []
    for gold in golds:
        asked = [Turn("user", [IMAGE, READ])]
        lengths.append(len(encode_chat(asked, tokenizer, [3])[0]))
        answered = [*asked, Turn("assistant", [gold]), Turn("user", ["?"]),
                    Turn("assistant", ["!"])]
        samples.append((*encode_chat(answered, tokenizer, [3]), np.ones((3, 2), int),
                        np.full((3, 2), 0.5, np.float32)))
    decoder, prompts = Llama(small_llama(vocab_size=len(tokenizer))), []
    decoder.generate = lambda x, lengths, *_: prompts.append(lengths) or iter([])
    batch = lessons.packed(samples)
    assert llm.read_aloud(decoder, tokenizer, batch) == (["", ""], golds)
    assert prompts == [lengths]


def test_what_is_measured_of_the_encoders_lesson(monkeypatch):
    """Of four patches: all right; the second character wrong; a smudge for a letter; blank."""
    classes = torch.tensor([[[5, 6, 0, 0], [5, 6, 7, 0], [5, 0, 0, 0], [0, 0, 0, 0]]])
    found = torch.tensor([[[5, 6, 0, 0], [5, 9, 7, 0], [1, 0, 0, 0], [0, 0, 0, 0]]])
    scores = torch.nn.functional.one_hot(found, 12).float()
    monkeypatch.setattr(encoder, "character_scores", lambda modules, pixels: scores)
    held_out = torch.zeros(1, 28, 28, 3, dtype=torch.uint8), classes
    assert encoder.scores_on(None, held_out) == pytest.approx(
        {"first": 2 / 3, "patch": 1 / 3, "characters": 4 / 6, "blank": 1})


def test_what_is_measured_of_aligns_lesson():
    """The likeliest token of a patch with print, but for the blank one, is its first character."""
    classes = torch.tensor([[[5, 6, 0, 0], [5, 0, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0]]])
    P = torch.tensor([[[0.6, 0, 0, 0, 0, 0.3, 0.1, 0], [0, 0, 0, 0, 0, 0.9, 0.1, 0],
                       [0.6, 0, 0, 0, 0, 0.3, 0, 0.1], [0.2, 0, 0, 0, 0, 0.8, 0, 0]]])
    model = SimpleNamespace(vision=lambda pixels: pixels,
                            connector=SimpleNamespace(p_vocab=lambda F: P.clone()))
    pixels = torch.zeros(1, 28, 28, 3, dtype=torch.uint8)
    found = join_scores(model, (pixels, classes), torch.arange(8), lambda *_: torch.tensor(1.5))
    assert found == pytest.approx({"held_out": 1.5, "first": 2 / 3})


def test_align_is_taught_the_mixtures_that_the_llm_can_read():
    classes, tokens = np.random.default_rng(0).integers(0, 9, (20, 4)), np.arange(100, 300)
    found = []
    for ids, weights in (target(torch.from_numpy(classes)[None], torch.from_numpy(tokens)),
                         mixtures(random.Random(0), classes[None], tokens, doubt=0.0)):
        places, shares = (torch.as_tensor(x).reshape(20, -1) for x in (ids, weights))
        found.append(torch.zeros(20, 300).scatter_add(1, places, shares))
    torch.testing.assert_close(*found)


def test_the_rate_of_a_lesson_rises_stays_and_falls():
    """Over 100 steps, to the last 3 of 10, and along a cosine to a fiftieth."""
    rates = [training.learning_rate(step, 2000, 4.0) for step in (0, 49, 99, 1400, 1700, 2000)]
    assert rates == pytest.approx([0.04, 2, 4, 4, 2.04, 0.08])


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def test_a_lesson_that_was_killed_goes_on_as_if_it_had_not(tmp_path):
    """With Adam's moments, and at the step after the last state."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 3, generator=generator),) for _ in range(12)]
    parser = argparse.ArgumentParser()
    training.add_flags(parser, "", 12)
    found = []
    for kills in ([], [5, 5]):         # after the states of 4 and of 8 steps
        flags = ["--out", str(tmp_path / str(len(kills))), "--workers", "0", "--save-every", "2"]
        for kill in [*kills, None]:
            torch.manual_seed(1)
            modules, steps = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2)}), []

            def loss(x):
                steps.append(x)
                if len(steps) == kill:
                    raise KeyboardInterrupt
                return modules["a"](x).square().mean()

            try:
                training.train(modules, data, loss, dict, (0.9, 0.95), 0.1,
                               parser.parse_args(flags))
            except KeyboardInterrupt:
                assert kill
        found.append(modules["a"].weight)
    assert len(steps) == 4 and torch.equal(*found)


def test_a_state_that_is_not_written_to_its_end_leaves_the_one_before(tmp_path, monkeypatch):
    modules = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2)})
    optimizer = torch.optim.AdamW(modules.parameters())
    modules["a"](torch.ones(3)).sum().backward()
    optimizer.step()
    path = tmp_path / "state.safetensors"
    training.save_state(path, modules, optimizer, {"step": 1})

    def killed(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        training.save_state(path, modules, optimizer, {"step": 2})
    assert training.load_state(path, modules, optimizer) == {"step": 1}


@needs_fonts
def test_stage0s_lessons_go_on_and_are_joined(tmp_path):
    """Two steps of each. The readout is left behind, W2 is the LLM's head, and Align's lesson
    changes the encoder and the connector alone."""
    few = ["--workers", "0", "--log-every", "1", "--threads", str(torch.get_num_threads())]
    lessons = [(encoder, "encoder", ["--batch-size", "2", "--eval-every", "2"]),
               (llm, "llm", ["--tokens", "1500"])]
    for lesson, name, more in lessons:
        for steps in ("1", "2"):
            flags = ["--out", str(tmp_path / name), "--steps", steps, *few, *more]
            lesson.train(lesson.parse_args(flags))
        assert [row["step"] for row in log_of(tmp_path / name)] == [1, 2]
    assert {"first", "patch", "characters", "blank"} <= log_of(tmp_path / "encoder")[-1].keys()

    model, tokenizer = join(tmp_path)
    assert torch.equal(model.connector.W2.weight, model.llm.head)
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("encoder", "llm")]
    learnt = states[0] | states[1]
    for name, tensor in model.state_dict().items():
        assert name.startswith("connector") or torch.equal(tensor, learnt[name])

    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parser = argparse.ArgumentParser()
    training.add_flags(parser, str(tmp_path / "connector"), 2)
    teach_align(model, tokenizer, parser.parse_args([*few, "--eval-every", "2"]))
    moved = {key.split(".")[0] for key, tensor in model.state_dict().items()
             if not torch.equal(tensor, before[key])}
    assert moved == {"vision", "connector"}
    assert {"held_out", "first"} <= log_of(tmp_path / "connector")[-1].keys()
