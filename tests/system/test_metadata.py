"""plumbing/images.py: metadata never cost pixels. 2,000 odd blocks, and files of several pages."""
import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features

from plumbing.images import ImageError, read_image, read_pages

N_BLOCKS = 2000
# A picture that looks different from every side, 48 wide and 32 high.
PICTURE = np.zeros((32, 48, 3), np.uint8)
PICTURE[:16, :16] = 250, 0, 0
PICTURE[:16, 16:] = 0, 250, 0
PICTURE[16:, :16] = 0, 0, 250
PICTURE[16:, 16:] = 250, 250, 0
# From an upright picture to what is stored with each orientation.
STORED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
          4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a),
          7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}
TAGS = [270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 318, 319, 330, 333, 336, 342, 700, 33432,
        33723, 34377, 34665, 34675, 34853, 36864, 37500, 37510, 40091, 40965, 50341, 50706, 65000]
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}


def odd_entries(rng: random.Random, order: str, values_at: int) -> tuple[list, bytes]:
    """(tag, entry) pairs of random tags, types, counts and values, and the bytes that they point
    to."""
    entries = []
    values = b""
    for tag in rng.sample(TAGS, rng.randrange(0, 12)):
        kind = rng.choice([*SIZES, *SIZES, 0, 14, 99, 65535])
        n = rng.choice([0, 1, 1, 2, 3, 9, 200, 2 ** 31, 2 ** 32 - 1])
        value = rng.randbytes(4)
        size = SIZES.get(kind, 1) * n
        if 4 < size < 5000 and rng.random() < 0.8:
            value = struct.pack(order + "I", values_at + len(values))
            text = rng.choice([rng.randbytes(size), b"72 dpi\0", b"\0" * size, b"<x:xmpmeta>"])
            values += (text * size)[:size]
        elif rng.random() < 0.2:
            value = struct.pack(order + "I", rng.choice([0, 4, 8, values_at, 2 ** 32 - 1]))
        entries.append((tag, struct.pack(order + "HHI", tag, kind, n) + value))
    return entries, values


def odd_tiff(rng: random.Random, orientation: int | None, pixels: np.ndarray | None) -> bytes:
    """A TIFF, or an EXIF block if there are no pixels: odd entries beside sound ones, some of what
    they point to cut off."""
    order = rng.choice("<>")
    body = pixels.tobytes() if pixels is not None else b""
    directory_at = 8 + len(body)
    entries, values = odd_entries(rng, order, directory_at + 400)
    def short(tag: int, value: int) -> None:
        entries.append((tag, struct.pack(order + "HHIHH", tag, 3, 1, value, 0)))
    if orientation:
        short(274, orientation)
    if pixels is not None:
        height, width, _ = pixels.shape
        for tag, value in [(256, width), (257, height), (259, 1), (262, 2), (273, 8), (277, 3),
                           (278, height), (284, 1)]:
            short(tag, value)
        bits_at = directory_at + 390
        entries.append((258, struct.pack(order + "HHII", 258, 3, 3, bits_at)))
        entries.append((279, struct.pack(order + "HHII", 279, 4, 1, len(body))))
    entries.sort()
    directory = struct.pack(order + "H", len(entries)) + b"".join(entry for _, entry in entries)
    directory += struct.pack(order + "I", rng.choice([0, 0, 0, 7, 2 ** 31, 2 ** 32 - 1]))
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, directory_at)
    data = head + body + directory.ljust(390, b"\0") + struct.pack(order + "3HI", 8, 8, 8, 0)
    whole = data + values
    if pixels is None and rng.random() < 0.4:       # entries before the orientation are whole
        return whole[:rng.randrange(directory_at + len(directory), len(whole) + 1)]
    return whole[:rng.randrange(len(data), len(whole) + 1)]


