"""vision.py against its equations, and tiling against test vectors and a naive version."""
import functools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import ROOT, close, randomise
from small_models import FEATURES, SIGLIPS, close_gradients, gradients_of
from vision import (SIGLIP_PRESETS, SigLIP, SigLIPConfig, choose_grid, coverage, cut, tile,
                    tile_boxes)

SO400M = SIGLIP_PRESETS["so400m-patch14-384"]
TOY = SIGLIP_PRESETS["toy"]


# ------------------------------------------------------------------------------------------------
# The encoder


def naive_layer_norm(x: Tensor, p: dict[str, Tensor], name: str, eps: float) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def naive_linear(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def naive_attention(config: SigLIPConfig, p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x (N, d) -> (N, d): head by head, and patch by patch over all patches."""
    q, k, v = [naive_linear(x, p, f"{name}.{which}_proj") for which in "qkv"]
    size = config.hidden_size // config.n_heads
    heads = []
    for head in range(config.n_heads):
        columns = slice(head * size, (head + 1) * size)
        mixed = []
        for i in range(len(x)):
            e = (k[:, columns] @ q[i, columns] / size ** 0.5).exp()
            mixed.append((e / e.sum()) @ v[:, columns])
        heads.append(torch.stack(mixed))                            # (N, d / heads)
    return naive_linear(torch.cat(heads, dim=-1), p, f"{name}.out_proj")


def naive_siglip(config: SigLIPConfig, p: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    """One tile (3, S, S) -> the embeddings and each layer's output, and last F (N, d)."""
    side, size, eps = config.patches_per_side, config.patch_size, config.layer_norm_eps
    kernel, bias = p["embeddings.patch_embedding.weight"], p["embeddings.patch_embedding.bias"]
    patches = []
    for y in range(side):
        for x in range(side):
            patch = pixels[:, y * size:(y + 1) * size, x * size:(x + 1) * size]
            patches.append((kernel * patch).sum((1, 2, 3)) + bias)
    x = torch.stack(patches) + p["embeddings.position_embedding.weight"]
    states = [x]
    for n in range(config.n_layers):
        layer = f"encoder.layers.{n}"
        normed = naive_layer_norm(x, p, f"{layer}.layer_norm1", eps)
        x = x + naive_attention(config, p, f"{layer}.self_attn", normed)
        normed = naive_layer_norm(x, p, f"{layer}.layer_norm2", eps)
        h = naive_linear(normed, p, f"{layer}.mlp.fc1")
        h = h / 2 * (1 + ((2 / math.pi) ** 0.5 * (h + 0.044715 * h ** 3)).tanh())
        x = x + naive_linear(h, p, f"{layer}.mlp.fc2")
        states.append(x)
    return [*states, naive_layer_norm(x, p, "post_layernorm", eps)]


@pytest.mark.parametrize("name, feature_layer", FEATURES)
def test_siglip_equals_its_equations(name, feature_layer):
    """F and the gradients of the pixels and every parameter, against sums in fp64."""
    config = SIGLIPS[name]
    ours = randomise(SigLIP(replace(config, feature_layer=feature_layer)))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, config.image_size, config.image_size, generator=generator)
    F = ours(pixels.requires_grad_())
    p = {name: p.detach().double().requires_grad_() for name, p in ours.named_parameters()}
    wide = pixels.detach().double().requires_grad_()
    states = [naive_siglip(config, p, page) for page in wide]
    which = -1 if feature_layer is None else range(config.n_layers + 1)[feature_layer]
    expected = torch.stack([tile_states[which] for tile_states in states])
    assert F.shape == (2, config.n_patches, config.hidden_size)
    close(F.double(), expected)

    g = torch.randn(F.shape, generator=generator)
    (F * g).sum().backward()
    (expected * g).sum().backward()
    close(pixels.grad.double(), wide.grad)
    gradients = {name: g if g is None else g.double() for name, g in gradients_of(ours).items()}
    close_gradients(gradients, {name: p.grad for name, p in p.items()},
                    alone=config.n_patches == 1)


def test_from_scratch_a_projection_keeps_the_variance_of_its_input():
    """Of a patch, too; a position embedding is about as long as one of 1 / d a number."""
    torch.manual_seed(0)
    siglip = SigLIP(SigLIPConfig(96, 1, 2, 160, image_size=280, patch_size=14))
    siglip.init_weights()
    kernel = siglip.embeddings.patch_embedding.weight
    matrices = [p for p in siglip.encoder.parameters() if p.ndim > 1] + [kernel.flatten(1)]
    assert len(matrices) == 7
    for W in matrices:
        y = torch.randn(500, W.shape[1]) @ W.T
        assert y.std().item() == pytest.approx(1, rel=0.1)
    lengths = siglip.embeddings.position_embedding.weight.norm(dim=-1)
    assert lengths.mean().item() == pytest.approx(1, rel=0.1)


# ------------------------------------------------------------------------------------------------
# Tiling


def naive_spans(size: int, count: int) -> list[tuple[int, int]]:
    """A side of the page cut into `count` parts, found pixel by pixel: first and last of each.

    A pixel belongs to part min(x // length, last).
    """
    parts = [[] for _ in range(count)]
    for x in range(size):
        parts[min(x // (size // count), count - 1)].append(x)
    return [(part[0], part[-1]) for part in parts]


@functools.cache
def naive_boxes(width: int, height: int, rows: int, columns: int) -> list[tuple]:
    """The (left, top, right, bottom) of each box, row by row."""
    return [(left, top, right + 1, bottom + 1) for top, bottom in naive_spans(height, rows)
            for left, right in naive_spans(width, columns)]


@functools.cache
def naive_ratio(width: int, height: int, rows: int, columns: int, side: int) -> Fraction:
    """The coverage ratio in exact fractions.

    A box keeps its area times the square of the scale it is shown at.
    """
    covered = Fraction(0)
    for left, top, right, bottom in naive_boxes(width, height, rows, columns):
        w, h = right - left, bottom - top
        scale = min(Fraction(1), Fraction(side, max(w, h)))
        covered += w * h * scale * scale
    return covered / (width * height)


def candidates(width: int, height: int, max_tiles: int) -> list[tuple[int, int]]:
    counts = range(1, max_tiles + 1)
    return [(rows, columns) for rows in counts for columns in counts
            if rows * columns <= max_tiles and rows <= height and columns <= width]


def naive_grid(width: int, height: int, side: int, max_tiles: int) -> tuple[int, int]:
    """The rule in floats, step by step.

    Where two grids keep exactly the same (2000 x 500: 1x4 and 1x9, as in the test vector), the
    published code lets the rounding decide, so the order of the operations is part of the rule.
    """
    best = None
    for rows, columns in candidates(width, height, max_tiles):
        covered = 0.0
        for left, top, right, bottom in naive_boxes(width, height, rows, columns):
            b, a = sorted((right - left, bottom - top))
            covered += a * b if a <= side else side * (b / a * side)
        ratio = covered / (width * height)
        # Among those that keep enough fewer tiles come first, among the others the ratio does.
        rank = (1, -rows * columns, ratio) if ratio > 0.9 else (0, ratio, -rows * columns)
        if best is None or rank > best[0]:
            best = rank, (rows, columns)
    return best[1]


VECTORS = [((400, 400), (1, 1), .9216), ((500, 400), (1, 2), .9216), ((800, 600), (2, 2), .9216),
           ((1024, 768), (2, 3), 1.0), ((1200, 400), (1, 3), None), ((850, 1100), (3, 3), 1.0),
           ((1700, 2200), (3, 3), .2742), ((2000, 500), (1, 9), .5898),
           ((1000, 3000), (4, 2), .2621)]


@pytest.mark.parametrize("size, grid, ratio", VECTORS)
def test_grid_vectors(size, grid, ratio):
    assert choose_grid(*size, 384) == grid
    if ratio is not None:
        assert round(coverage(*size, 384, *grid), 4) == ratio


SIZES = [(400, 400), (500, 400), (112, 112), (113, 112), (112, 224), (224, 336), (337, 225),
         (90, 1100), (701, 333), (997, 991), (1000, 1500), (1500, 1000), (3000, 2000), (900, 1350),
         (5, 3), (1, 1), (1, 5000), (5000, 1), (3, 2000), (2000, 3), (2, 700), (64, 4300)]


@pytest.mark.parametrize("max_tiles", range(1, 10))
def test_grid_and_boxes_equal_the_naive_ones(max_tiles):
    for config in (TOY, SO400M):
        side = config.image_size
        for size in SIZES:
            rows, columns = grid = choose_grid(*size, side, max_tiles)
            assert grid == naive_grid(*size, side, max_tiles), size
            exact = {g: naive_ratio(*size, *g, side) for g in candidates(*size, max_tiles)}
            enough = [r * c for (r, c), ratio in exact.items() if ratio > Fraction(9, 10)]
            if enough:
                assert exact[grid] > Fraction(9, 10) and rows * columns == min(enough)
            else:
                assert exact[grid] == max(exact.values())
            boxes = naive_boxes(*size, rows, columns)
            assert len(boxes) <= max_tiles
            whole = [(0, 0, *size)] if len(boxes) > 1 else []       # the thumbnail comes first
            assert tile_boxes(*size, config, max_tiles) == whole + boxes, size


@pytest.mark.parametrize("size", [(400, 400), (701, 333), (850, 1100), (3, 2000), (1, 5000),
                                  (5000, 1), (17, 1)])
def test_boxes_cover_the_page_exactly_once(size):
    boxes = tile_boxes(*size, SO400M)
    assert len(boxes) <= 10
    if len(boxes) > 1:
        assert boxes.pop(0) == (0, 0, *size)
    painted = np.zeros((size[1], size[0]), int)
    for left, top, right, bottom in boxes:
        assert left < right and top < bottom
        painted[top:bottom, left:right] += 1
    assert (painted == 1).all()


def noise(width: int, height: int) -> Image.Image:
    """A page on which every pixel differs from its neighbours."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def naive_canvas(box: Image.Image, config: SigLIPConfig) -> np.ndarray:
    """A box of the page -> its tile (3, S, S), in fp32 from the start."""
    S, long = config.image_size, max(box.size)
    width, height = [S if n == long else max(1, int(n / long * S)) for n in box.size]
    small = np.asarray(box.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    canvas = np.zeros((3, S, S), np.float32)
    for c in range(3):
        for y in range(height):
            row = canvas[c, (S - height) // 2 + y, (S - width) // 2:]
            row[:width] = (small[y, :, c] / 255 - config.image_mean) / config.image_std
    return canvas


def naive_tile(image: Image.Image, config: SigLIPConfig) -> Tensor:
    rows, columns = naive_grid(*image.size, config.image_size, 9)
    boxes = naive_boxes(*image.size, rows, columns)
    if len(boxes) > 1:
        boxes = [(0, 0, *image.size)] + boxes
    page = np.asarray(image)
    tiles = []
    for left, top, right, bottom in boxes:
        box = Image.fromarray(page[top:bottom, left:right].copy())
        tiles.append(naive_canvas(box, config))
    return torch.from_numpy(np.stack(tiles))


ODD = SigLIPConfig(image_size=31, patch_size=7, image_mean=0.3, image_std=0.2)


@pytest.mark.parametrize("config", [TOY, SO400M, ODD], ids=["toy", "so400m", "odd"])
@pytest.mark.parametrize("size", [(112, 112), (400, 400), (300, 411), (225, 113), (64, 43), (1, 1),
                                  (3, 800), (800, 3)])
def test_tile_equals_the_naive_version(config, size):
    check_tiles(noise(*size), config)


@pytest.mark.parametrize("config", [TOY, SO400M, ODD], ids=["toy", "so400m", "odd"])
@pytest.mark.parametrize("name, size", [("assets/0005-invoice", None),
                                        ("reader/printed/browser-1-receipt", None),
                                        ("assets/explorer", (701, 333)),
                                        ("reader/a4/tex-3", (257, 401))])
def test_tiles_of_a_file_equal_the_naive_version(config, name, size):
    """Pages, and odd parts of pictures."""
    image = Image.open(ROOT / f"{name}.png").convert("RGB")
    check_tiles(image.crop((0, 0, *size)) if size else image, config)


def check_tiles(image: Image.Image, config: SigLIPConfig) -> None:
    """To the bit. On their way they are bytes, a quarter of it."""
    pixels, expected = tile(image, config), naive_tile(image, config)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.equal(pixels.view(torch.int32), expected.view(torch.int32))
    on_the_way, areas = cut(image, config)
    assert on_the_way.dtype == torch.uint8 and 4 * on_the_way.nbytes == pixels.nbytes
    assert len(areas) == len(pixels)


@pytest.mark.parametrize("max_tiles", range(1, 10))
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2000), (2000, 3), (500, 500)])
def test_extreme_pages(size, max_tiles):
    pixels = tile(Image.new("RGB", size, "black"), TOY, max_tiles)
    assert len(pixels) == 1 or 3 <= len(pixels) <= max_tiles + 1
    ink = pixels != 0               # black is -2 for the toy, and the canvas around it 0
    for page in ink[:, 0]:
        rows, columns = page.any(1).sum(), page.any(0).sum()
        assert max(rows, columns) == TOY.image_size
        assert min(rows, columns) >= 1          # no side vanished
        assert page.sum() == rows * columns


def test_the_config_says_how_many_tiles_unless_somebody_asks():
    page = noise(300, 411)
    few = replace(TOY, max_tiles=2)
    assert torch.equal(tile(page, few), tile(page, TOY, 2))
    assert torch.equal(tile(page, few, 9), tile(page, TOY)) and len(tile(page, TOY)) > 3


def test_max_tiles_below_one_is_refused():
    with pytest.raises(ValueError, match="max_tiles is 0"):
        tile(Image.new("RGB", (9, 9)), TOY, 0)
