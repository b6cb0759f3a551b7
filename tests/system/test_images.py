"""plumbing/images.py: pages of every mode, damaged ones and hostile ones."""
import io
import resource
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plumbing import images
from plumbing.images import ImageError, read_image
from vision import SIGLIP_PRESETS, tile


def written(tmp_path: Path, image: Image.Image, name: str, **options) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixel_of(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def plain(mode: str, colour, size: int = 3) -> Image.Image:
    return Image.new(mode, (size, 2 if size == 3 else size), colour)


def palette_image() -> Image.Image:
    image = plain("P", 1)
    image.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50] + [0] * 759)
    image.putpixel((1, 0), 2)
    return image


WHITE = (255, 255, 255)
# One colour in each mode, as it is saved, and what a viewer on white paper shows.
COLOURS = {
    "RGB":                  (plain("RGB", (10, 20, 30)), "a.png", {}, (10, 20, 30)),
    "RGBA opaque":          (plain("RGBA", (10, 20, 30, 255)), "a.png", {}, (10, 20, 30)),
    "RGBA transparent":     (plain("RGBA", (10, 20, 30, 0)), "a.png", {}, WHITE),
    "RGBA between":         (plain("RGBA", (0, 100, 255, 51)), "a.png", {}, (204, 224, 255)),
    "LA opaque":            (plain("LA", (40, 255)), "a.png", {}, (40, 40, 40)),
    "LA transparent":       (plain("LA", (40, 0)), "a.png", {}, WHITE),
    "L":                    (plain("L", 77), "a.png", {}, (77, 77, 77)),
    "L with a clear grey":  (plain("L", 77), "a.png", {"transparency": 77}, WHITE),
    "RGB with a clear one": (plain("RGB", (1, 2, 3)), "a.png", {"transparency": (1, 2, 3)}, WHITE),
    "P":                    (palette_image(), "a.png", {}, (10, 20, 30)),
    "P transparent":        (palette_image(), "a.png", {"transparency": 1}, WHITE),
    "P, another clear":     (palette_image(), "a.png", {"transparency": 2}, (10, 20, 30)),
    "P in a GIF":           (palette_image(), "a.gif", {"transparency": 1}, WHITE),
    "1-bit black":          (plain("1", 0), "a.png", {}, (0, 0, 0)),
    "1-bit white":          (plain("1", 1), "a.tiff", {}, WHITE),
    "CMYK TIFF":            (plain("CMYK", (255, 0, 0, 0)), "a.tiff", {}, (0, 255, 255)),
    "CMYK black":           (plain("CMYK", (0, 0, 0, 255)), "a.tiff", {}, (0, 0, 0)),
    "CMYK JPEG":            (plain("CMYK", (0, 255, 255, 0), 16), "a.jpg", {"quality": 100},
                             (255, 0, 0)),
    "LAB TIFF":             (plain("LAB", (200, 128, 128)), "a.tiff", {}, (194, 194, 194)),
    "YCbCr JPEG":           (plain("RGB", WHITE, 16), "a.jpg", {}, WHITE),
    "WebP":                 (plain("RGBA", (9, 9, 9, 0), 16), "a.webp", {"lossless": True}, WHITE),
    "BMP":                  (plain("RGB", (10, 20, 30)), "a.bmp", {}, (10, 20, 30)),
}


@pytest.mark.parametrize("case", COLOURS)
def test_read_image_modes(tmp_path, case):
    image, name, options, colour = COLOURS[case]
    path = written(tmp_path, image, name, **options)
    got = read_image(path)
    assert got.size == image.size
    off = max(abs(a - b) for a, b in zip(pixel_of(got), colour))
    assert off <= (2 if name.endswith("jpg") else 0)
    assert read_image(str(path)).tobytes() == got.tobytes()
    assert read_image(io.BytesIO(path.read_bytes())).tobytes() == got.tobytes()


RAMP = np.array([[0, 1000, 32768], [50_000, 65_534, 65_535]])


@pytest.mark.parametrize("dtype, name", [(np.uint16, "a.png"), (np.uint16, "a.tiff"),
                                         (np.int32, "a.tiff"), (np.float32, "a.tiff")],
                         ids=["I;16 PNG", "I;16 TIFF", "I", "F"])
def test_read_image_16_bit_grey(tmp_path, dtype, name):
    """65535 is white: Pillow's own conversion would turn all above 255 into white."""
    path = written(tmp_path, Image.fromarray(RAMP.astype(dtype)), name)
    with Image.open(path) as image:
        assert image.mode.startswith("I") or image.mode == "F"
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (3, 2)
    expected = np.array([[0, 4, 128], [195, 255, 255]])
    assert np.array_equal(np.asarray(image), np.repeat(expected[..., None], 3, axis=-1))


