"""The toy's documents and lessons: five kinds of page, one character a cell, every value random.

    python -m toy.pages --draw 20 --seed 1 pages/       # 20 held-out pages and questions.jsonl
    python -m toy.pages --draw 20 --train mine/         # and the same as train.jsonl

A page is drawn for the encoder. It can be written out as plain text too: so the toy's LLM learns to
read in stage 0, before it meets an image.

Every function that chooses at random takes a random.Random. The order of its calls is part of the
data: what toy/README.md measures holds for exactly these pages.
"""
import argparse
import functools
import io
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from data import READ, Sample, Tokenizer, prepare
from model import IGNORE
from plumbing.examples import IMAGE, Example, Turn
from plumbing.files import OwnFiles
from plumbing.processes import run_main
from plumbing.settings import a_path
from plumbing.streams import Position, numbered_draws
from plumbing.tokenizers import write_tokenizer_model
from vision import SigLIPConfig, tile_boxes

# The toy's LLM has learnt to read plain text here: stage 1 starts from it.
STAGE0 = Path(__file__).parent / "stage0"

# The toy's vocabulary: every byte, and these pieces of its prompts and headers. Drawn pages are
# upper-case.
PROMPT_TOKENS = ["user", "assistant", "\n\n", "what", " is", " the", " of", "read", " page", " it",
                 "?", "."]


def write_toy_tokenizer(path: Path) -> None:
    """The toy's tokenizer.model: all bytes, and PROMPT_TOKENS."""
    write_tokenizer_model(path, PROMPT_TOKENS)


# --------------------------------------------------------------------------------------------------
# A page as text, and drawn

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


def draw(page: Page) -> Image.Image:
    """A page as an RGB image: each character centred in its cell, black on white."""
    image = Image.new("L", (page.columns * CELL, page.rows * CELL), 255)
    for row, column, word in page.words:
        for i, character in enumerate(word):
            image.paste(0, ((column + i) * CELL, row * CELL), glyph(character))
    return image.convert("RGB")


# --------------------------------------------------------------------------------------------------
# The five kinds of page. Small ones fit 8 x 8 cells, one tile; large ones take several.

SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LABELS = ["NO", "PO", "ID", "TO", "REF", "DUE", "TAX", "QTY", "TEL", "BOX", "DAY", "FOR", "VIA",
          "LOT", "ZIP"]


def code(rng: random.Random, low: int, high: int) -> str:
    """`low` to `high` random symbols."""
    return "".join(rng.choices(SYMBOLS, k=rng.randint(low, high)))


def distinct_codes(rng: random.Random, n: int) -> list[str]:
    """n different names of three symbols, none of them a word that the page uses itself."""
    codes: list[str] = []
    while len(codes) < n:
        name = code(rng, 3, 3)
        if name not in ("SUM", "KEY", *codes):
            codes.append(name)
    return codes


def price(rng: random.Random, most: int) -> str:
    """An amount from 1.00 up to `most`.99."""
    return f"{rng.randint(1, most)}.{rng.randint(0, 99):02}"


def value(rng: random.Random, room: int) -> str:
    """A random string, amount or date of three symbols or more, in at most `room` >= 4
    characters."""
    kind = rng.random()
    if kind < 0.5:
        return code(rng, 3, room)
    if kind < 0.75:
        return price(rng, 99 if room > 4 else 9)
    return f"{rng.randint(10, 28)}/{rng.randint(1, 12 if room > 4 else 9)}"


def some_rows(rng: random.Random, first: int, stop: int, n: int) -> list[int]:
    """n of the rows first, first + 1, ..., stop - 1, in order."""
    return sorted(rng.sample(range(first, stop), n))


