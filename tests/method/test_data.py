"""data.py: chat format and packed rows against hand-written expectations, and against the model."""
import random

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import close, randomise
from data import Sample, Tokenizer, encode_chat, fill_rows, pack_row, prepare
from model import ALIGNVLM_PRESETS, IGNORE, AlignVLM
from plumbing.examples import IMAGE, BadSample, Example, Turn
from small_tokenizers import tokenizer  # noqa: F401: a fixture
from vision import SIGLIP_PRESETS, tile

SO400M = SIGLIP_PRESETS["so400m-patch14-384"]
TOY = SIGLIP_PRESETS["toy"]


# --------------------------------------------------------------------------------------------------
# Chat format


def test_user_text_never_becomes_a_special_token(tokenizer):
    text = "".join(tokenizer.special) + "<image>"
    first = min(tokenizer.special.values())
    ids = tokenizer.encode(text)
    assert all(i < first for i in ids) and tokenizer.decode(ids) == text
    tokens, _ = encode_chat([Turn("user", [IMAGE, text])], tokenizer, [3])
    plain, _ = encode_chat([Turn("user", [IMAGE, "x"])], tokenizer, [3])
    assert (tokens >= first).sum() == (plain >= first).sum() and (tokens == IMAGE).sum() == 3


def test_encode_chat_is_llama3s_format_with_labels_on_answers_only(tokenizer):
    turns = [Turn("user", [IMAGE, "Q1", IMAGE]), Turn("assistant", ["A1"]),
             Turn("user", ["Q2"]), Turn("assistant", ["A2"])]
    tokens, labels = encode_chat(turns, tokenizer, [2, 1])
    begin = tokenizer.special["<|begin_of_text|>"]
    start = tokenizer.special["<|start_header_id|>"]
    end = tokenizer.special["<|end_header_id|>"]
    eot = tokenizer.special["<|eot_id|>"]
    ids = tokenizer.encode

    def header(role):
        return [start, *ids(role), end, *ids("\n\n")]

    question = [begin, *header("user"), IMAGE, IMAGE, *ids("Q1"), IMAGE, eot, *header("assistant")]
    answer = [*ids("A1"), eot]
    question_2 = [*header("user"), *ids("Q2"), eot, *header("assistant")]
    answer_2 = [*ids("A2"), eot]
    assert tokens.tolist() == question + answer + question_2 + answer_2
    learnt = ([IGNORE] * len(question) + answer + [IGNORE] * len(question_2) + answer_2)
    assert labels.tolist() == learnt[1:] + [IGNORE]
    # A prompt to be answered is the same sequence up to its answer.
    prompt, nothing = encode_chat(turns[:1], tokenizer, [2, 1])
    assert prompt.tolist() == question and (nothing == IGNORE).all()


# --------------------------------------------------------------------------------------------------
# Samples


def test_prepare_gives_every_tile_its_positions(tokenizer):
    images = [Image.new("RGB", (112, 224)), Image.new("RGB", (50, 60))]
    example = Example(images, [Turn("user", [IMAGE, IMAGE, "?"])], "k")
    sample = prepare(example, tokenizer, TOY)
    assert sample.pixels.shape == (4, 3, 112, 112) and (sample.tokens == IMAGE).sum() == 4 * 64
    assert (prepare(example, tokenizer, TOY, tile_tokens=16).tokens == IMAGE).sum() == 4 * 16
    text = prepare(Example([], [Turn("user", ["?"])], "k"), tokenizer, TOY)
    tokens, labels, pixels, lengths = pack_row([sample, text], TOY)
    assert tokens.shape == labels.shape == (1, sum(lengths))
    assert pixels.shape[0] == 4 and len(lengths) == 2


def test_pixels_are_bytes_until_a_row_is_packed(tokenizer):
    """Ten tiles of 384 pixels take 4.4 MB; the row's are those of `tile`, in their order."""
    samples = []
    for images in ([noise(850, 1100)], [], [noise(50, 90), noise(333, 257)]):
        turns = [Turn("user", [IMAGE] * len(images) + ["?"])]
        samples.append((images, prepare(Example(images, turns, ""), tokenizer, SO400M)))
    assert [s.pixels.nbytes for _, s in samples] == [4_423_680, 0, 884_736]
    _, _, pixels, _ = pack_row([s for _, s in samples], SO400M)
    expected = torch.cat([tile(image, SO400M) for images, _ in samples for image in images])
    assert torch.equal(pixels, expected)


def test_a_long_sample_loses_text_and_never_an_image(tokenizer):
    images = [Image.new("RGB", (112, 112)), Image.new("RGB", (112, 224))]
    turns = [Turn("user", [IMAGE, "Q" * 30]), Turn("assistant", ["A" * 30]),
             Turn("user", [IMAGE]), Turn("assistant", ["B" * 30])]
    example = Example(images, turns, "")
    visual = 4 * 64
    whole = prepare(example, tokenizer, TOY)
    tokens, labels = encode_chat(turns, tokenizer, [64, 192])
    assert torch.equal(whole.tokens, tokens) and torch.equal(whole.labels, labels)
    whole_text = whole.tokens[whole.tokens != IMAGE]
    for room in (len(whole_text) + 1, len(whole_text), len(whole_text) - 10, 45):
        for limits in ({"max_text": room}, {"max_tokens": room + visual}):
            sample = prepare(example, tokenizer, TOY, **limits)
            is_visual = sample.tokens == IMAGE
            assert is_visual.sum() == visual and torch.equal(sample.pixels, whole.pixels)
            assert torch.equal(sample.tokens[~is_visual], whole_text[:room])
            kept = (tokens == IMAGE) | ((tokens != IMAGE).cumsum(0) <= room)
            assert torch.equal(sample.labels, labels[kept])
            assert (sample.labels != IGNORE).any()
    for limits in ({"max_text": 30}, {"max_tokens": visual - 1}, {"max_tokens": visual + 30}):
        with pytest.raises(BadSample) as bad:       # no answer is left
            prepare(example, tokenizer, TOY, **limits)
        assert bad.value.args[0] == "too long"


