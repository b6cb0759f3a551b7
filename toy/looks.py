"""How a toy page can look: the hard pages of the model in the box, and pages that no toy was ever trained on.

    python data.py --draw 20 --look hard pages/
    python -m toy.looks assets/looks.png                # the same five pages in every look

The text is that of `toy/pages.py` in every look, and so is its place, a character a patch, but in `proportional`. There
a patch shows parts of several characters; it becomes one word, and the toy's words are single ones: beyond this toy.
"""
import argparse
import functools
import io
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CELL = 14                                   # pixels a side: a character fills one patch of the toy's encoder


def draw(page: "Page", look: str = "clean") -> Image.Image:
    """A page of toy/pages.py as an RGB image. Its text decides what a look leaves to chance."""
    return LOOKS[look](page, random.Random(page.text))


@functools.cache
def glyph(character: str) -> Image.Image:
    """The inked mask (CELL x CELL, 8-bit grey) of one character in Pillow's built-in font, centred in its cell."""
    font = ImageFont.load_default(size=CELL - 1)
    mask = Image.new("L", (CELL, CELL), 0)
    left, _, right, _ = font.getbbox(character)
    ImageDraw.Draw(mask).text(((CELL - right - left) / 2, -1), character, font=font, fill=255)
    return mask


def clean(page: "Page", rng: random.Random) -> Image.Image:
    """One size of one font, each character centred in its cell, black on white."""
    image = Image.new("L", (page.columns * CELL, page.rows * CELL), 255)
    for row, column, word in page.words:
        for i, character in enumerate(word):
            image.paste(0, ((column + i) * CELL, row * CELL), glyph(character))
    return image.convert("RGB")


@functools.cache
def styled_glyph(character: str, size: int, bold: bool, slant: float) -> Image.Image:
    """The inked mask (2 CELL x 2 CELL, 8-bit grey) of a character of Pillow's built-in font, around its centre."""
    side, font = 2 * CELL, ImageFont.load_default(size=size)
    mask = Image.new("L", (side, side), 0)
    left, _, right, _ = font.getbbox(character)
    ImageDraw.Draw(mask).text(((side - right - left) / 2, CELL / 2 - 1 + (CELL - 1 - size) / 2), character, font=font,
                              fill=255, stroke_width=0.4 if bold else 0)
    lean = (1, slant, -slant * CELL, 0, 1, 0)
    return mask.transform(mask.size, Image.Transform.AFFINE, lean, Image.Resampling.BILINEAR)