def odd_xmp(rng: random.Random, orientation: int | None) -> bytes:
    said = b'tiff:Orientation="%d"' % orientation if orientation else b'tiff:Orientation="odd"'
    text = rng.choice([b"<x:xmpmeta %s>", b"\xff\xfe\0%s", b"<?xpacket \0\0\0 %s"]) % said
    return text + rng.choice([b"", rng.randbytes(50), b"\0" * 9])


def odd_jpeg(rng: random.Random, orientation: int | None, in_xmp: bool) -> bytes:
    file = io.BytesIO()
    Image.fromarray(STORED[orientation or 1](PICTURE)).save(file, "JPEG", quality=98, subsampling=0)
    data = file.getvalue()

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    exif = b"Exif\0\0" + odd_tiff(rng, None if in_xmp else orientation, None)
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + odd_xmp(rng, orientation)
    others = [segment(0xED, b"Photoshop 3.0\0" + rng.randbytes(rng.randrange(40))),
              segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0" + b"\0\0\xff\xff"),
              segment(0xE2, b"MPF\0" + rng.randbytes(rng.randrange(40))),
              segment(0xE2, b"ICC_PROFILE\0" + rng.randbytes(rng.randrange(9))),
              segment(0xE0, b"JFIF\0"), segment(0xEE, b"Adobe\0"), segment(0xFE, rng.randbytes(9)),
              segment(0xE1, b""), segment(0xE1, b"Exif")]
    added = [segment(0xE1, exif), *rng.sample(others, rng.randrange(4))]
    if in_xmp:
        added.append(segment(0xE1, xmp))
    rng.shuffle(added)
    return data[:2] + b"".join(added) + data[2:]


def odd_png(rng: random.Random, orientation: int | None, in_xmp: bool) -> bytes:
    file = io.BytesIO()
    Image.fromarray(STORED[orientation or 1](PICTURE)).save(file, "PNG")
    data = file.getvalue()

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content) ^ rng.choice([0, 0, 0, 1])
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    block = odd_tiff(rng, None if in_xmp else orientation, None)
    profile = b"\nexif\n%8d\n%s\n" % (len(block), (b"Exif\0\0" + block).hex().encode())
    exif = rng.choice([chunk(b"eXIf", block),
                       chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
                       chunk(b"tEXt", b"Raw profile type exif\0" + profile)])
    cut_off = zlib.compress(rng.randbytes(900))[:rng.randrange(800)]
    others = [chunk(b"zTXt", b"Comment\0\0" + cut_off), chunk(b"zTXt", b"Comment"),
              chunk(b"zTXt", b"Comment\0\7" + cut_off), chunk(b"iTXt", b"A\0\1\0"),
              chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))),
              chunk(b"iTXt", b"A\0\1\0en\0\0" + cut_off), chunk(b"tEXt", rng.randbytes(30)),
              chunk(b"tEXt", b""), chunk(b"iCCP", b"sRGB\0\0" + cut_off), chunk(b"iCCP", b"a"),
              chunk(b"gAMA", b"a"), chunk(b"pHYs", b"abc"), chunk(b"cHRM", b""),
              chunk(b"sRGB", b""), chunk(b"acTL", b"a"), chunk(b"fcTL", b"abc"),
              chunk(b"zTXt", b"Raw profile type iptc\0\0" + cut_off)]
    added = [exif, *rng.sample(others, rng.randrange(5))]
    if in_xmp:
        added.append(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + odd_xmp(rng, orientation)))
    rng.shuffle(added)
    place = rng.choice([33, len(data) - 12])        # after IHDR, or before IEND
    return data[:place] + b"".join(added) + data[place:]


def odd_file(seed: int) -> tuple[bytes, str]:
    """A file with sound pixels and odd metadata, and its format."""
    rng = random.Random(seed)
    orientation = rng.choice([None, *STORED])
    in_xmp = bool(orientation) and rng.random() < 0.2
    kind = ("JPEG", "PNG", "TIFF")[seed % 3]
    if kind == "JPEG":
        return odd_jpeg(rng, orientation, in_xmp), kind
    if kind == "PNG":
        return odd_png(rng, orientation, in_xmp), kind
    return odd_tiff(rng, orientation, STORED[orientation or 1](PICTURE)), kind