@pytest.mark.parametrize("n_images", [0, 1, 3])
def test_places_without_an_image_and_images_without_a_place_are_refused(tokenizer, n_images):
    images = [Image.new("RGB", (50, 50))] * n_images
    turns = [Turn("user", [IMAGE, "and", IMAGE]), Turn("assistant", ["A"])]
    with pytest.raises(ValueError, match=f"2 places for {n_images} images"):
        prepare(Example(images, turns, ""), tokenizer, TOY)


def test_an_answer_that_is_not_learnt_is_read_all_the_same(tokenizer):
    """Nor is its end-of-turn token; the other answer is, as if nothing had changed."""
    turns = [Turn("user", ["?"]), Turn("assistant", ["first"]),
             Turn("user", ["?"]), Turn("assistant", ["second"])]
    tokens, labels = encode_chat(turns, tokenizer, [])
    turns[1].is_learnt = False
    same_tokens, fewer = encode_chat(turns, tokenizer, [])
    assert torch.equal(tokens, same_tokens)
    learnt = [int(i) for i in fewer[fewer != IGNORE]]
    assert learnt == tokenizer.encode("second") + [tokenizer.special["<|eot_id|>"]]
    n_first = len(tokenizer.encode("first")) + 1
    assert (labels != IGNORE).sum() == (fewer != IGNORE).sum() + n_first


# --------------------------------------------------------------------------------------------------
# Rows


@pytest.fixture(scope="module")
def model() -> AlignVLM:
    return randomise(AlignVLM(ALIGNVLM_PRESETS["toy"])).eval()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mixed_samples(tokenizer: Tokenizer, word: str = "K7Q2", seed: int = 0) -> list[Sample]:
    """One tile; several; text alone; two images; short text alone. word and seed change the second
    one, and not its length."""
    examples = [
        ([noise(50, 90)], [IMAGE, "what?"], "A1"),
        ([noise(112, 224, seed)], [IMAGE, word], word + "."),
        ([], ["a question of text alone " * 3], "yes"),
        ([noise(30, 30), noise(200, 112)], [IMAGE, "or", IMAGE], "no"),
        ([], ["?"], "!"),
    ]
    samples = []
    for images, asked, told in examples:
        turns = [Turn("user", asked), Turn("assistant", [told])]
        samples.append(prepare(Example(images, turns, ""), tokenizer, TOY))
    return samples


def logits_of(model: AlignVLM, samples: list[Sample]) -> tuple[torch.Tensor, ...]:
    """(L_i, V) of each sample, all of them in one row."""
    tokens, _, pixels, lengths = pack_row(samples, TOY)
    h = model.llm.hidden(model.embed(tokens, pixels), lengths)          # (1, L, D)
    return model.llm.logits(h)[0].split(lengths)


def gradients_of_rows(model: AlignVLM, rows: list[list[Sample]]) -> tuple[float, dict]:
    """The loss of all rows together, and its gradients by parameter."""
    model.zero_grad()
    loss = sum(model(*pack_row(row, TOY)) for row in rows)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_packed_equals_one_by_one(model, tokenizer):
    samples = mixed_samples(tokenizer)
    assert len({len(s.tokens) for s in samples}) == 5
    assert [len(s.pixels) for s in samples] == [1, 3, 0, 4, 0]
    with torch.no_grad():
        for ours, sample in zip(logits_of(model, samples), samples):
            close(ours, logits_of(model, [sample])[0])
    packed_loss, packed = gradients_of_rows(model, [samples])
    single_loss, single = gradients_of_rows(model, [[sample] for sample in samples])
    assert packed_loss == pytest.approx(single_loss, rel=1e-5)
    largest = max(g.abs().max().item() for g in single.values())
    for name, g in single.items():          # a bias of keys has no gradient but rounding errors
        close(packed[name], g, scale=max(g.abs().max().item(), 1e-3 * largest))


def test_a_sample_sees_nothing_of_its_neighbours(model, tokenizer):
    with torch.no_grad():
        before = logits_of(model, mixed_samples(tokenizer))
        after = logits_of(model, mixed_samples(tokenizer, word="ABCD", seed=1))
    for i, (a, b) in enumerate(zip(before, after)):
        if i == 1:
            assert (a - b).abs().max() > 1e-2
        else:
            assert torch.equal(a, b), i


def test_rows_hold_every_sample_and_no_more_than_their_budget():
    rng = random.Random(0)
    filled = []
    for _ in range(20):
        lengths = [729 * rng.randint(1, 10) + rng.randint(20, 400) for _ in range(64)]
        samples = [Sample(torch.zeros(n), None, None, None, str(i)) for i, n in enumerate(lengths)]
        rows = fill_rows(samples, 16_384)
        used = [sum(len(s.tokens) for s in row) for row in rows]
        assert max(used) <= 16_384
        assert sorted(s.key for row in rows for s in row) == sorted(s.key for s in samples)
        filled.append(sum(used) / (16_384 * len(rows)))
    print(f"rows are filled to {np.mean(filled):.1%}")
    assert np.mean(filled) >= 0.95
    assert fill_rows([], 16_384) == []
    halves = [Sample(torch.zeros(8192), None, None, None, "") for _ in range(4)]
    assert [len(row) for row in fill_rows(halves, 16_384)] == [2, 2]        # to the last token
