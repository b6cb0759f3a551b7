"""An image file, in whatever state it is -> upright RGB images, one a page.

Pixels and metadata are read apart. Of the metadata only the orientation is read, by a reader of our
own, to which nothing is too odd. Pillow is given the pixels alone: no EXIF, XMP or text can cost
them.
"""
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from plumbing.settings import ImageError

# A page of 10,000 x 10,000; beyond that a small file could fill the memory.
MAX_PIXELS = 100_000_000
# Of a file's pages together.
MAX_PAGE_PIXELS = 4 * MAX_PIXELS
MAX_PAGES = 1000
MAX_BYTES = 2 ** 31         # of a file
MAX_TEXT = 2 ** 20          # bytes of a compressed text that are looked at

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Of other pictures, in whose comments %PDF- may stand.
OTHERS = (b"GIF8", b"RIFF", b"BM", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
XMP = b"http://ns.adobe.com/xap/1.0/\0"

# What makes a stored picture upright, by the value of its orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Picture = tuple[bytes, int | None]      # a file of one page without metadata, its orientation


def read_image(file) -> Image.Image:
    """A path or a binary file -> an upright RGB image: its orientation applied, transparency laid
    on white.

    Raises ImageError for what is no image, is truncated, has several pages (read_pages), or more
    than MAX_PIXELS (nothing is decoded then).
    """
    name = name_of(file)
    pictures = pictures_of(read_bytes(file, name), name)
    first = next(pictures)
    more = sum(1 for _ in pictures)
    if more:
        raise ImageError(f"{name}: {1 + more} pages, where one image is expected: save each page "
                         "as a file")
    return read_picture(*first, name)


def read_pages(file, chosen: str | None = None) -> list[Image.Image]:
    """A path or a binary file -> its pages, as read_image reads them: several of a PDF or a TIFF,
    else one.

    chosen: some of them, "2", "2-3" or "2,5-7". Raises ImageError, also for pages of more than
    MAX_PAGE_PIXELS together, and InputError for a PDF without pypdfium2.
    """
    name = name_of(file)
    pages = []
    n_pixels = 0
    for picture in pictures_of(read_bytes(file, name), name, chosen):
        page = read_picture(*picture, name)
        n_pixels += page.width * page.height
        if n_pixels > MAX_PAGE_PIXELS:
            raise ImageError(f"{name}: pages of more than {MAX_PAGE_PIXELS:,} pixels together; "
                             "scale them down first, or save some of them apart")
        if len(pages) == MAX_PAGES:
            raise ImageError(f"{name}: more than {MAX_PAGES:,} pages: save some of them apart, or "
                             "choose some with sample.py --pages")
        pages.append(page)
    return pages


def name_of(file) -> str:
    return file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", "image")


def read_bytes(file, name: str) -> bytes:
    """The content of a path or a binary file. Raises ImageError."""
    try:
        if not isinstance(file, (str, os.PathLike)):
            file.seek(0)
            return file.read()
        with open(file, "rb") as opened:
            if os.fstat(opened.fileno()).st_size > MAX_BYTES:
                raise ImageError(f"{name}: larger than {MAX_BYTES:,} bytes")
            data = opened.read(MAX_BYTES + 1)       # a device says that it has no bytes
            if len(data) > MAX_BYTES:
                raise ImageError(f"{name}: larger than {MAX_BYTES:,} bytes")
            return data
    except FileNotFoundError:
        hint = ""
        if re.match(r"https?:", str(name)):
            hint = " here: an image on the web is downloaded first, then named by its file"
        raise ImageError(f"{name}: no such file{hint}") from None
    except PermissionError:
        raise ImageError(f"{name}: it may not be read (permission denied)") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name}: not a readable image ({reason})") from None


# --------------------------------------------------------------------------------------------------
# Pixels


def read_picture(data: bytes, orientation: int | None, name: str) -> Image.Image:
    """A file of one page -> an upright RGB image. Raises ImageError."""
    try:
        with warnings.catch_warnings():     # MAX_PIXELS is ours; Pillow's own limits are near it
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            with image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(f"{name}: {image.width} x {image.height} pixels are more than "
                                     f"{MAX_PIXELS:,}; scale it down first")
                image.load()
                if orientation is None:     # of a format that Pillow alone knows
                    orientation = stated_orientation(image)
                image = in_rgb(image)
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        return image
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except Image.UnidentifiedImageError:
        why = "of no format that Pillow knows"
        if not data:
            why = "the file is empty"
        elif data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
            why = "HEIC, as of a phone: save it as JPEG first"
        raise ImageError(f"{name}: not a readable image ({why})") from None
    except Exception as error:      # a damaged file shows itself in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: not a readable image ({reason})") from None


