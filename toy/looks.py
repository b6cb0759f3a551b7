"""A toy page, and how it can look: the hard pages of the shipped model, and pages that no toy was
ever trained on.

    python -m toy.pages --draw 20 --look hard pages/
    python -m toy.pages --sheet out/looks.png           # the same five pages in every look

A page has the same text in every look, and its characters the same places, one for each patch, but
in `proportional`. There a patch shows parts of several characters. A patch becomes one visual
token, and the toy's tokens are single characters: that is beyond this toy.
"""
import functools
import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CELL = 14                   # pixels a side: a character fills one patch of the toy's encoder
TILE_CELLS = 8              # patches a side of the toy's tile


@dataclass
class Page:
    """A document as text: what stands in which cell, what one reads aloud, and what one can ask."""
    kind: str
    columns: int
    rows: int
    words: list[tuple[int, int, str]] = field(default_factory=list)     # (row, column, word)
    lines: list[str] = field(default_factory=list)                      # in reading order
    questions: list[tuple[str, str]] = field(default_factory=list)      # (prompt, answer)

    def write(self, row: int, *words: tuple[int, str]) -> None:
        """One line of the page: (column, word) pairs."""
        self.words += [(row, column, word) for column, word in words]
        self.lines.append(" ".join(word for _, word in words))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def large(self) -> bool:
        """Whether it takes several tiles."""
        return max(self.columns, self.rows) > TILE_CELLS


def draw(page: Page, look: str = "clean") -> Image.Image:
    """A page as an RGB image. Its text decides what a look leaves to chance."""
    return LOOKS[look](page, random.Random(page.text))


# --------------------------------------------------------------------------------------------------
# From cells to ink


@functools.cache
def glyph(character: str) -> Image.Image:
    """The inked mask (CELL x CELL, 8-bit grey) of one character in Pillow's built-in font, centred
    in its cell."""
    font = ImageFont.load_default(size=CELL - 1)
    mask = Image.new("L", (CELL, CELL), 0)
    left, _, right, _ = font.getbbox(character)
    place = ((CELL - right - left) / 2, -1)
    ImageDraw.Draw(mask).text(place, character, font=font, fill=255)
    return mask


@functools.cache
def styled_glyph(character: str, size: int, bold: bool, slant: float) -> Image.Image:
    """The inked mask (2 CELL x 2 CELL, 8-bit grey) of a character of Pillow's built-in font, around
    its centre."""
    side = 2 * CELL
    font = ImageFont.load_default(size=size)
    mask = Image.new("L", (side, side), 0)
    left, _, right, _ = font.getbbox(character)
    place = ((side - right - left) / 2, CELL / 2 - 1 + (CELL - 1 - size) / 2)
    stroke = 0.4 if bold else 0
    ImageDraw.Draw(mask).text(place, character, font=font, fill=255, stroke_width=stroke)
    lean = (1, slant, -slant * CELL, 0, 1, 0)
    return mask.transform(mask.size, Image.Transform.AFFINE, lean, Image.Resampling.BILINEAR)


def regular_glyph(character: str) -> Image.Image:
    """The same, upright and in one size."""
    return styled_glyph(character, CELL - 1, False, 0)