def test_a_tiff_of_16_bits_may_count_from_white(tmp_path):
    """WhiteIsZero: Pillow turns grey of 8 bits round, and leaves 16 as they are."""
    path = tmp_path / "a.tiff"
    Image.fromarray(RAMP.astype(np.uint16)).save(path, tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.mode.startswith("I;16") and image.tag_v2[262] == 0
    assert np.asarray(read_image(path))[..., 0].tolist() == [[255, 251, 127], [60, 0, 0]]


def test_grey_of_16_bits_may_be_clear(tmp_path):
    """tRNS names the grey that is no ink: paper is seen through it."""
    path = tmp_path / "a.png"
    Image.fromarray(RAMP.astype(np.uint16)).save(path, transparency=0)
    with Image.open(path) as image:
        assert image.mode.startswith("I") and image.info["transparency"] == 0
    assert np.asarray(read_image(path))[..., 0].tolist() == [[255, 4, 128], [195, 255, 255]]


def test_a_tiff_of_12_bits_is_as_bright_as_one_of_16(tmp_path):
    """As some scanners write it: Pillow shifts no bits."""
    grey = np.tile(np.array([0, 1000, 4095], dtype=np.uint16), 4)                   # a row of 12
    packed = int("".join(f"{value:012b}" for value in grey), 2).to_bytes(18, "big")
    tags = [(256, 12), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1),
            (279, len(packed))]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed
                     + struct.pack("<H", len(tags)) + entries + bytes(4))
    row = np.array(read_image(path))[0, :, 0]
    assert row.tolist() == [0, 62, 255] * 4