def test_2000_odd_blocks_cost_no_pixel_and_no_orientation():
    bad = []
    for seed in range(N_BLOCKS):
        data, kind = odd_file(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                got = np.asarray(read_image(io.BytesIO(data))).astype(int)
        except Exception as error:
            bad.append((seed, kind, repr(error)))
            continue
        if got.shape != PICTURE.shape or abs(got - PICTURE).mean() > (3 if kind == "JPEG" else 0):
            bad.append((seed, kind, "not upright"))
    assert not bad, (len(bad), bad[:5])


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_other_formats_with_odd_blocks(kind):
    """A sound block is written, then odd bytes in its place but for the orientation."""
    if kind == "AVIF" and not features.check("avif"):
        return
    exif = Image.Exif()
    exif[270] = "a" * 40
    for seed in range(60):
        rng = random.Random(seed)
        orientation = rng.choice([*STORED])
        exif[274] = orientation
        file = io.BytesIO()
        stored = Image.fromarray(STORED[orientation](PICTURE))
        stored.save(file, kind, quality=95, exif=exif.tobytes())
        data = file.getvalue()
        order = "<" if b"II*" in data else ">"
        odd = struct.pack(order + "HI", rng.choice([1, 5, 7, 12, 99, 0]), rng.randrange(2 ** 32))
        data = data.replace(struct.pack(order + "HHI", 270, 2, 41),
                            struct.pack(order + "H", 270) + odd)
        if kind == "AVIF" and seed % 2:         # it is turned without its EXIF
            data = data.replace(b"II*\0", b"odd!").replace(b"MM\0*", b"odd!")
        got = np.asarray(read_image(io.BytesIO(data))).astype(int)
        assert got.shape == PICTURE.shape and abs(got - PICTURE).mean() < 9, (seed, orientation)


def tiff_bytes(*pages: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:], **options)
    return file.getvalue()


COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
PAGES = [Image.new("RGB", (30 + i, 20), colour) for i, colour in enumerate(COLOURS)]


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"big_tiff": True},
                                     {"compression": "jpeg"}], ids=str)
def test_the_pages_of_a_tiff_are_images_of_their_own(tmp_path, options):
    path = tmp_path / "pages.tiff"
    path.write_bytes(tiff_bytes(*PAGES, **options))
    pages = read_pages(path)
    assert [page.size for page in pages] == [(30, 20), (31, 20), (32, 20)]
    for page, colour in zip(pages, COLOURS):
        assert np.allclose(page.getpixel((9, 9)), colour, atol=8)
    with pytest.raises(ImageError, match="pages.tiff: 3 pages, where one image is expected"):
        read_image(path)
    path.write_bytes(tiff_bytes(PAGES[0], **options))
    assert len(read_pages(path)) == 1 and read_image(path).size == (30, 20)


def test_previews_and_masks_are_no_pages():
    for kind in (1, 4, 5):
        data = bytearray(tiff_bytes(*PAGES[:1]))
        [directory_at] = struct.unpack_from("<I", data, 4)
        [n] = struct.unpack_from("<H", data, directory_at)
        next_at = directory_at + 2 + 12 * n
        preview = data[directory_at + 2:next_at]
        entry = struct.pack("<HHII", 254, 4, 1, kind)
        struct.pack_into("<I", data, next_at, len(data))
        data += struct.pack("<H", n + 1) + entry + preview + bytes(4)
        assert len(read_pages(io.BytesIO(bytes(data)))) == 1


@pytest.mark.parametrize("name", ["https://example.com/a.png", "http://example.com/a.png"])
def test_an_address_gets_a_hint(name):
    with pytest.raises(ImageError, match="no such file here: .* downloaded first"):
        read_image(name)
