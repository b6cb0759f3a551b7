"""Make this folder's pages again: what the reader was not taught, each by itself.

    python -m reader.hard.make OUT/     # the letters need DejaVu Sans: fonts-dejavu-core

Six pages of reader/printed/ unchanged, as a camera might have them, askew, on their side and at
half their size; and a letter in Greek and one in Cyrillic type.
"""
import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from plumbing.files import OwnFiles
from plumbing.processes import run_main
from plumbing.settings import InputError

PRINTED = Path(__file__).resolve().parents[1] / "printed"
PAGES = ["browser-1-receipt.png", "browser-5-letter.png", "office-1-letter.png",
         "office-4-form.png", "tex-1-letter.png", "tex-6-receipt.png"]
FONT = "DejaVuSans.ttf"
LETTERS = {     # text, question, answer
    "Greek": ("Αγαπητή Ελένη,\nσου στέλνω το βιβλίο που ζήτησες.\n"
              "Θα το βρεις στο ταχυδρομείο από τη Δευτέρα.\nΜε αγάπη,\nΝίκος",
              "who signed it?", "Νίκος"),
    "Cyrillic": ("Дорогая Анна,\nспасибо за письмо и за фотографии.\n"
                 "Мы приедем в пятницу, поезд в девять часов.\nТвой друг,\nИван",
                 "who signed it?", "Иван"),
}
KINDS = ["unchanged", "photograph", "askew", "on its side", "half size", *LETTERS]
TABLE = (112, 96, 80)


def photographed(page: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """As a camera held by hand has it: on a table, in perspective, lit from one side, not sharp."""
    width, height = page.size
    margin = round(0.06 * width)
    canvas = Image.new("RGB", (width + 2 * margin, height + 2 * margin), TABLE)
    canvas.paste(page.convert("RGB"), (margin, margin))
    W, H = canvas.size
    corners = np.array([(0, 0), (W, 0), (W, H), (0, H)], float)
    seen = corners + numbers.uniform(-0.03, 0.03, (4, 2)) * W
    coefficients = perspective(corners, seen)
    canvas = canvas.transform((W, H), Image.Transform.PERSPECTIVE, coefficients,
                              Image.Resampling.BICUBIC, fillcolor=TABLE)
    light = np.linspace(1.0, numbers.uniform(0.55, 0.7), W)[None, :, None]          # (1, W, 1)
    pixels = np.asarray(canvas) * light + numbers.normal(0, 6, (H, W, 1))           # (H, W, 3)
    canvas = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return canvas.filter(ImageFilter.GaussianBlur(0.6))


def perspective(to: np.ndarray, seen: np.ndarray) -> list[float]:
    """The eight numbers with which Pillow takes the corners `to` (4, 2) from `seen` (4, 2)."""
    rows, values = [], []
    for (x, y), (u, v) in zip(to, seen):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        values += [u, v]
    return np.linalg.solve(np.array(rows), np.array(values)).tolist()


def changed(page: Image.Image, numbers: np.random.Generator) -> dict[str, Image.Image]:
    """A page of print in each way that the reader was not taught."""
    page = page.convert("RGB")
    paper = page.getpixel((1, 1))
    half = (page.width // 2, page.height // 2)
    return {
        "unchanged": page,
        "photograph": photographed(page, numbers),
        "askew": page.rotate(6, Image.Resampling.BICUBIC, expand=True, fillcolor=paper),
        "on its side": page.transpose(Image.Transpose.ROTATE_90),
        "half size": page.resize(half, Image.Resampling.BOX),
    }


def letter(text: str) -> Image.Image:
    """A letter on white, 16 pixels an em. Raises InputError where the font is not installed."""
    try:
        font = ImageFont.truetype(FONT, 16)
    except OSError:
        raise InputError(f"{FONT}: is not installed: apt-get install fonts-dejavu-core") from None
    image = Image.new("RGB", (440, 170), "white")
    ImageDraw.Draw(image).multiline_text((16, 12), text, "black", font, spacing=8)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reader.hard.make", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the images and questions.jsonl go")
    folder = parser.parse_args().folder
    numbers = np.random.default_rng(0)
    lines = (PRINTED / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    known = {row["image"]: row for row in map(json.loads, lines)}
    rows, images = [], {}
    for name in PAGES:
        with Image.open(PRINTED / name) as page:
            of_page = changed(page, numbers)
        for kind, image in of_page.items():
            file = f"{kind.replace(' ', '-')}-{name[:-4]}.webp"
            images[file] = image
            rows.append({key: known[name][key] for key in ("prompt", "answer", "text")} |
                        {"image": file, "kind": kind})
    for kind, (text, prompt, answer) in LETTERS.items():
        file = f"{kind.lower()}.webp"
        images[file] = letter(text)
        rows.append({"image": file, "prompt": prompt, "answer": answer, "kind": kind, "text": text})
    files = OwnFiles(folder, [*images, "questions.jsonl"])
    files.drop_others()
    for file, image in images.items():
        data = io.BytesIO()
        image.save(data, "WEBP", quality=90)
        files.write(file, data.getvalue())
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    files.write("questions.jsonl", "".join(lines).encode())
    print(f"{len(rows)} pages and questions.jsonl in {folder}")


if __name__ == "__main__":
    run_main(main)
