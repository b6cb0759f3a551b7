"""Patches back on the page, tokens made legible, and P_vocab over many pages."""
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import connector
from conftest import close, randomise
from connector import AlignTopK, spread
from data import Tokenizer
from model import ALIGNVLM_PRESETS, AlignVLM
from paper import patch_tokens
from paper.patch_tokens import CELL
from plumbing.settings import InputError
from toy.pages import write_toy_tokenizer
from vision import SigLIPConfig, tile, tile_boxes

# 7 patches a side, and 2 pixels that no patch sees.
ODD = SigLIPConfig(image_size=100, patch_size=14)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_toy_tokenizer(path)
    return Tokenizer(path)


def vlm(seed=0) -> AlignVLM:
    return randomise(AlignVLM(ALIGNVLM_PRESETS["toy"]), seed).eval()


def ink_reader(config, V=542, dark=ord("A"), light=ord("7")):
    """A model whose connector maps a dark patch surely to the token `dark`, others to `light`."""
    class Ink(nn.Module):
        def p_vocab(self, F):                                   # (n, 1)
            P = torch.zeros(len(F), V)
            is_dark = F[:, 0] < 0.5
            P[is_dark, dark] = 1.0
            P[~is_dark, light] = 1.0
            return P

    def vision(pixels):     # (T, 3, S, S) -> brightness from 0 to 1 (T, N, 1)
        side, patch = config.patches_per_side, config.patch_size
        seen = pixels.mean(1)[:, :side * patch, :side * patch]
        x = seen * config.image_std + config.image_mean
        return x.view(len(x), side, patch, side, patch).mean((2, 4)).view(len(x), -1, 1)

    llm = types.SimpleNamespace(embed_tokens=nn.Embedding(V, 4))
    return types.SimpleNamespace(connector=Ink(), llm=llm, vision=vision,
                                 config=types.SimpleNamespace(vision=config))


# -------------------------------------------------------------------------------------------------
# --explain


@pytest.mark.parametrize("config", [ODD, SigLIPConfig(image_size=112)])
@pytest.mark.parametrize("size", [(100, 100), (224, 112), (333, 517), (90, 40), (61, 300),
                                  (700, 655), (3, 400), (1, 1)])