def in_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode -> RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = eight_bits(image)
        if isinstance(clear := image.info.get("transparency"), int):    # the grey that is paper
            seen = np.where(np.array(image) == clear, 0, 255)           # (height, width)
            grey.putalpha(Image.fromarray(seen.astype(np.uint8)))
        image = grey
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """16 or 32 bits a sample -> 8. Pillow would clip at 255.

    White of 16 bits is 65535, or what the bits say that a TIFF has. Of 32 bits it is 65535 where a
    value above 255 says so, else 255, or 1 where no value is above that.
    """
    grey = np.array(image, dtype=np.float32)            # (height, width)
    np.nan_to_num(grey, copy=False)
    brightest = grey.max()
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, 16)            # BitsPerSample: 12 of a scanner
        white = 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
    elif brightest > 255:
        white = 65535
    elif brightest > 1:
        white = 255
    else:
        white = 1
    grey *= 255 / white
    np.clip(grey, 0, 255, out=grey)                     # in place: a page may have 100 M pixels
    np.round(grey, out=grey)
    if getattr(image, "tag_v2", {}).get(262) == 0:      # a TIFF, 0 is white: Pillow turns 8 bits
        np.subtract(255, grey, out=grey)
    return Image.fromarray(grey.astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# Pages without their metadata, and the orientation


def pictures_of(data: bytes, name: str, chosen: str | None = None) -> Iterator[Picture]:
    """The pages of a file, one at least, each as a file of its own."""
    if b"%PDF-" in data[:1024] and not data.startswith((JPEG, PNG, *TIFF, *OTHERS)):
        from plumbing.pdf import pdf_pictures
        yield from pdf_pictures(data, name, chosen, MAX_PAGE_PIXELS)
    elif chosen:
        from plumbing.pdf import chosen_pictures
        yield from chosen_pictures(lambda: pictures_of(data, name), name, chosen)
    elif data.startswith(JPEG):
        yield jpeg_picture(data)
    elif data.startswith(PNG):
        yield png_picture(data)
    elif data.startswith(TIFF):
        from plumbing.tiff import tiff_pictures
        yield from tiff_pictures(data)
    elif data[4:8] == b"ftyp":              # AVIF: its EXIF item becomes one that nobody knows
        yield re.sub(rb"(?s)(infe.{8,10})Exif", rb"\1skip", data[:2 ** 16]) + data[2 ** 16:], None
    else:
        yield data, None


def stated_orientation(image: Image.Image) -> int:
    """The orientation of an image that Pillow has opened, by its EXIF or XMP: WebP's, and AVIF's,
    for which Pillow writes such a block by the picture's own rotation."""
    exif, xmp = image.info.get("exif"), image.info.get("xmp")
    return orientation_of(exif if isinstance(exif, bytes) else b"",
                          xmp if isinstance(xmp, bytes) else b"")


def orientation_of(exif: bytes, xmp: bytes) -> int:
    """What EXIF says, or else XMP, from 1 to 8; 1, upright, where neither can be read."""
    if not exif and not xmp:
        return 1
    from plumbing.tiff import exif_orientation, xmp_orientation
    return exif_orientation(exif) or xmp_orientation(xmp) or 1


# -------------------------------------------------------------------------------------------------
# JPEG: segments of a marker and a length, then the scans


def jpeg_picture(data: bytes) -> Picture:
    """A JPEG without its segments of applications, and its orientation."""
    kept = [JPEG]
    exif, xmp = b"", b""
    at = len(JPEG)
    while True:
        at = data.find(b"\xff", at)         # what is no marker is skipped, as decoders do
        if at < 0 or at + 4 > len(data):
            break
        marker = data[at + 1]
        if marker == 0xFF:                  # filling
            at += 1
            continue
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:        # markers without a length
            at += 2
            continue
        if marker in (0xD9, 0xDA):          # the end, or a scan: pixels from here on
            kept.append(data[at:])
            break
        stop = at + 2 + max(2, int.from_bytes(data[at + 2:at + 4], "big"))
        segment = data[at + 4:stop]
        if tells_of_pixels(marker, segment):
            kept.append(data[at:stop])
        elif marker == 0xE1 and segment.startswith(XMP):
            xmp += segment[len(XMP):]
        elif marker == 0xE1 and segment.startswith(b"Exif\0"):
            exif += segment[6:]             # a long block goes on in the next segment
        at = stop
    return b"".join(kept), orientation_of(exif, xmp)


def tells_of_pixels(marker: int, segment: bytes) -> bool:
    """Whether a decoder needs a JPEG's segment: all but comments and those of applications, of
    which JFIF's and Adobe's tell the colours."""
    if marker == 0xE0:
        return segment.startswith(b"JFIF\0") and len(segment) >= 14
    if marker == 0xEE:
        return segment.startswith(b"Adobe") and len(segment) >= 12
    return not (0xE0 <= marker <= 0xEF or marker == 0xFE)


# -------------------------------------------------------------------------------------------------
# PNG: chunks of a length, a kind, the content and a checksum


def png_picture(data: bytes) -> Picture:
    """A PNG without its ancillary chunks but the transparency, and its orientation."""
    kept = [PNG]
    exif, profile, xmp = b"", b"", b""
    at = len(PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        stop = at + 12 + length
        content = data[at + 8:stop - 4]
        if not kind[0] & 0x20:              # an upper-case letter: no decoder may skip it
            kept.append(data[at:stop])
        elif kind == b"tRNS":
            if data[stop - 4:stop] == zlib.crc32(kind + content).to_bytes(4, "big"):
                kept.append(in_eight_bits(data[at:stop], data[24:26]))
        elif kind == b"eXIf":
            exif = content
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, text = png_text(kind, content)
            if keyword in (b"Raw profile type exif", b"Raw profile type APP1"):
                profile = raw_profile(text)
            elif keyword == b"XML:com.adobe.xmp":
                xmp = text
        at = stop
        if kind == b"IEND":
            break
    kept.append(data[at:at + 8])            # half a chunk's head: Pillow says what is wrong
    return b"".join(kept), orientation_of(exif or profile, xmp or profile)


def in_eight_bits(chunk: bytes, kind: bytes) -> bytes:
    """A PNG's tRNS chunk, its grey or colour that is paper in 8 bits, as Pillow makes grey of 2 and
    4 bits and colours of 16. kind: the bits of a sample, and the type of its colour."""
    if kind in (b"\x02\x00", b"\x04\x00") and len(chunk) == 14:
        grey = int.from_bytes(chunk[8:10], "big") * 255 // (2 ** kind[0] - 1)
        content = b"tRNS" + min(grey, 0xFFFF).to_bytes(2, "big")
    elif kind == b"\x10\x02" and len(chunk) == 18:
        colour = bytes([0, chunk[8], 0, chunk[10], 0, chunk[12]])       # the high byte of each
        content = b"tRNS" + colour
    else:
        return chunk
    return chunk[:4] + content + zlib.crc32(content).to_bytes(4, "big")


def png_text(kind: bytes, content: bytes) -> tuple[bytes, bytes]:
    """The keyword and the text of a chunk, of which only the first MAX_TEXT bytes matter."""
    keyword, _, text = content.partition(b"\0")
    if kind == b"zTXt":                     # after a byte for the method
        return keyword, inflated(text[1:])
    if kind == b"iTXt":                     # is it compressed, method, language, keyword, text
        is_compressed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
        return keyword, inflated(text) if is_compressed else text[:MAX_TEXT]
    return keyword, text[:MAX_TEXT]


def inflated(data: bytes) -> bytes:
    """The first MAX_TEXT bytes of what was compressed, or as far as it is whole."""
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT)
    except zlib.error:
        return b""


def raw_profile(text: bytes) -> bytes:
    """ImageMagick's way to write a block as text: its name, its length, then hexadecimal digits, on
    lines of their own."""
    digits = re.sub(rb"[^0-9a-fA-F]", b"", b"".join(text.split(b"\n")[3:]))
    return bytes.fromhex(digits[:len(digits) // 2 * 2].decode())