@functools.cache
def bitmap_glyph(character: str) -> Image.Image:
    """The same of Pillow's other built-in font, which has pixels instead of outlines, in twice its size."""
    font, mask = ImageFont.load_default_imagefont(), Image.new("L", (CELL, CELL), 0)
    left, top, right, bottom = font.getbbox(character)
    ImageDraw.Draw(mask).text(((CELL - right) // 2, (CELL - bottom) // 2), character, font=font, fill=255)
    return mask.resize((2 * CELL, 2 * CELL), Image.Resampling.NEAREST)


def typeset(page: "Page", rng: random.Random, glyph, shift: int, jitter: int) -> np.ndarray:
    """The page's ink (height, width) from 0 to 1: every line moved by up to `shift` pixels, every character by up to
    `jitter` more."""
    ink = Image.new("L", (page.columns * CELL, page.rows * CELL), 0)
    for row, column, word in page.words:
        dx, dy = rng.randint(-shift, shift), rng.randint(-shift, shift)
        for i, character in enumerate(word):
            x = (column + i) * CELL - CELL // 2 + dx + rng.randint(-jitter, jitter)
            y = row * CELL - CELL // 2 + dy + rng.randint(-jitter, jitter)
            mask = glyph(character)
            ink.paste(255, (x, y), mask)
    return np.asarray(ink, np.float32) / 255


def turned(ink: np.ndarray, degrees: float) -> np.ndarray:
    image = Image.fromarray((255 * ink).astype(np.uint8))
    return np.asarray(image.rotate(degrees, Image.Resampling.BICUBIC), np.float32) / 255


def printed(ink: np.ndarray, paper: float, black: float, noise: float, seed: int) -> Image.Image:
    """Ink (height, width) -> RGB image: grey levels of paper and ink, and Gaussian noise of the deviation `noise`."""
    grey = paper + (black - paper) * ink
    if noise:
        grey = grey + noise * np.random.default_rng(seed).standard_normal(ink.shape, np.float32)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def hard(page: "Page", rng: random.Random) -> Image.Image:
    """Five sizes of an upright, bold or slanted face, off the grid by up to two pixels, turned by up to a degree, grey
    paper and ink, light noise."""
    size, bold, slant = rng.randint(10, 14), rng.random() < 0.4, rng.choice([0, 0, 0.2])
    ink = typeset(page, rng, lambda character: styled_glyph(character, size, bold, slant), shift=1, jitter=1)
    ink = turned(ink, rng.uniform(-1, 1))
    return printed(ink, rng.uniform(210, 255), rng.uniform(0, 90), rng.uniform(0, 12), rng.getrandbits(32))


def bitmap(page: "Page", rng: random.Random) -> Image.Image:
    """Another font, and nothing else."""
    return printed(typeset(page, rng, bitmap_glyph, 0, 0), 255, 0, 0, 0)


def proportional(page: "Page", rng: random.Random) -> Image.Image:
    """The toy's own font as it is meant to be set, each character as wide as it is: parts of two or more in a patch."""
    image, font = Image.new("RGB", (page.columns * CELL, page.rows * CELL), "white"), ImageFont.load_default(CELL - 1)
    pen = ImageDraw.Draw(image)
    for row, column, word in page.words:
        pen.text((column * CELL, row * CELL - 1), word, "black", font)
    return image


def scan(page: "Page", rng: random.Random) -> Image.Image:
    """As from a scanner: turned by two degrees, blurred, specks, a dark edge, and JPEG."""
    ink = turned(typeset(page, rng, lambda c: styled_glyph(c, CELL - 1, False, 0), 1, 0), rng.choice([-2, 2]))
    blurred = Image.fromarray((255 * ink).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    ink = np.asarray(blurred, np.float32) / 255
    noise = np.random.default_rng(rng.getrandbits(32))
    ink = np.maximum(ink, noise.random(ink.shape) < 0.004)
    ink[:, :3] = np.maximum(ink[:, :3], 0.5)
    return as_jpeg(printed(ink, 235, 40, 6, rng.getrandbits(32)), 40)


def photo(page: "Page", rng: random.Random) -> Image.Image:
    """As from a phone: seen a little from one side, light falling off from one corner, warm, out of focus, and JPEG."""
    image = printed(typeset(page, rng, lambda c: styled_glyph(c, CELL - 1, False, 0), 0, 0), 250, 30, 0, 0)
    (w, h), far = image.size, 0.02 * image.height       # so much table is seen above and below the far side
    left, right = rng.choice([(far, 0), (0, far)])
    corners = [0, -left, 0, h + left, w, h + right, w, -right]          # from the upper left one on, counter-clockwise
    image = image.transform(image.size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC, fillcolor=(90, 70, 50))
    image = image.filter(ImageFilter.GaussianBlur(0.6))
    light = 1 - 0.45 * np.add.outer(np.linspace(0, 1, h), np.linspace(0, 1, w)) / 2
    lit = np.asarray(image, np.float32) * light[..., None] * np.array([1.0, 0.94, 0.82])
    return as_jpeg(Image.fromarray(lit.clip(0, 255).astype(np.uint8)), 60)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


LOOKS = {"clean": clean, "hard": hard, "bitmap": bitmap, "proportional": proportional, "scan": scan, "photo": photo}


def sheet(pages: list["Page"], gap: int = 10) -> Image.Image:
    """A row of pages in each look, twice as large as they are."""
    width, height = sum(page.columns for page in pages) * CELL, max(page.rows for page in pages) * CELL
    image = Image.new("RGB", (width + gap * (len(pages) + 1), (height + gap) * len(LOOKS) + gap), (120, 120, 120))
    for row, look in enumerate(LOOKS):
        x = gap
        for page in pages:
            image.paste(draw(page, look), (x, gap + row * (height + gap)))
            x += page.columns * CELL + gap
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


if __name__ == "__main__":
    from toy.pages import held_out_documents
    parser = argparse.ArgumentParser(description="The same five pages in every look.")
    parser.add_argument("out", type=Path, help="a PNG; its folder is made if missing")
    args = parser.parse_args()
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        sheet([page for page, _, _ in held_out_documents(20, 0)[5:10]]).save(args.out)
    except (OSError, ValueError) as error:
        parser.error(f"{args.out}: {error}")
