"""An image file, in whatever state it is -> an upright RGB image."""
import os
import warnings
from struct import error as struct_error

import numpy as np
from PIL import Image, ImageOps

from plumbing.settings import InputError

MAX_PIXELS = 100_000_000  # a page of 10,000 x 10,000; beyond that a small file could fill the memory


class ImageError(InputError):
    """An image that cannot be used."""


def read_image(file) -> Image.Image:
    """A path or a binary file -> an upright RGB image: EXIF rotation applied, transparency laid on white.

    Raises ImageError for what is no image, is truncated, or has more than MAX_PIXELS (nothing is decoded then).
    """
    name = file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", "image")
    try:
        with warnings.catch_warnings():         # MAX_PIXELS is ours; Pillow's own limits are near it
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{name}: {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}; "
                                 "scale it down first")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I") or image.mode == "F":     # 16 and 32 bits a sample: Pillow would clip at 255
                grey = np.nan_to_num(np.array(image, dtype=np.float32), copy=False)
                top = 65535 if image.mode.startswith("I;16") or grey.max() > 255 else 255 if grey.max() > 1 else 1
                grey *= 255 / top
                image = Image.fromarray(grey.clip(0, 255, out=grey).round(out=grey).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, RuntimeError, ArithmeticError,
            struct_error) as error:
        raise ImageError(f"{name}: not a readable image ({error})") from None
