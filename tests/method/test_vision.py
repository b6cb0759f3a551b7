"""SigLIP against transformers, tiling against the test vectors and a naive version, read_image against hostile files."""
import functools
import io
import re
import resource
import struct
import sys
import warnings
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from conftest import close, n_parameters, randomise, shapes
from vision import SIGLIP_PRESETS, SigLIP, SigLIPConfig, choose_grid, tile, tile_boxes
from plumbing.images import ImageError, read_image

SO400M = SIGLIP_PRESETS["so400m-patch14-384"]
TOY = SIGLIP_PRESETS["toy"]


# ---------------------------------------------------------------------------------------------------------------------
# The encoder


def theirs_of(config: SigLIPConfig, **options) -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        intermediate_size=config.intermediate_size, image_size=config.image_size, patch_size=config.patch_size,
        layer_norm_eps=config.layer_norm_eps, hidden_act="gelu_pytorch_tanh", attn_implementation="eager", **options))


def hub_name(name: str) -> str:
    """transformers' parameter names with and without the prefix, which depends on its version."""
    return name.removeprefix("vision_model.")


SMALL = {
    "round":       dict(hidden_size=32, n_layers=2, n_heads=4, intermediate_size=64, image_size=32, patch_size=8),
    "dropped":     dict(hidden_size=24, n_layers=3, n_heads=4, intermediate_size=50, image_size=31, patch_size=7),
    "one head":    dict(hidden_size=10, n_layers=2, n_heads=1, intermediate_size=7, image_size=20, patch_size=6),
    "head dim 1":  dict(hidden_size=5, n_layers=2, n_heads=5, intermediate_size=11, image_size=9, patch_size=2),
    "head dim 72": dict(hidden_size=144, n_layers=1, n_heads=2, intermediate_size=99, image_size=44, patch_size=14),
    "one patch":   dict(hidden_size=12, n_layers=2, n_heads=2, intermediate_size=16, image_size=13, patch_size=7),
    "large eps":   dict(hidden_size=18, n_layers=2, n_heads=3, intermediate_size=20, image_size=15, patch_size=4,
                        layer_norm_eps=0.1),
}
CASES = [(name, None) for name in SMALL] + [("dropped", k) for k in (0, 1, 3, -1, -2, -4)] + [("one patch", -1)]


@pytest.mark.parametrize("name, feature_layer", CASES)
def test_siglip_equals_transformers(name, feature_layer):
    config = SigLIPConfig(**SMALL[name], feature_layer=feature_layer)
    theirs = randomise(theirs_of(config, vision_use_head=False)).eval()
    ours = SigLIP(config)
    ours.load_state_dict({hub_name(k): v for k, v in theirs.state_dict().items()})

    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, config.image_size, config.image_size, generator=generator)
    our_pixels, their_pixels = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    out = theirs(their_pixels, output_hidden_states=True)
    F_theirs = out.last_hidden_state if feature_layer is None else out.hidden_states[feature_layer]
    F = ours(our_pixels)
    assert F.shape == (3, config.n_patches, config.hidden_size)
    close(F, F_theirs)

    g = torch.randn(F.shape, generator=generator)
    (F * g).sum().backward()
    (F_theirs * g).sum().backward()
    close(our_pixels.grad, their_pixels.grad)
    their_grads = {hub_name(k): p.grad for k, p in theirs.named_parameters()}
    assert their_grads.keys() == dict(ours.named_parameters()).keys()
    for k, p in ours.named_parameters():
        if their_grads[k] is None:          # a layer above the feature layer
            assert p.grad is None, k
        elif config.n_patches == 1 and re.search(r"[qk]_proj", k):
            # One patch attends to itself whatever q and k are: rounding noise, measured against the values' gradient.
            values = their_grads[re.sub(r"[qk]_proj\.\w+", "v_proj.weight", k)]
            close(p.grad, torch.zeros_like(p), scale=values.abs().max().item())
        elif k.endswith("k_proj.bias"):
            # A bias on the keys shifts a query's scores all alike, so its true gradient is 0 and both sides hold
            # rounding noise: measured against the weight's gradient instead of its own.
            close(p.grad, their_grads[k], scale=their_grads[k.replace("bias", "weight")].abs().max().item())
        else:
            close(p.grad, their_grads[k])