@functools.cache
def bitmap_glyph(character: str) -> Image.Image:
    """The same of Pillow's other built-in font, which has pixels instead of outlines, in twice its
    size."""
    font = ImageFont.load_default_imagefont()
    mask = Image.new("L", (CELL, CELL), 0)
    left, top, right, bottom = font.getbbox(character)
    place = ((CELL - right) // 2, (CELL - bottom) // 2)
    ImageDraw.Draw(mask).text(place, character, font=font, fill=255)
    return mask.resize((2 * CELL, 2 * CELL), Image.Resampling.NEAREST)


def typeset(page: Page, rng: random.Random, glyph: Callable[[str], Image.Image], shift: int,
            jitter: int) -> np.ndarray:
    """The page's ink (height, width), fp32 from 0 to 1.

    glyph: a mask of 2 CELL a side for a character. Every word moves by up to `shift` pixels, every
    character by up to `jitter` more.
    """
    ink = Image.new("L", (page.columns * CELL, page.rows * CELL), 0)
    for row, column, word in page.words:
        dx = rng.randint(-shift, shift)
        dy = rng.randint(-shift, shift)
        for i, character in enumerate(word):
            x = (column + i) * CELL - CELL // 2 + dx + rng.randint(-jitter, jitter)
            y = row * CELL - CELL // 2 + dy + rng.randint(-jitter, jitter)
            ink.paste(255, (x, y), glyph(character))
    return from_image(ink)


def to_image(ink: np.ndarray) -> Image.Image:
    """Ink (height, width) from 0 to 1 -> 8-bit grey."""
    return Image.fromarray((255 * ink).astype(np.uint8))


def from_image(grey: Image.Image) -> np.ndarray:
    """And back: (height, width), fp32."""
    return np.asarray(grey, np.float32) / 255


def turned(ink: np.ndarray, degrees: float) -> np.ndarray:
    return from_image(to_image(ink).rotate(degrees, Image.Resampling.BICUBIC))


def printed(ink: np.ndarray, paper: float, black: float, noise: float, seed: int) -> Image.Image:
    """Ink (height, width) -> RGB image: grey levels of paper and ink, and Gaussian noise of the
    deviation `noise`."""
    grey = paper + (black - paper) * ink
    if noise:
        grey = grey + noise * np.random.default_rng(seed).standard_normal(ink.shape, np.float32)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image after it was saved as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


# --------------------------------------------------------------------------------------------------
# The looks


def clean(page: Page, rng: random.Random) -> Image.Image:
    """One size of one font, each character centred in its cell, black on white."""
    image = Image.new("L", (page.columns * CELL, page.rows * CELL), 255)
    for row, column, word in page.words:
        for i, character in enumerate(word):
            image.paste(0, ((column + i) * CELL, row * CELL), glyph(character))
    return image.convert("RGB")


def hard(page: Page, rng: random.Random) -> Image.Image:
    """Five sizes of an upright, bold or slanted face, off the grid by up to two pixels, turned by
    up to a degree, grey paper and ink, light noise."""
    size = rng.randint(10, 14)
    bold = rng.random() < 0.4
    slant = rng.choice([0, 0, 0.2])

    def glyph_of(character: str) -> Image.Image:
        return styled_glyph(character, size, bold, slant)

    ink = turned(typeset(page, rng, glyph_of, shift=1, jitter=1), rng.uniform(-1, 1))
    paper = rng.uniform(210, 255)
    black = rng.uniform(0, 90)
    noise = rng.uniform(0, 12)
    return printed(ink, paper, black, noise, rng.getrandbits(32))


def bitmap(page: Page, rng: random.Random) -> Image.Image:
    """Another font, and nothing else."""
    ink = typeset(page, rng, bitmap_glyph, shift=0, jitter=0)
    return printed(ink, paper=255, black=0, noise=0, seed=0)


def proportional(page: Page, rng: random.Random) -> Image.Image:
    """The toy's own font as it is meant to be set, each character as wide as it is: parts of two or
    more in a patch."""
    image = Image.new("RGB", (page.columns * CELL, page.rows * CELL), "white")
    font = ImageFont.load_default(CELL - 1)
    pen = ImageDraw.Draw(image)
    for row, column, word in page.words:
        pen.text((column * CELL, row * CELL - 1), word, "black", font)
    return image


def scan(page: Page, rng: random.Random) -> Image.Image:
    """As from a scanner: turned by two degrees, blurred, specks, a dark edge, and JPEG."""
    ink = typeset(page, rng, regular_glyph, shift=1, jitter=0)
    ink = turned(ink, rng.choice([-2, 2]))
    ink = from_image(to_image(ink).filter(ImageFilter.GaussianBlur(0.8)))
    specks = np.random.default_rng(rng.getrandbits(32)).random(ink.shape) < 0.004
    ink = np.maximum(ink, specks)
    ink[:, :3] = np.maximum(ink[:, :3], 0.5)
    image = printed(ink, paper=235, black=40, noise=6, seed=rng.getrandbits(32))
    return as_jpeg(image, quality=40)


def photo(page: Page, rng: random.Random) -> Image.Image:
    """As from a phone: seen a little from one side, light falling off from one corner, warm, out of
    focus, and JPEG."""
    ink = typeset(page, rng, regular_glyph, shift=0, jitter=0)
    image = printed(ink, paper=250, black=30, noise=0, seed=0)
    w, h = image.size
    far = 0.02 * h              # so much table is seen above and below the far side
    left, right = rng.choice([(far, 0), (0, far)])
    # Counter-clockwise, from the upper left one on.
    corners = [0, -left, 0, h + left, w, h + right, w, -right]
    table = (90, 70, 50)
    image = image.transform(image.size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC,
                            fillcolor=table)
    image = image.filter(ImageFilter.GaussianBlur(0.6))
    light = 1 - 0.45 * np.add.outer(np.linspace(0, 1, h), np.linspace(0, 1, w)) / 2     # (h, w)
    warm = np.array([1.0, 0.94, 0.82])
    lit = np.asarray(image, np.float32) * light[..., None] * warm                       # (h, w, 3)
    return as_jpeg(Image.fromarray(lit.clip(0, 255).astype(np.uint8)), quality=60)


LOOKS = {"clean": clean, "hard": hard, "bitmap": bitmap, "proportional": proportional, "scan": scan,
         "photo": photo}


def sheet(pages: list[Page], gap: int = 10) -> Image.Image:
    """A row of pages in each look, twice as large as they are; `gap` pixels lie between them."""
    width = sum(page.columns for page in pages) * CELL
    height = max(page.rows for page in pages) * CELL
    size = (width + gap * (len(pages) + 1), (height + gap) * len(LOOKS) + gap)
    image = Image.new("RGB", size, (120, 120, 120))
    for row, look in enumerate(LOOKS):
        x = gap
        for page in pages:
            image.paste(draw(page, look), (x, gap + row * (height + gap)))
            x += page.columns * CELL + gap
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
