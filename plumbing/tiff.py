"""TIFF: its pages without their metadata, and the orientation that EXIF, which is a TIFF, or XMP
says.

plumbing/images.py imports this where a file has any of the three. A TIFF is a chain of directories,
each of entries (tag, type, count, value or its place).
"""
import math
import re
import struct
from collections.abc import Iterator

MAX_XMP = 2 ** 20               # bytes of XMP that are looked at

# The tags without which pixels cannot be decoded, or not rightly: sizes, colours, compression,
# strips and tiles. All others are metadata.
PIXEL_TAGS = {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320,
              322, 323, 324, 325, 332, 334, 338, 339, 347, *range(512, 522), 529, 530, 531, 532,
              37439, 50674}
SUBFILE, ORIENTATION, XMP_TAG = 254, 274, 700
SIZES = (256, 257)              # width and height
PIXELS_AT = (273, 324, 513)     # the places of strips, of tiles, of an old JPEG
NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I", 16: "Q"}

# Byte order, format of a count, bytes of an entry, format of an offset.
Layout = tuple[str, str, int, str]


def tiff_layout(data: bytes) -> Layout | None:
    """How a TIFF's directories are written; None for what is no TIFF."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    is_big = data[2:4] in (b"+\0", b"\0+")
    return (order, "Q", 20, "Q") if is_big else (order, "H", 12, "I")


def number_at(data: bytes, at: int, form: str) -> int | float | None:
    """The number of a struct format; None where the data end before it."""
    if at < 0 or at + struct.calcsize(form) > len(data):
        return None
    return struct.unpack_from(form, data, at)[0]


def first_directory(data: bytes, layout: Layout) -> int:
    """Where the first directory is; 0 for nowhere."""
    order, _, _, offset = layout
    return number_at(data, 4 if offset == "I" else 8, order + offset) or 0


def entries_of(data: bytes, layout: Layout, at: int) -> dict[int, int]:
    """The place of each whole entry of a directory by its tag; the first of two with one tag."""
    order, count, size, _ = layout
    n = number_at(data, at, order + count) or 0
    first = at + struct.calcsize(order + count)
    room = max(0, len(data) - first) // size
    places: dict[int, int] = {}
    for place in range(first, first + size * min(n, room), size):
        places.setdefault(number_at(data, place, order + "H"), place)
    return places


def entry_value(data: bytes, layout: Layout, place: int | None) -> int | None:
    """The first number of an entry, whatever type it is written in; None for what is none."""
    if place is None:
        return None
    order, _, size, offset = layout
    kind = number_at(data, place + 2, order + "H")
    if kind not in NUMBERS:
        return None
    form = order + NUMBERS[kind]
    value_at = place + size - struct.calcsize(order + offset)
    if struct.calcsize(form) > struct.calcsize(order + offset):     # it is elsewhere
        value_at = number_at(data, value_at, order + offset)
    value = number_at(data, value_at, form)
    return int(value) if value is not None and math.isfinite(value) else None


# -------------------------------------------------------------------------------------------------
# The orientation, 1 to 8


def exif_orientation(block: bytes) -> int | None:
    """The orientation of an EXIF block, a small TIFF file; None where it has none."""
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    layout = tiff_layout(block)
    return directory_orientation(block, layout, first_directory(block, layout)) if layout else None


def xmp_orientation(text: bytes) -> int | None:
    """The orientation of XMP, as an attribute or as an element; None where it has none."""
    found = re.search(rb"""tiff:Orientation(?:\s*=\s*["']|>)\s*([1-8])(?![0-9])""", text)
    return int(found[1]) if found else None


def directory_orientation(data: bytes, layout: Layout, at: int) -> int | None:
    value = entry_value(data, layout, entries_of(data, layout, at).get(ORIENTATION))
    return value if value in range(1, 9) else None


# -------------------------------------------------------------------------------------------------
# Pages


def tiff_pictures(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The pages of a TIFF: its directories but those of previews and masks, without metadata.

    If it has nothing but those, the first one. What leads nowhere ends the pages before it.
    """
    layout = tiff_layout(data)
    order, _, _, offset = layout
    tidied = bytearray(data)
    pages, others = [], []          # (place, orientation)
    at = first_directory(data, layout)
    seen = set()
    while at and at not in seen:
        seen.add(at)
        places = entries_of(data, layout, at)
        if not is_picture(data, layout, places):
            break
        orientation = directory_orientation(data, layout, at)
        if orientation is None:
            orientation = xmp_orientation(entry_bytes(data, layout, places.get(XMP_TAG)))
        subfile = entry_value(data, layout, places.get(SUBFILE)) or 0
        is_page = not subfile & 0b101       # neither a preview nor a mask
        (pages if is_page else others).append((at, orientation or 1))
        following = next_directory(data, layout, at)
        drop_metadata(tidied, data, layout, at, places)
        at = following
    first_at = 4 if offset == "I" else 8
    for at, orientation in pages or others[:1]:
        struct.pack_into(order + offset, tidied, first_at, at)
        yield bytes(tidied), orientation
    if not pages and not others:
        yield data, 1                       # Pillow says what is wrong


def is_picture(data: bytes, layout: Layout, places: dict[int, int]) -> bool:
    """Whether a directory has sizes, and a place where pixels are."""
    sizes = [entry_value(data, layout, places.get(tag)) or 0 for tag in SIZES]
    return min(sizes) > 0 and any(tag in places for tag in PIXELS_AT)


def entry_bytes(data: bytes, layout: Layout, place: int | None) -> bytes:
    """The bytes of an entry's value, whose type has one each."""
    if place is None:
        return b""
    order, _, _, offset = layout
    n = number_at(data, place + 4, order + offset)
    value_at = number_at(data, place + 4 + struct.calcsize(order + offset), order + offset)
    return data[value_at:value_at + min(n, MAX_XMP)]


def next_directory(data: bytes, layout: Layout, at: int) -> int:
    """Where the directory after this one is; 0 for nowhere."""
    order, count, size, offset = layout
    n = number_at(data, at, order + count)
    return number_at(data, at + struct.calcsize(order + count) + size * n, order + offset) or 0


def drop_metadata(tidied: bytearray, data: bytes, layout: Layout, at: int,
                  places: dict[int, int]) -> None:
    """Write the directory at `at` anew, into its own place in `tidied`: its entries of PIXEL_TAGS
    alone, and none after it."""
    order, count, size, offset = layout
    kept = [data[place:place + size] for tag, place in places.items() if tag in PIXEL_TAGS]
    end = struct.pack(order + offset, 0)
    entries = struct.pack(order + count, len(kept)) + b"".join(kept)
    tidied[at:at + len(entries)] = entries
    after = at + len(entries)
    tidied[after:after + len(end)] = end[:max(0, len(tidied) - after)]