def test_a_patch_lies_where_its_pixels_come_from(config, size):
    """A page whose colours say where they are, cut by `tile` itself.

    What a patch sees names its place.
    """
    width, height = size
    y, x = np.indices((height, width))
    colours = np.stack([255 * x // width, 255 * y // height, 0 * x], -1)
    page = Image.fromarray(colours.astype(np.uint8))
    patch, side = config.patch_size, config.patches_per_side
    pixels = tile(page, config).numpy() * config.image_std + config.image_mean
    seen = 0
    for canvas, box in zip(pixels, tile_boxes(width, height, config)):
        there = canvas[2] < 0.25                                # no blue: page, not mid-grey canvas
        longest = max(box[2] - box[0], box[3] - box[1])
        step = longest / config.image_size                      # page pixels to a canvas pixel
        for i, (left, top, right, bottom) in enumerate(patch_tokens.patch_boxes(box, config)):
            row, column = (i // side) * patch, (i % side) * patch
            here = np.s_[row:row + patch, column:column + patch]
            assert box[0] <= left <= right <= box[2] and box[1] <= top <= bottom <= box[3]
            assert (right > left and bottom > top) == there[here].any()
            if not there[here].any():
                continue
            seen += 1
            for colour, start, stop, whole in (0, left, right, width), (1, top, bottom, height):
                mean = canvas[colour][here][there[here]].mean() * whole     # of x or y in the patch
                middle = mean + 0.5 - whole / 512
                assert abs(middle - (start + stop) / 2) <= 0.6 * max(step, 1) + whole / 255
    assert seen


@pytest.mark.parametrize("size", [(112, 112), (224, 112), (84, 112), (336, 252)])
def test_every_token_is_drawn_over_its_patch(tokenizer, tmp_path, size):
    """Each black or white patch of a page is mapped to a letter or a digit.

    The picture is blue or orange there.
    """
    config = SigLIPConfig(image_size=112)
    black = np.random.default_rng(0).random((size[1] // 14, size[0] // 14)) < 0.5
    pixels = np.kron(~black, np.ones((14, 14))).astype(np.uint8) * 255
    page = Image.fromarray(pixels).convert("RGB")
    boxes, model = tile_boxes(*size, config), ink_reader(config)
    ids, p = patch_tokens.likeliest_tokens(model, tile(page, config))
    tiles = slice(1, None) if len(boxes) > 1 else slice(0, 1)
    named = {i: patch_tokens.legible(tokenizer, i) for i in ids.unique().tolist()}
    panel = patch_tokens.panel(page, boxes[tiles], ids[tiles], p[tiles], named, config)
    picture = np.asarray(panel).astype(int)
    assert picture.shape == (*(CELL * side // 14 for side in size[::-1]), 3)
    for (row, column), dark in np.ndenumerate(black):
        corner = picture[row * CELL + 6, column * CELL + 6]         # beside the token
        assert (corner[2] > corner[0]) == dark, (row, column)
    patch_tokens.draw_tokens(model, tokenizer, page, tmp_path / "tokens.png", title="page")
    with Image.open(tmp_path / "tokens.png") as drawn:
        assert drawn.width > picture.shape[1] and drawn.height > picture.shape[0]
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.png"]


def test_opacity_is_the_probability():
    page, box = Image.new("RGB", (112, 112), "white"), (0, 0, 112, 112)
    ids = torch.zeros(1, 64, dtype=torch.long)
    opacity = torch.linspace(0, 1, 64)[None]
    panel = patch_tokens.panel(page, [box], ids, opacity, {0: ("a", "letters")},
                               SigLIPConfig(image_size=112))
    picture = np.asarray(panel)
    red = [int(picture[i // 8 * CELL + 6, i % 8 * CELL + 6, 0]) for i in range(64)]
    assert red[0] == 255 and red == sorted(red, reverse=True) and len(set(red)) > 30


@pytest.mark.parametrize("size", [(1, 1), (3, 4000), (2500, 40)])
def test_pages_of_any_shape_are_drawn(tokenizer, tmp_path, size):
    page = Image.new("RGB", size, "grey")
    patch_tokens.draw_tokens(vlm(), tokenizer, page, tmp_path / "tokens.png")
    with Image.open(tmp_path / "tokens.png") as drawn:
        assert drawn.width * drawn.height < 2 * patch_tokens.MAX_PIXELS


def test_of_a_connector_with_few_tokens_these_are_named():
    model = vlm()
    W2, chosen = model.connector.W2.weight, torch.tensor([7, 300, 41])
    pixels = torch.randn(1, 3, 112, 112)
    model.connector = AlignTopK(model.connector, chosen, *spread(W2))
    ids, p = patch_tokens.likeliest_tokens(model, pixels)
    with torch.no_grad():
        expected = model.connector.p_vocab(model.vision(pixels))                # (1, N, 3)
    assert torch.equal(ids, chosen[expected.argmax(-1)])
    close(p, expected.amax(-1))


def test_no_tokens_is_one_line(tokenizer, tmp_path):
    model, page = vlm(), Image.new("RGB", (30, 30))
    model.connector = nn.Linear(3, 3)
    with pytest.raises(InputError, match="Linear maps patches to no tokens"):
        patch_tokens.draw_tokens(model, tokenizer, page, tmp_path / "tokens.png")
    with pytest.raises(InputError, match="tokens.jpg: the picture is a PNG"):
        patch_tokens.draw_tokens(vlm(), tokenizer, page, tmp_path / "tokens.jpg")
    assert not list(tmp_path.iterdir())


def test_legible(tokenizer):
    said = {
        b"a": ("a", "letters"), b"7": ("7", "digits"), b"/": ("/", "punctuation"),
        b" ": ("space", "white space"), b"\n": ("line end", "white space"),
        b"\xe4": ("0xE4", "bytes and special tokens"), b"\x07": ("U+0007", "punctuation")}
    for token, expected in said.items():
        i = tokenizer.pairs.encoding.encode_single_token(token)
        assert patch_tokens.legible(tokenizer, i) == expected
    begin = patch_tokens.legible(tokenizer, tokenizer.special["<|begin_of_text|>"])
    assert begin == ("begin of text", "bytes and special tokens")
    vocabulary = [" the", "   ", "\n\n\t", " café", "中a", "--", " 12"]
    bytes_of = {i: token.encode() for i, token in enumerate(vocabulary)}
    pairs = types.SimpleNamespace(token_bytes=lambda i: bytes_of.get(i, b""))
    other = types.SimpleNamespace(special={}, pairs=pairs)
    assert [patch_tokens.legible(other, i)[0] for i in range(8)] == [
        "·the", "3 spaces", "2 line ends, tab", "·cafe", "U+4E2Da", "--", "·12", "#7"]
    for text in ["a", "·international", "3 spaces", "U+4E2DU+4E2DU+4E2D", "x" * 200]:
        size, lines = patch_tokens.fit(text, 46, 48, 26)
        left, top, right, bottom = patch_tokens.RULER.multiline_textbbox(
            (0, 0), lines, font=patch_tokens.font(size), spacing=1)
        assert right - left <= 46 and bottom - top <= 48 and size >= 8


# -------------------------------------------------------------------------------------------------
# --vocab


def report_pages():
    """Of 1, 3 and 2 tiles, with blank patches of several colours."""
    torch.manual_seed(0)
    pages = [torch.randn(T, 3, 112, 112) for T in (1, 3, 2)]
    pages[0][:, :, :14, 14:42] = torch.tensor([0.0, 1.0, -1.0]).view(1, 3, 1, 1)
    pages[1][1:, :, 28:70, 28:98] = 0.5
    return pages


def blank_by_hand(pages):
    """Which patches are of one colour, one after another (T * N,)."""
    blank = []
    for page in pages:
        for image in page:
            for i in range(64):
                row, column = i // 8 * 14, i % 8 * 14
                patch = image[:, row:row + 14, column:column + 14]
                blank.append(all(len(channel.unique()) == 1 for channel in patch))
    return torch.tensor(blank)


def test_averages_are_those_of_all_p_vocab_at_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(connector, "BLOCK_BYTES", 12 * 542 * 48)       # 48 patches a block
    model, pages = vlm(), report_pages()
    report = patch_tokens.vocab_report(model, tokenizer, pages, tmp_path / "vocab.png")
    with torch.no_grad():
        each = [model.connector.p_vocab(model.vision(page)).flatten(0, 1) for page in pages]
    P = torch.cat(each).double()
    mean, order = P.mean(0).sort(descending=True)
    blank = blank_by_hand(pages)
    assert 0 < blank.sum() == report["blank_patches"] == 2 + 2 * 15
    assert report["patches"] == len(P) == 6 * 64
    assert report["highest_probability"] == pytest.approx(mean[0].item(), rel=1e-5)
    assert [row["id"] for row in report["likeliest"]] == order[:20].tolist()
    for share, key in (0.9, "tokens_for_90"), (0.99, "tokens_for_99"):
        n = report[key]
        assert mean[:n].sum() >= share > mean[:n - 1].sum()
    taken = torch.bincount(P[blank].argmax(-1), minlength=542)
    expected = {i: taken[i].item() for i in taken.nonzero()[:, 0].tolist()}
    assert {row["id"]: round(row["patches"] * 32) for row in report["blank"]} == expected
    for row in report["blank"]:
        probability = P[blank][:, row["id"]].mean().item()
        assert row["probability"] == pytest.approx(probability, rel=1e-5)
        assert row["token"] == patch_tokens.legible(tokenizer, row["id"])[0]
    assert json.loads((tmp_path / "vocab.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vocab.json", "vocab.png"]
    with Image.open(tmp_path / "vocab.png") as drawn:
        assert drawn.width > 1000 and len(drawn.convert("RGB").getcolors(2 ** 24)) > 50


@pytest.mark.parametrize("V, D, K", [(5000, 12, 40), (300, 33, 17), (50, 64, 50)])
def test_principal_components_are_numpys(V, D, K):
    torch.manual_seed(V)
    E_text = torch.randn(V, D) * torch.linspace(3, 0.3, D) + torch.randn(D)
    kept = torch.randperm(V)[:K]
    points, own, best = patch_tokens.principal_components(E_text, kept)
    E = E_text.double().numpy()
    E = E - E.mean(0)
    _, s, axes = np.linalg.svd(E, full_matrices=False)
    expected = torch.from_numpy(E @ axes[:2].T).float()
    close(points.abs(), expected.abs(), 1e-4)                  # an axis has no sign
    n = patch_tokens.COMPONENTS
    few = E[kept.numpy()] - E[kept.numpy()].mean(0)
    theirs = np.linalg.svd(few, full_matrices=False)[2][:n]
    assert own == pytest.approx(((E @ theirs.T) ** 2).sum() / (E ** 2).sum(), abs=1e-4)
    assert best == pytest.approx((s[:n] ** 2).sum() / (s ** 2).sum(), abs=1e-4)
    assert own <= best + 1e-6


def test_no_pages_and_no_matplotlib_are_one_line(tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "vocab.png"
    with pytest.raises(InputError, match="no pages"):
        patch_tokens.vocab_report(vlm(), tokenizer, [], out)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        patch_tokens.vocab_report(vlm(), tokenizer, report_pages(), out)
    assert not list(tmp_path.iterdir())


def test_a_file_that_vocab_has_not_written_is_refused(tmp_path):
    picture, report = tmp_path / "vocab.png", tmp_path / "vocab.json"
    patch_tokens.refuse_foreign_report(picture)
    report.write_text('{"hello": 0, "!": 1}')          # a tokenizer's
    with pytest.raises(InputError, match="vocab.json: is not from --vocab"):
        patch_tokens.refuse_foreign_report(picture)
    report.write_text('{"tokens_for_99": 3}')
    patch_tokens.refuse_foreign_report(picture)
    report.rename(tmp_path / "kept.json")
    picture.write_bytes(b"mine")
    with pytest.raises(InputError, match="vocab.png: without a vocab.json"):
        patch_tokens.refuse_foreign_report(picture)