def write_fields(rng: random.Random, page: Page, rows: list[int], column: int = 0,
                 colon: bool = False) -> None:
    """Lines of `LABEL value`, or `LABEL:value`, each with its question, onto the page."""
    asked = {prompt for prompt, _ in page.questions}
    unused = [label for label in LABELS if f"what is {label}?" not in asked]
    for row, label in zip(rows, rng.sample(unused, len(rows))):
        gold = value(rng, 7 - len(label))
        if colon:
            page.write(row, (column, f"{label}:{gold}"))
        else:
            page.write(row, (column, label), (column + len(label) + 1, gold))
        page.questions.append((f"what is {label}?", gold))


def write_grid(rng: random.Random, page: Page, header: list[str], rows: list[int]) -> None:
    """A line of names at the top and, by a random key each, lines of values with their questions,
    onto the page."""
    columns = [4 * (i + 1) for i in range(len(header))]         # after the keys', a gap between
    page.write(0, (0, "KEY"), *zip(columns, header))
    for row, key in zip(rows, distinct_codes(rng, len(rows))):
        values = [code(rng, 3, 3) for _ in header]
        page.write(row, (0, key), *zip(columns, values))
        for name, gold in zip(header, values):
            page.questions.append((f"what is {name} of {key}?", gold))


def invoice(rng: random.Random, large: bool) -> Page:
    page = Page("invoice", 8, 16 if large else rng.choice([6, 8]))
    page.write(0, (rng.randint(0, 1), "INVOICE"))
    n = rng.randint(4, 6) if large else rng.randint(2, 4)
    write_fields(rng, page, some_rows(rng, 1, page.rows, n))
    return page


