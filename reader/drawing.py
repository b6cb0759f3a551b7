"""A page of print: what stands where, how it is drawn, and which characters a patch shows.

Distances are pixels of the page, before it is cut into tiles. A page knows the place of every
character, so one page gives an image for the encoder, the characters of each patch for stage 0, and
the text that is read aloud.
"""
import functools
import io
import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from reader.fonts import BESIDES, PRINTABLE, Face, faces, font
from vision import SigLIPConfig, on_canvas, tile_boxes

SLOTS = 4               # characters of a patch that are kept, in reading order
SMALL_SIDE = 224        # of a tile of the encoder's lesson and of stage 1, in pixels
SMALLEST = 9            # type of fewer pixels a tile cannot show: it is a smudge
BLANK, SMUDGE = 0, 1    # classes of a slot: nothing stands there, or type that is too small
CHARACTERS = PRINTABLE + "".join(BESIDES)                       # class 2 and up
CLASS = {c: i for i, c in enumerate(CHARACTERS, start=2)}
N_CLASSES = 2 + len(CHARACTERS)
MIDDLE = 0.3            # of the type's size: the middle of a line of print above its baseline


@functools.lru_cache(100_000)
def advance(face: Face, size: float, character: str) -> float:
    """How wide a character is in a size, both in pixels, without kerning."""
    return font(face, size).getlength(character)


@dataclass
class Run:
    """A piece of one line in one face."""
    text: str
    x: float                # left
    y: float                # baseline
    face: Face
    size: float             # pixels an em
    ink: tuple[int, int, int]
    edges: np.ndarray       # where each character starts, and where the last one ends, from x on

    @property
    def right(self) -> float:
        return self.x + self.edges[-1]


