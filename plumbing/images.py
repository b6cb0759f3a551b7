"""An image file, in whatever state it is -> an upright RGB image."""
import os
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from plumbing.settings import InputError

# A page of 10,000 x 10,000; beyond that a small file could fill the memory.
MAX_PIXELS = 100_000_000

# What Pillow raises for one damaged file or another.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, LookupError, RuntimeError,
              ArithmeticError, struct.error)


class ImageError(InputError):
    """An image that cannot be used."""


def read_image(file) -> Image.Image:
    """A path or a binary file -> an upright RGB image: EXIF rotation applied, transparency laid on
    white.

    Raises ImageError for what is no image, is truncated, or has more than MAX_PIXELS (nothing is
    decoded then).
    """
    name = file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", "image")
    try:
        with warnings.catch_warnings():     # MAX_PIXELS is ours; Pillow's own limits are near it
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{name}: {image.width} x {image.height} pixels are more than "
                                 f"{MAX_PIXELS:,}; scale it down first")
            return upright_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except UNREADABLE as error:
        raise ImageError(f"{name}: not a readable image ({error})") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = eight_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """16 or 32 bits a sample -> 8. Pillow would clip at 255.

    White is 65535 where a value above 255 says so, else 255, or 1 where no value is above that.
    """
    grey = np.array(image, dtype=np.float32)            # (height, width)
    np.nan_to_num(grey, copy=False)
    brightest = grey.max()
    if image.mode.startswith("I;16") or brightest > 255:
        white = 65535
    elif brightest > 1:
        white = 255
    else:
        white = 1
    grey *= 255 / white
    np.clip(grey, 0, 255, out=grey)                     # in place: a page may have 100 M pixels
    np.round(grey, out=grey)
    return Image.fromarray(grey.astype(np.uint8))