def receipt(rng: random.Random, large: bool) -> Page:
    """A shop's name, items with their prices, and their SUM, which does not add up."""
    page = Page("receipt", 8, rng.choice([16, 24]) if large else 8)
    shop = code(rng, 4, 7)
    page.write(0, ((8 - len(shop)) // 2, shop))
    n = rng.randint(4, 6) if large else rng.randint(3, 4)
    rows = some_rows(rng, 1, page.rows, n)
    items = [*distinct_codes(rng, n - 1), "SUM"]
    for row, item in zip(rows, items):
        gold = price(rng, 9)
        page.write(row, (0, item), (4, gold))
        page.questions.append((f"what is {item}?", gold))
    return page


def letter(rng: random.Random, large: bool) -> Page:
    """Fields, and lines of two words below them."""
    page = Page("letter", 8, 16 if large else 8)
    n_fields = 3 if large else 2
    n_lines = rng.randint(2, 4) if large else rng.randint(1, 2)
    rows = some_rows(rng, 0, page.rows, n_fields + n_lines)
    write_fields(rng, page, rows[:n_fields])
    for row in rows[n_fields:]:
        first = code(rng, 2, 5)
        rest = code(rng, 1, 7 - len(first))
        page.write(row, (0, first), (len(first) + 1, rest))
    return page


def form(rng: random.Random, large: bool) -> Page:
    """`LABEL:value`; a large form has two columns, read one after the other."""
    page = Page("form", 16 if large else 8, 8)
    for column in (0, 8) if large else (0,):
        n = rng.randint(2, 3) if large else rng.randint(3, 4)
        write_fields(rng, page, some_rows(rng, 0, 8, n), column, colon=True)
    return page


def table(rng: random.Random, large: bool) -> Page:
    """Rows by a random key; a small table has one column of values, a large one three."""
    page = Page("table", 16 if large else 8, 8)
    names = [name for name in LABELS if len(name) == 3]
    header = rng.sample(names, 3 if large else 1)
    n = rng.randint(2, 3) if large else rng.randint(3, 4)
    write_grid(rng, page, header, some_rows(rng, 1, 8, n))
    return page


PAGES = {"invoice": invoice, "receipt": receipt, "letter": letter, "form": form, "table": table}
KINDS = list(PAGES)


def drawn_page(rng: random.Random, kind: str, large: bool, split: str) -> Page:
    """A page of the split, "train" or "held-out": its text decides in which it is, so that no
    document is in both."""
    while True:
        page = PAGES[kind](rng, large)
        is_held_out = zlib.crc32(page.text.encode()) % 10 == 0
        if is_held_out == (split == "held-out"):
            return page


def held_out_documents(n: int, seed: int) -> list[tuple[Page, str, str]]:
    """n pages that no training run draws, with one question each: (page, prompt, answer). The kinds
    take turns, and a third of the pages have several tiles."""
    documents = []
    for i in range(n):
        rng = random.Random(f"held-out/{seed}/{i}")
        kind = KINDS[i % len(KINDS)]
        large = i // len(KINDS) % 3 == 0
        page = drawn_page(rng, kind, large, "held-out")
        prompt, gold = rng.choice(page.questions)
        documents.append((page, prompt, gold))
    return documents


# --------------------------------------------------------------------------------------------------
# Pages for lessons alone: nobody asks about them

Questions = list[tuple[str, str]]       # (prompt, answer)
Lesson = tuple[Page, Questions]


def sticker(rng: random.Random) -> Page:
    """A few words on an otherwise empty page."""
    page = Page("sticker", 8, 8)
    n = rng.randint(1, 3)
    for row in some_rows(rng, 0, 8, n):
        word = code(rng, 1, 8)
        page.write(row, (rng.randint(0, 8 - len(word)), word))
    return page


def dense_text(rng: random.Random) -> Page:
    """Full lines of random words: most tokens of a transcript teach to copy."""
    page = Page("dense", 8, 8)
    n = rng.randint(3, 6)
    for row in some_rows(rng, 0, 8, n):
        page.write(row, (0, code(rng, 3, 8)))
    return page


def short_lines(rng: random.Random) -> Page:
    """A word of one to three symbols in most rows, or up to four of them across two tiles.

    To go on from where a word ends to where the next one begins is what the LLM finds hardest, and
    a common page has few such places.
    """
    while True:
        wide = rng.random() < 0.25
        page = Page("short", 16, 8) if wide else Page("short", 8, rng.choice([8, 16, 24]))
        share = rng.uniform(0.2, 0.9)
        for row in range(page.rows):
            if wide:
                columns = [0, 4, 8, 12]
                words = [(column, code(rng, 1, 3)) for column in columns if rng.random() < 0.8]
            else:
                words = [(rng.randint(0, 5), code(rng, 1, 3))]
            if words and rng.random() < share:
                page.write(row, *words)
        if page.lines:
            return page


def eye_chart(rng: random.Random) -> Page:
    """Random characters all over the page, read as one line: the k-th of the answer is the k-th
    patch of the image.

    So the LLM can look at the right patch before it can read any, and every patch gets an error
    signal of its own.
    """
    page = Page("chart", 8, 8)
    cells = ""
    for _ in range(64):
        cells += " " if rng.random() < 0.25 else rng.choice(SYMBOLS + "./:")
    page.words = [(row, 0, cells[8 * row:8 * row + 8]) for row in range(8)]
    page.lines = [cells]
    return page


def plain_text(page: Page, config: SigLIPConfig) -> str:
    """The page as stage 0 reads it: at the place of each visual token the character that its patch
    shows.

    The whole-page tile, on which nothing is legible, and the margins are spaces.
    """
    cells = [[" "] * page.columns for _ in range(page.rows)]
    for row, column, word in page.words:
        cells[row][column:column + len(word)] = word
    side = config.patches_per_side
    text = ""
    for box in tile_boxes(page.columns * CELL, page.rows * CELL, config):       # in pixels
        left, top, right, bottom = (pixels // CELL for pixels in box)           # in cells
        columns = right - left
        rows = bottom - top
        if max(columns, rows) > side:       # the whole page
            text += " " * side * side
            continue
        margin = " " * ((side - columns) // 2)                  # a tile is centred
        lines = [""] * ((side - rows) // 2)
        lines += [margin + "".join(row[left:right]) for row in cells[top:bottom]]
        text += "".join(line.ljust(side) for line in lines).ljust(side * side)
    return text


# --------------------------------------------------------------------------------------------------
# What the toy learns in each stage, from its beginning (progress 0) to its end (1)


def reading_and_questions(rng: random.Random, page: Page, read: float, ask: float,
                          most: int = 3) -> Questions:
    """The page read aloud (a share of `read`), some of its questions (`ask`), or, in the rest, one
    after the other: several turns cost its image once.

    Not the other way round: that taught less of reading at once.
    """
    kind = rng.random()
    questions = rng.sample(page.questions, min(most, len(page.questions)))
    if kind < read:
        questions = []
    reading = [(READ, page.text)] if kind < 1 - ask else []
    return reading + questions


def text_lesson(rng: random.Random, progress: float, split: str) -> Lesson:
    """Stage 0, plain text: to copy (dense pages, and charts all along), then to read and to look
    things up."""
    kind = rng.random()
    charts = 0.3 - 0.2 * progress
    if kind < charts:
        page = eye_chart(rng)
        return page, [("", page.text)]
    # All dense for an eighth of the stage, none after three eighths.
    if rng.random() > 4 * progress - 0.5:
        page = dense_text(rng)
        return page, [("", page.text)]
    if kind < charts + 0.3:
        page = short_lines(rng) if rng.random() < 0.75 else sticker(rng)
        return page, [("", page.text)]
    kind_of_page = rng.choice(KINDS + ["table"])
    large = progress > 0.25 and rng.random() < 0.5
    page = drawn_page(rng, kind_of_page, large, split)
    return page, reading_and_questions(rng, page, read=0.25, ask=0.25)


def caption_lesson(rng: random.Random, progress: float, split: str) -> Lesson:
    """Stage 1: to see. Charts until every character is known in its patch, then words in free
    places among them."""
    page = eye_chart(rng) if progress < 0.6 or rng.random() < 0.4 else sticker(rng)
    return page, [("", page.text)]


def document_lesson(rng: random.Random, progress: float, split: str) -> Lesson:
    """Stage 2: to read whole pages; those of several tiles come in over the first fifth."""
    kind = rng.choice(KINDS + ["table"])
    large = rng.random() < 0.65 * min(1, 5 * progress)
    page = drawn_page(rng, kind, large, split)
    return page, [(READ, page.text)]


def instruction_lesson(rng: random.Random, progress: float, split: str) -> Lesson:
    """Stage 3: to answer, and not to forget reading. Large tables, where row and column must be
    found across tiles, are asked about most."""
    kind = rng.choice(KINDS + ["table"])
    large = rng.random() < (0.8 if kind == "table" else 0.5)
    page = drawn_page(rng, kind, large, split)
    return page, reading_and_questions(rng, page, read=0.35, ask=0.3, most=6)


LESSONS = [text_lesson, caption_lesson, document_lesson, instruction_lesson]        # by stage


class ToyDocuments(Dataset):
    """One stage's samples: sample i depends on (seed, stage, i, n) alone, never on a rank or a
    worker.

    The split "held-out" has other pages, all as the stage's last ones. tile_tokens: as data.prepare
    takes it.
    """

    def __init__(self, stage: int, n: int, seed: int, tokenizer: Tokenizer, config: SigLIPConfig,
                 split: str = "train", tile_tokens: int | None = None):
        self.stage = stage
        self.n = n
        self.seed = seed if split == "train" else f"{split}/{seed}"
        self.tokenizer = tokenizer
        self.config = config
        self.split = split
        self.tile_tokens = tile_tokens

    def draws(self, start: Position) -> Iterator[tuple[int | None, Position]]:
        return numbered_draws(self.n, start)

    def __getitem__(self, index: int | Position) -> Sample | Position:
        if isinstance(index, Position):
            return index
        rng = random.Random(f"{self.seed}/{self.stage}/{index}")
        progress = index / self.n if self.split == "train" else 1.0
        page, questions = LESSONS[self.stage](rng, progress, self.split)
        if self.stage == 0:
            images = []
            document = self.as_text(rng, page, progress)
        else:
            images = [draw(page)]
            document = IMAGE
        turns = []
        for prompt, gold in questions:
            parts = [prompt] if prompt else []
            turns += [Turn("user", parts), Turn("assistant", [gold])]
        turns[0].parts.insert(0, document)
        example = Example(images, turns, f"toy/{self.stage}/{index}")
        sample = prepare(example, self.tokenizer, self.config, tile_tokens=self.tile_tokens)
        if self.stage == 0 and page.kind == "chart" and rng.random() < 0.8:
            self.smudge(rng, sample)
        return sample

    def as_text(self, rng: random.Random, page: Page, progress: float) -> str:
        """Stage 0's page in the image's place: ever more often laid out as the patches will be,
        else as plain lines."""
        laid_out = {"chart": 1.0, "dense": 0.25}.get(page.kind, 0.5 + 0.5 * progress)
        return plain_text(page, self.config) if rng.random() < laid_out else page.text

    def smudge(self, rng: random.Random, sample: Sample) -> None:
        """Overwrite a share of a text chart's characters, in `sample`, by any tokens, and do not
        ask for these.

        An LLM that has only met legible charts finds its place by what stands there. In stage 1
        nothing legible does, at first: it looks nowhere, and the encoder learns nothing. A smudged
        chart can only be read by counting places. Special tokens smudge as well: an untrained
        connector's mean over the vocabulary is mostly made of them.
        """
        header_end = self.tokenizer.special["<|end_header_id|>"]
        cells = sample.tokens.tolist().index(header_end) + 2            # after "\n\n"
        answers = (sample.labels != IGNORE).nonzero()[0].item()
        share = rng.uniform(0.2, 1.0)
        for i in range(self.config.n_patches):
            if rng.random() < share:
                sample.tokens[cells + i] = rng.randrange(len(self.tokenizer))
                sample.labels[answers + i] = IGNORE


# --------------------------------------------------------------------------------------------------
# The command


def draw_pages(folder: Path, n: int, seed: int, train: bool) -> None:
    """n held-out pages as PNGs, and questions.jsonl: image, prompt, answer and kind of each.

    train: train.jsonl beside it has the same as `train.py --data` takes it (MS-Swift's format).
    Raises InputError where the folder has files of these names that are not from here.
    """
    documents = held_out_documents(n, seed)
    names = [f"{i:04}-{page.kind}.png" for i, (page, _, _) in enumerate(documents)]
    tables = ["questions.jsonl", "train.jsonl"] if train else ["questions.jsonl"]
    files = OwnFiles(folder, [*names, *tables])
    files.drop_others()
    questions, samples = [], []
    for name, (page, prompt, gold) in zip(names, documents):
        image = io.BytesIO()
        draw(page).save(image, "PNG")
        files.write(name, image.getvalue())
        questions.append({"image": name, "prompt": prompt, "answer": gold, "kind": page.kind})
        turns = [{"role": "user", "content": "<image>" + prompt},
                 {"role": "assistant", "content": gold}]
        samples.append({"images": [name], "messages": turns})
    for name, rows in zip(tables, (questions, samples)):
        files.write(name, "".join(json.dumps(row) + "\n" for row in rows).encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.pages", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=20, metavar="N",
                        help="held-out pages (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which pages (default: %(default)s)")
    parser.add_argument("--train", action="store_true",
                        help="write the questions as train.jsonl too, for `train.py --data`")
    parser.add_argument("out", type=a_path,
                        help="the folder for the PNGs and questions.jsonl; made if missing")
    args = parser.parse_args()
    if args.draw < 1:
        parser.error("--draw is at least 1")
    draw_pages(args.out, args.draw, args.seed, args.train)
    print(f"{args.draw} pages and questions.jsonl in {args.out}")


if __name__ == "__main__":
    run_main(main)