def test_so400m_has_the_released_parameters():
    """The figures of the released configuration written out, so a wrong preset shows too."""
    with torch.device("meta"):
        ours = SigLIP(SO400M)
        theirs = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, image_size=384,
            patch_size=14))
    expected = {hub_name(k): s for k, s in shapes(theirs).items() if not hub_name(k).startswith("head.")}
    assert shapes(ours) == expected
    assert n_parameters(ours) == n_parameters(theirs) - n_parameters(theirs.get_submodule(
        "head" if hasattr(theirs, "head") else "vision_model.head"))
    assert (SO400M.layer_norm_eps, SO400M.n_heads, SO400M.n_patches) == (1e-6, 16, 729)
    assert (SO400M.image_mean, SO400M.image_std, SO400M.feature_layer) == (0.5, 0.5, None)


def test_toy_has_the_parameters_of_the_same_architecture():
    with torch.device("meta"):
        ours, theirs = SigLIP(TOY), theirs_of(TOY, vision_use_head=False)
    assert shapes(ours) == {hub_name(k): s for k, s in shapes(theirs).items()}
    assert n_parameters(ours) == n_parameters(theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Tiling


@functools.cache
def naive_boxes(width, height, rows, columns):
    """Every box's set of x and y, found pixel by pixel: each belongs to box min(x // box width, last)."""
    xs = [[x for x in range(width) if min(x // (width // columns), columns - 1) == c] for c in range(columns)]
    ys = [[y for y in range(height) if min(y // (height // rows), rows - 1) == r] for r in range(rows)]
    return [(x[0], y[0], x[-1] + 1, y[-1] + 1) for y in ys for x in xs]


@functools.cache
def naive_ratio(width, height, rows, columns, side):
    """The coverage ratio in exact fractions: a box keeps its area times the square of the scale it is shown at."""
    covered = Fraction(0)
    for left, top, right, bottom in naive_boxes(width, height, rows, columns):
        w, h = right - left, bottom - top
        scale = min(Fraction(1), Fraction(side, max(w, h)))
        covered += w * h * scale * scale
    return covered / (width * height)


def candidates(width, height, max_tiles):
    return [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles + 1)
            if rows * columns <= max_tiles and rows <= height and columns <= width]


def naive_grid(width, height, side, max_tiles):
    """The rule in floats, step by step: where two grids keep exactly the same (2000 x 500: 1x4 and 1x9, as in the test
    vector), the published code lets the rounding decide, so the order of the operations is part of the rule."""
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
           ((1700, 2200), (3, 3), .2742), ((2000, 500), (1, 9), .5898), ((1000, 3000), (4, 2), .2621)]


@pytest.mark.parametrize("size, grid, ratio", VECTORS)
def test_grid_vectors(size, grid, ratio):
    assert choose_grid(*size, 384) == grid
    if ratio is not None:
        assert round(float(naive_ratio(*size, *grid, 384)), 4) == ratio


SIZES = [(400, 400), (500, 400), (112, 112), (113, 112), (112, 224), (224, 336), (337, 225), (90, 1100), (701, 333),
         (997, 991), (1000, 1500), (1500, 1000), (3000, 2000), (900, 1350), (5, 3), (1, 1), (1, 5000), (5000, 1),
         (3, 2000), (2000, 3), (2, 700), (64, 4300)]


@pytest.mark.parametrize("max_tiles", range(1, 10))
def test_grid_and_boxes_equal_the_naive_ones(max_tiles):
    for config in (TOY, SO400M):
        for size in SIZES:
            rows, columns = grid = choose_grid(*size, config.image_size, max_tiles)
            assert grid == naive_grid(*size, config.image_size, max_tiles), size
            exact = {g: naive_ratio(*size, *g, config.image_size) for g in candidates(*size, max_tiles)}
            enough = [r * c for (r, c), ratio in exact.items() if ratio > Fraction(9, 10)]
            if enough:
                assert exact[grid] > Fraction(9, 10) and rows * columns == min(enough)
            else:
                assert exact[grid] == max(exact.values())
            boxes = naive_boxes(*size, rows, columns)
            assert len(boxes) <= max_tiles
            whole = [(0, 0, *size)] if len(boxes) > 1 else []       # the thumbnail comes first
            assert tile_boxes(*size, config, max_tiles) == whole + boxes, size


@pytest.mark.parametrize("size", [(400, 400), (701, 333), (850, 1100), (3, 2000), (1, 5000), (5000, 1), (17, 1)])
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


def noise(width, height, seed=0):
    """A page on which every pixel differs from its neighbours."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def naive_tile(image, config, max_tiles=9):
    S, (width, height) = config.image_size, image.size
    rows, columns = naive_grid(width, height, S, max_tiles)
    boxes = naive_boxes(width, height, rows, columns)
    if len(boxes) > 1:
        boxes = [(0, 0, width, height)] + boxes
    page, tiles = np.asarray(image), []
    for left, top, right, bottom in boxes:
        box = Image.fromarray(page[top:bottom, left:right].copy())
        long = max(box.size)
        new_w, new_h = (S if n == long else max(1, int(n / long * S)) for n in box.size)
        small = np.asarray(box.resize((new_w, new_h), Image.Resampling.BICUBIC)).astype(np.float64)
        canvas = np.zeros((3, S, S))
        for c in range(3):
            for y in range(new_h):
                canvas[c, (S - new_h) // 2 + y, (S - new_w) // 2:][:new_w] = \
                    (small[y, :, c] / 255 - config.image_mean) / config.image_std
        tiles.append(canvas)
    return torch.from_numpy(np.stack(tiles)).float()


@pytest.mark.parametrize("config", [TOY, SO400M, SigLIPConfig(image_size=31, patch_size=7, image_mean=0.3, image_std=0.2)],
                         ids=["toy", "so400m", "odd"])
@pytest.mark.parametrize("size", [(112, 112), (400, 400), (300, 411), (225, 113), (64, 43), (1, 1), (3, 800), (800, 3)])
def test_tile_equals_the_naive_version(config, size):
    image = noise(*size)
    pixels, expected = tile(image, config), naive_tile(image, config)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    close(pixels, expected, 1e-6)


@pytest.mark.parametrize("max_tiles", range(1, 10))
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2000), (2000, 3), (500, 500)])
def test_extreme_pages(size, max_tiles):
    pixels = tile(Image.new("RGB", size, "black"), TOY, max_tiles)
    assert len(pixels) == 1 or 3 <= len(pixels) <= max_tiles + 1
    ink = pixels != 0               # black is -2 for the toy, and the canvas around it 0
    for page in ink[:, 0]:
        rows, columns = page.any(1).sum(), page.any(0).sum()
        assert max(rows, columns) == TOY.image_size and min(rows, columns) >= 1     # no side vanished
        assert page.sum() == rows * columns


def test_max_tiles_below_one_is_refused():
    with pytest.raises(ValueError, match="max_tiles is 0"):
        tile(Image.new("RGB", (9, 9)), TOY, 0)


# ---------------------------------------------------------------------------------------------------------------------
# read_image


def written(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixel_of(image):
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def palette_image():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50] + [0] * 759)
    image.putpixel((1, 0), 2)
    return image


# One pixel of each mode, as saved, and the colour that a viewer on white paper shows.
COLOURS = {
    "RGB":                  (Image.new("RGB", (3, 2), (10, 20, 30)), "a.png", {}, (10, 20, 30)),
    "RGBA opaque":          (Image.new("RGBA", (3, 2), (10, 20, 30, 255)), "a.png", {}, (10, 20, 30)),
    "RGBA transparent":     (Image.new("RGBA", (3, 2), (10, 20, 30, 0)), "a.png", {}, (255, 255, 255)),
    "RGBA between":         (Image.new("RGBA", (3, 2), (0, 100, 255, 51)), "a.png", {}, (204, 224, 255)),
    "LA opaque":            (Image.new("LA", (3, 2), (40, 255)), "a.png", {}, (40, 40, 40)),
    "LA transparent":       (Image.new("LA", (3, 2), (40, 0)), "a.png", {}, (255, 255, 255)),
    "L":                    (Image.new("L", (3, 2), 77), "a.png", {}, (77, 77, 77)),
    "L with a clear grey":  (Image.new("L", (3, 2), 77), "a.png", {"transparency": 77}, (255, 255, 255)),
    "RGB with a clear one": (Image.new("RGB", (3, 2), (1, 2, 3)), "a.png", {"transparency": (1, 2, 3)}, (255, 255, 255)),
    "P":                    (palette_image(), "a.png", {}, (10, 20, 30)),
    "P transparent":        (palette_image(), "a.png", {"transparency": 1}, (255, 255, 255)),
    "P, another clear":     (palette_image(), "a.png", {"transparency": 2}, (10, 20, 30)),
    "P in a GIF":           (palette_image(), "a.gif", {"transparency": 1}, (255, 255, 255)),
    "1-bit black":          (Image.new("1", (3, 2), 0), "a.png", {}, (0, 0, 0)),
    "1-bit white":          (Image.new("1", (3, 2), 1), "a.tiff", {}, (255, 255, 255)),
    "CMYK TIFF":            (Image.new("CMYK", (3, 2), (255, 0, 0, 0)), "a.tiff", {}, (0, 255, 255)),
    "CMYK black":           (Image.new("CMYK", (3, 2), (0, 0, 0, 255)), "a.tiff", {}, (0, 0, 0)),
    "CMYK JPEG":            (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg", {"quality": 100}, (255, 0, 0)),
    "YCbCr JPEG":           (Image.new("RGB", (16, 16), (255, 255, 255)), "a.jpg", {}, (255, 255, 255)),
    "WebP":                 (Image.new("RGBA", (16, 16), (9, 9, 9, 0)), "a.webp", {"lossless": True}, (255, 255, 255)),
    "BMP":                  (Image.new("RGB", (3, 2), (10, 20, 30)), "a.bmp", {}, (10, 20, 30)),
}


@pytest.mark.parametrize("case", COLOURS)
def test_read_image_modes(tmp_path, case):
    image, name, options, colour = COLOURS[case]
    path = written(tmp_path, image, name, **options)
    got = read_image(path)
    assert got.size == image.size
    assert max(abs(a - b) for a, b in zip(pixel_of(got), colour)) <= (2 if name.endswith("jpg") else 0)
    assert read_image(str(path)).tobytes() == got.tobytes()
    assert read_image(io.BytesIO(path.read_bytes())).tobytes() == got.tobytes()


RAMP = np.array([[0, 1000, 32768], [50_000, 65_534, 65_535]])


@pytest.mark.parametrize("dtype, name", [(np.uint16, "a.png"), (np.uint16, "a.tiff"), (np.int32, "a.tiff"),
                                         (np.float32, "a.tiff")], ids=["I;16 PNG", "I;16 TIFF", "I", "F"])
def test_read_image_16_bit_grey(tmp_path, dtype, name):
    """65535 is white: Pillow's own conversion would turn all above 255 into white."""
    path = written(tmp_path, Image.fromarray(RAMP.astype(dtype)), name)
    with Image.open(path) as image:
        assert image.mode.startswith("I") or image.mode == "F"
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (3, 2)
    expected = [[0, 4, 128], [195, 255, 255]]
    assert np.array_equal(np.asarray(image), np.repeat(np.array(expected)[..., None], 3, axis=-1))


# What a viewer must do with the stored picture for each value of the EXIF tag 274, "Orientation".
UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
           5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
           8: lambda a: np.rot90(a)}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_read_image_applies_exif_rotation(tmp_path, orientation):
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :16], stored[:16, 16:] = (250, 0, 0), (0, 250, 0)
    stored[16:, :16], stored[16:, 16:] = (0, 0, 250), (250, 250, 0)
    exif = Image.Exif()
    exif[274] = orientation
    path = written(tmp_path, Image.fromarray(stored), "a.jpg", exif=exif, quality=100, subsampling=0)
    got, expected = np.asarray(read_image(path)).astype(int), UPRIGHT[orientation](stored).astype(int)
    assert got.shape == expected.shape
    assert abs(got - expected).max() < 20       # JPEG


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"])
def test_one_pixel_becomes_a_tile(tmp_path, mode):
    image = read_image(written(tmp_path, Image.new(mode, (1, 1)), "a.png"))
    assert image.size == (1, 1)
    assert tile(image, TOY).shape == (1, 3, 112, 112)


def png(width, height, rows=b"", depth=1):
    """A grey PNG that claims a size; `rows` are its scanlines."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def bytes_of(kind):
    file = io.BytesIO()
    noise(40, 30).save(file, kind)
    return file.getvalue()


def refused(path):
    """read_image's message for a file that it must refuse, in silence: one line, and the file named."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as error:
            read_image(path)
    message = str(error.value)
    assert "\n" not in message and path.name in message
    return message


BAD = {
    "truncated.png": bytes_of("PNG")[:1500], "truncated.jpg": bytes_of("JPEG")[:1000],
    "truncated.gif": bytes_of("GIF")[:900], "truncated.tiff": bytes_of("TIFF")[:1000],
    "truncated.webp": bytes_of("WEBP")[:500], "truncated.bmp": bytes_of("BMP")[:900],
    "header.png": bytes_of("PNG")[:8], "half_a_header.png": bytes_of("PNG")[:20], "header.jpg": bytes_of("JPEG")[:3],
    "wrong_checksum.png": bytes_of("PNG").replace(b"IHDR", b"IHDR\xff", 1), "no_rows.png": png(9, 9),
    "text.png": b"this is no image\n" * 9, "empty.png": b"", "zeros.jpg": bytes(999), "zero_wide.png": png(0, 5),
    # Pillow has its own errors for what it knows and can't do.
    "unknown_format.dds": bytes_of("DDS")[:80] + struct.pack("<I", 26) + bytes_of("DDS")[84:],
    "page.pdf": b"%PDF-1.4\n", "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
}


@pytest.mark.parametrize("name", BAD)
def test_read_image_refuses(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name])
    refused(tmp_path / name)
    with open(tmp_path / name, "rb") as file, pytest.raises(ImageError, match=name):
        read_image(file)


def test_read_image_refuses_what_is_no_file(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.png")
    refused(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_files_give_an_image_or_an_image_error(tmp_path, kind):
    """Random damage, 40 files a format: nothing but ImageError may come out."""
    good, rng = bytes_of(kind), np.random.default_rng(0)
    errors = 0
    for i in range(40):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 9)):
            bad[rng.integers(min(len(bad), 2000 if i % 2 else 64))] = rng.integers(256)
        (tmp_path / "bad").write_bytes(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_image(tmp_path / "bad").mode == "RGB"
            except ImageError as error:
                errors += 1
                assert "\n" not in str(error)
    assert errors > 0


def test_decompression_bombs_are_refused_without_decoding(tmp_path):
    """A header that claims 50,000 x 50,000, and small files that really hold 144 and just over 100 megapixels."""
    (tmp_path / "claim.png").write_bytes(png(50_000, 50_000))
    (tmp_path / "bomb.png").write_bytes(png(12_000, 12_000, (b"\0" + bytes(1500)) * 12_000))
    (tmp_path / "long.png").write_bytes(png(8, 12_500_001, b"\0\0" * 12_500_001))
    unit = 1 if sys.platform == "darwin" else 1024      # of ru_maxrss, the most memory ever held
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("claim.png", "bomb.png", "long.png"):
        assert "100,000,000" in refused(tmp_path / name)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * unit < 20_000_000         # one byte a pixel would be 100,000,000 and more


def test_a_large_page_is_read_in_silence(tmp_path):
    """95 megapixels are allowed; Pillow would print a warning from 89 on."""
    (tmp_path / "large.png").write_bytes(png(9_500, 10_000, (b"\0" + b"\xff" * 1188) * 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / "large.png")
    assert image.size == (9_500, 10_000) and pixel_of(image) == (255, 255, 255)