@dataclass
class Page:
    """A document: its runs, lines and boxes, its text in reading order, and what one can ask."""
    kind: str
    width: int
    height: int
    paper: tuple[int, int, int] = (255, 255, 255)
    oversample: int = 1     # drawn so many times as large and scaled down: print without hinting
    degrees: float = 0.0    # turned to the left after drawing
    runs: list[Run] = field(default_factory=list)
    shapes: list[tuple] = field(default_factory=list)               # (box, fill, outline, width)
    lines: list[str] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)  # (prompt, answer)
    wear: list[tuple] = field(default_factory=list)                 # (what befalls it, how much)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def set(self, text: str, face: Face, size: float) -> tuple[str, np.ndarray]:
        """A text as the face can spell it, and its characters' edges in pixels."""
        text, n = face.spell(text), self.oversample
        edges = np.cumsum([0.0, *(advance(face, size * n, c) for c in text)]) / n
        if text:        # kerning is spread over the whole text
            edges *= font(face, size * n).getlength(text) / n / edges[-1]
        return text, edges

    def put(self, text: str, x: float, y: float, face: Face, size: float,
            ink: tuple[int, int, int], align: float = 0.0) -> Run:
        """Print a text at a baseline; align 0: it starts at x, 1: it ends there, 0.5: centred."""
        text, edges = self.set(text, face, size)
        run = Run(text, x - align * edges[-1], y, face, size, ink, edges)
        self.runs.append(run)
        return run

    def line(self, *runs: Run) -> None:
        """These runs are one line of the text that is read aloud."""
        self.lines.append(" ".join(run.text for run in runs if run.text))

    def draw(self) -> Image.Image:
        """The page as an RGB image."""
        n = self.oversample
        image = Image.new("RGB", (self.width * n, self.height * n), self.paper)
        pen = ImageDraw.Draw(image)
        for box, fill, outline, width in self.shapes:
            box = [round(n * v) for v in box]
            box = [*box[:2], max(box[0], box[2]), max(box[1], box[3])]
            pen.rectangle(box, fill, outline, round(n * width))
        for run in self.runs:
            place = (run.x * n, run.y * n) if n > 1 else (round(run.x), round(run.y))
            pen.text(place, run.text, fill=run.ink, font=font(run.face, run.size * n), anchor="ls")
        if self.degrees:
            image = image.rotate(self.degrees, Image.Resampling.BICUBIC, fillcolor=self.paper)
        if n > 1:
            image = image.reduce(n)
        for what, how_much in self.wear:
            image = worn(image, what, how_much)
        return image

    def turned(self, x: np.ndarray, y: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Where points of the page are after it is turned about its centre."""
        x, y = x - self.width / 2, y - self.height / 2
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        return self.width / 2 + x * cos + y * sin, self.height / 2 - x * sin + y * cos

    def classes(self, box: tuple[int, int, int, int], side: int, patch: int,
                shift: tuple[float, float] = (0, 0)) -> np.ndarray:
        """Which characters have their centre in which patch of the tile that shows `box`.

        shift: by which the patches are moved to the left and up, in pixels of the tile. Returns
        classes (N, SLOTS) int64, in reading order, BLANK after a patch's last one.
        """
        left, top, right, bottom = box
        x0, y0, width, height = on_canvas(right - left, bottom - top, side)
        scale, n = width / (right - left), side // patch
        found: dict[int, list[int]] = {}
        for run in self.runs:
            middles = run.x + (run.edges[1:] + run.edges[:-1]) / 2
            x, y = self.turned(middles, run.y - MIDDLE * run.size)
            inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
            column = ((x0 + (x - left) * scale + shift[0]) // patch).astype(int)
            row = ((y0 + (y - top) * scale + shift[1]) // patch).astype(int)
            small = run.size * scale < SMALLEST
            shown = (column >= 0) & (column < n) & (row >= 0) & (row < n)
            for i in np.nonzero(inside & shown)[0]:
                seen = SMUDGE if small else CLASS[run.text[i]]
                found.setdefault(int(row[i] * n + column[i]), []).append(seen)
        classes = np.zeros((n * n, SLOTS), np.int64)
        for place, seen in found.items():
            kept = [c for c in seen if c != SMUDGE][:SLOTS] or [SMUDGE]
            classes[place, :len(kept)] = kept
        return classes

    def all_classes(self, config: SigLIPConfig, shift: tuple[float, float] = (0, 0)) -> np.ndarray:
        """`classes` of all tiles into which the page is cut: (T, N, SLOTS)."""
        boxes = tile_boxes(self.width, self.height, config)
        return np.stack([self.classes(box, config.image_size, config.patch_size, shift)
                         for box in boxes])


def worn(image: Image.Image, what: str, how_much: float) -> Image.Image:
    """An image after it was blurred, stored as JPEG, or photographed with noise."""
    if what == "blur":
        return image.filter(ImageFilter.GaussianBlur(how_much))
    if what == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=round(how_much))
        return Image.open(file).convert("RGB")
    if what == "grey":
        return image.convert("L").convert("RGB")
    strength, seed = math.modf(how_much)[0] * 100, int(how_much)    # noise: seed + strength / 100
    noise = np.random.default_rng(seed).normal(0, strength, (image.height, image.width, 1))
    return Image.fromarray((np.asarray(image) + noise.astype(np.float32)).clip(0, 255)
                           .astype(np.uint8))


def wear(rng: random.Random, share: float, scale: float = 1.0) -> list[tuple]:
    """What befalls a share of the pages. scale: pixels of the page for one of the tile."""
    if rng.random() > share:
        return []
    marks = []
    if rng.random() < 0.4:
        marks.append(("blur", rng.uniform(0.2, 0.75) * scale))
    if rng.random() < 0.4:
        marks.append(("noise", rng.randrange(10 ** 6) + rng.uniform(0.005, 0.12)))
    if rng.random() < 0.4:
        marks.append(("jpeg", rng.randint(35, 95)))
    if rng.random() < 0.3:
        marks.append(("grey", 1))
    return marks


def colours(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(paper, ink): mostly dark on white; some grey, coloured, faint, or light on dark."""
    kind = rng.random()
    if kind < 0.35:
        return (255, 255, 255), (rng.choice([0, 0, 17, 34, 51]),) * 3
    if kind < 0.65:
        return (rng.randint(225, 255),) * 3, (rng.randint(0, 90),) * 3
    if kind < 0.80:
        return (tuple(rng.randint(205, 255) for _ in range(3)),
                tuple(rng.randint(0, 120) for _ in range(3)))
    if kind < 0.88:                                             # faint
        paper = rng.randint(180, 255)
        return (paper,) * 3, (paper - rng.randint(80, 130),) * 3
    paper = tuple(rng.randint(0, 60) for _ in range(3)) if rng.random() < 0.5 else (
        rng.randint(0, 60),) * 3
    return paper, tuple(rng.randint(170, 255) for _ in range(3))


def choose_face(rng: random.Random, split: str) -> Face:
    every = faces(split)
    return rng.choices(every, [face.weight for face in every])[0]
