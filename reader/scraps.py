"""One tile full of print for the encoder's lesson: lines of anything, in any face."""
import random

import numpy as np
from PIL import Image

from reader import words
from reader.drawing import SMALL_SIDE, Page, choose_face, colours, wear

LOWEST, HIGHEST = 10, 24        # pixels of type in the tile


def scrap(rng: random.Random, split: str, side: int) -> Page:
    """A square page, scaled to one tile of `side` pixels, with type of LOWEST to HIGHEST there.

    A third is drawn at its own size; the rest is scaled up or down, as pages are that do not fit.
    """
    scale = 1.0 if rng.random() < 0.35 else rng.choice([rng.uniform(0.7, 1.0), rng.uniform(1, 3)])
    paper, ink = colours(rng)
    page = Page("scrap", round(side * scale), round(side * scale), paper)
    page.oversample = 2 if scale < 1.5 and rng.random() < 0.5 else 1
    page.degrees = rng.uniform(-2, 2) if rng.random() < 0.15 else 0.0
    page.wear = wear(rng, 0.45, scale)
    low = LOWEST if rng.random() < 0.6 else 13
    size, face = rng.uniform(low, HIGHEST) * scale, choose_face(rng, split)
    prose, leading = rng.random() < 0.3, rng.uniform(1.05, 1.7)
    left = rng.choice([3, rng.randint(-20, 20), rng.randint(0, 60)]) * scale
    y = rng.uniform(-0.3, 1.2) * size
    while y < page.height + size:
        if not prose:
            if rng.random() < 0.2:
                size, face = rng.uniform(low, HIGHEST) * scale, choose_face(rng, split)
            if rng.random() < 0.3:
                left = rng.choice([3, rng.randint(-20, 20), rng.randint(0, 100)]) * scale
            if rng.random() < 0.08:
                y += size
                continue
        decorate(rng, page, left, y, size, ink)
        x = left
        while x < page.width:
            text = words.sentence(rng, 5, 12) if prose else words.anything(rng)
            run = page.put(text, x, y, face, size, ink)
            x = run.right + size * (0.3 if prose else rng.choice([0.6, 2, 4, 99]))
        y += size * (leading if prose else rng.uniform(1.05, 2.0))
    return page


def decorate(rng: random.Random, page: Page, x: float, y: float, size: float,
             ink: tuple[int, int, int]) -> None:
    """Rules, boxes and bands, as forms and tables have them, behind the print."""
    kind, thin = rng.random(), rng.choice([1, 1, 2]) * max(1, page.width / SMALL_SIDE)
    if kind < 0.06:
        page.shapes.append(((0, y + size * 0.4, page.width, y + size * 0.4 + thin), ink, None, 0))
    elif kind < 0.10:
        box = (x - 0.4 * size, y - 1.1 * size, x + rng.uniform(3, 12) * size, y + 0.45 * size)
        page.shapes.append((box, None, ink, thin))
    elif kind < 0.13:
        near = tuple((3 * p + i) // 4 for p, i in zip(page.paper, ink)) if rng.random() < 0.3 else (
            tuple((9 * p + i) // 10 for p, i in zip(page.paper, ink)))
        page.shapes.append(((0, y - 1.1 * size, page.width, y + 0.4 * size), near, None, 0))
    elif kind < 0.16:
        at = rng.uniform(0, page.width)
        page.shapes.append(((at, 0, at + thin, page.height), ink, None, 0))


FILTERS = [Image.Resampling.BICUBIC] * 3 + [Image.Resampling.BOX, Image.Resampling.LANCZOS,
                                            Image.Resampling.BILINEAR]


def lesson(seed: int, split: str, index: int, side: int,
           patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Scrap `index` of a split: pixels (side, side, 3) uint8, classes (N, SLOTS) int64."""
    rng = random.Random(f"{seed}/{split}/{index}")
    page = scrap(rng, split, side)
    image = page.draw()
    if image.width != side:
        image = image.resize((side, side), rng.choice(FILTERS))
    return np.asarray(image), page.classes((0, 0, page.width, page.height), side, patch)