@pytest.mark.parametrize("bits, key", [(1, 0), (1, 1), (2, 1), (4, 5), (8, 77)])
def test_a_clear_grey_of_few_bits(tmp_path, bits, key):
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return struct.pack(">I", len(content)) + kind + content + checksum

    other = 2 ** bits - 1 - key
    row = int((f"{other:0{bits}b}{key:0{bits}b}" * 4), 2).to_bytes(bits, "big")     # 8 samples
    path = tmp_path / "a.png"
    path.write_bytes(images.PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))
                     + chunk(b"tRNS", key.to_bytes(2, "big"))
                     + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))
    seen = np.array(read_image(path))[0, :, 0]
    assert seen.tolist() == [other * 255 // (2 ** bits - 1), 255] * 4


def test_a_clear_colour_of_16_bits(tmp_path):
    """Pillow keeps the high byte of each sample. Paper has another low byte than the key here."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return struct.pack(">I", len(content)) + kind + content + checksum

    paper, ink = struct.pack(">3H", 0x1234, 0x5678, 0x9abc), struct.pack(">3H", 0x1234, 0, 0xffff)
    path = tmp_path / "a.png"
    path.write_bytes(images.PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 16, 2, 0, 0, 0))
                     + chunk(b"tRNS", paper)
                     + chunk(b"IDAT", zlib.compress(b"\0" + 2 * (paper + ink)))
                     + chunk(b"IEND", b""))
    assert np.array(read_image(path))[0].tolist() == 2 * [[255] * 3, [0x12, 0, 0xff]]


def test_a_clear_grey_and_nothing_else():
    content = b"tRNS" + bytes(2)
    chunk = struct.pack(">I", 2) + content + zlib.crc32(content).to_bytes(4, "big")
    with pytest.raises(ImageError, match="not a readable image"):
        read_image(io.BytesIO(images.PNG + chunk))


@pytest.mark.parametrize("data, why", [
    (b"", "the file is empty"), (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    (b"hello", "of no format that Pillow knows")])
def test_what_is_no_image(data, why):
    with pytest.raises(ImageError, match=f"not a readable image .*{why}"):
        read_image(io.BytesIO(data))


def test_a_tiff_of_too_many_pages(tmp_path, monkeypatch):
    path = tmp_path / "fax.tif"
    page = plain("L", 0)
    page.save(path, save_all=True, append_images=[page] * 4)
    assert len(images.read_pages(path)) == 5
    monkeypatch.setattr(images, "MAX_PAGES", 4)
    with pytest.raises(ImageError, match="fax.tif: more than 4 pages: .* --pages"):
        images.read_pages(path)
    assert len(images.read_pages(path, "2-4")) == 3


def test_pages_that_are_too_large_together(tmp_path, monkeypatch):
    """Each of them has six pixels."""
    path = tmp_path / "fax.tif"
    plain("L", 0).save(path, save_all=True, append_images=[plain("L", 0)] * 2)
    monkeypatch.setattr(images, "MAX_PAGE_PIXELS", 17)
    with pytest.raises(ImageError, match="fax.tif: pages of more than 17 pixels together"):
        images.read_pages(path)
    assert len(images.read_pages(path, "2-3")) == 2


def test_a_comment_makes_no_pdf(tmp_path):
    path = tmp_path / "a.gif"
    plain("L", 7).save(path, comment=b"%PDF-1.7")
    assert pixel_of(read_image(path)) == (7, 7, 7)


def test_a_device_without_end_is_too_large(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    with pytest.raises(ImageError, match="/dev/zero: larger than 1,000 bytes"):
        read_image("/dev/zero")


# What a viewer must do with the stored picture for each value of the EXIF tag 274, "Orientation".
UPRIGHT = {1: lambda a: a,
           2: lambda a: a[:, ::-1],
           3: lambda a: a[::-1, ::-1],
           4: lambda a: a[::-1],
           5: lambda a: a.swapaxes(0, 1),
           6: lambda a: np.rot90(a, -1),
           7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
           8: lambda a: np.rot90(a)}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_read_image_applies_exif_rotation(tmp_path, orientation):
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :16] = 250, 0, 0
    stored[:16, 16:] = 0, 250, 0
    stored[16:, :16] = 0, 0, 250
    stored[16:, 16:] = 250, 250, 0
    exif = Image.Exif()
    exif[274] = orientation
    path = written(tmp_path, Image.fromarray(stored), "a.jpg", exif=exif, quality=100,
                   subsampling=0)
    got = np.asarray(read_image(path)).astype(int)
    expected = UPRIGHT[orientation](stored).astype(int)
    assert got.shape == expected.shape
    assert abs(got - expected).max() < 20       # JPEG


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_exif_counts_before_xmp(tmp_path, name):
    """A program that turns a picture may forget one of them."""
    exif, page = Image.Exif(), plain("RGB", WHITE)
    exif[274] = 6
    sizes = [read_image(written(tmp_path, page, name, **said)).size for said in (
        {}, {"xmp": b'<x tiff:Orientation="8"/>'}, {"xmp": b'<x tiff:Orientation="3"/>'},
        {"xmp": b'<x tiff:Orientation="3"/>', "exif": exif})]
    assert sizes == [(3, 2), (2, 3), (3, 2), (2, 3)]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"])
def test_one_pixel_becomes_a_tile(tmp_path, mode):
    image = read_image(written(tmp_path, Image.new(mode, (1, 1)), "a.png"))
    assert image.size == (1, 1)
    assert tile(image, SIGLIP_PRESETS["toy"]).shape == (1, 3, 112, 112)


def png(width: int, height: int, rows: bytes = b"", depth: int = 1) -> bytes:
    """A grey PNG that claims a size; `rows` are its scanlines."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bytes_of(kind: str) -> bytes:
    """A file of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def refused(path: Path) -> str:
    """read_image's message for a file that it must refuse: one line, and the file named.

    Nothing else may be printed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as error:
            read_image(path)
    message = str(error.value)
    assert "\n" not in message and path.name in message
    return message


BAD = {
    "truncated.png": bytes_of("PNG")[:1500],
    "truncated.jpg": bytes_of("JPEG")[:1000],
    "truncated.gif": bytes_of("GIF")[:900],
    "truncated.tiff": bytes_of("TIFF")[:1000],
    "truncated.webp": bytes_of("WEBP")[:500],
    "truncated.bmp": bytes_of("BMP")[:900],
    "header.png": bytes_of("PNG")[:8],
    "half_a_header.png": bytes_of("PNG")[:20],
    "header.jpg": bytes_of("JPEG")[:3],
    "wrong_checksum.png": bytes_of("PNG").replace(b"IHDR", b"IHDR\xff", 1),
    "no_rows.png": png(9, 9),
    "text.png": b"this is no image\n" * 9,
    "empty.png": b"",
    "zeros.jpg": bytes(999),
    "zero_wide.png": png(0, 5),
    # Pillow has its own errors for what it knows and can't do.
    "unknown_format.dds": bytes_of("DDS")[:80] + struct.pack("<I", 26) + bytes_of("DDS")[84:],
    "page.pdf": b"%PDF-1.4\n",
    "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
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
    """A header that claims 50,000 x 50,000.

    And small files that really hold 144 and just over 100 megapixels.
    """
    (tmp_path / "claim.png").write_bytes(png(50_000, 50_000))
    (tmp_path / "bomb.png").write_bytes(png(12_000, 12_000, (b"\0" + bytes(1500)) * 12_000))
    (tmp_path / "long.png").write_bytes(png(8, 12_500_001, b"\0\0" * 12_500_001))
    unit = 1 if sys.platform == "darwin" else 1024      # of ru_maxrss, the most memory ever held
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("claim.png", "bomb.png", "long.png"):
        assert "100,000,000" in refused(tmp_path / name)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * unit < 20_000_000     # one byte a pixel would be 100,000,000 or more


def test_a_large_page_is_read_in_silence(tmp_path):
    """95 megapixels are allowed; Pillow would print a warning from 89 on."""
    (tmp_path / "large.png").write_bytes(png(9_500, 10_000, (b"\0" + b"\xff" * 1188) * 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / "large.png")
    assert image.size == (9_500, 10_000) and pixel_of(image) == WHITE
