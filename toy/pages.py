"""The toy's documents and lessons: six kinds of page, one character a cell, every value random.

    python data.py --draw 20 --seed 1 pages/     # look at the data first: 20 held-out pages and questions.jsonl

A page is drawn for the encoder, and can be written out as plain text for stage 0, in which the toy's LLM learns to read
before it meets an image.
"""
import argparse
import base64
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset

from data import READ, Sample, Tokenizer, prepare
from plumbing.examples import Example, Turn
from model import IGNORE, IMAGE
from plumbing.streams import Position
from toy.looks import CELL, LOOKS, draw
from vision import SigLIPConfig, tile_boxes

STAGE0 = Path(__file__).parent / "stage0"      # an LLM that has learnt to read plain text: where stage 1 starts

# The toy's vocabulary: every byte, and the pieces of its prompts and headers (drawn pages are upper-case).
TOY_WORDS = ["user", "assistant", "\n\n", "what", " is", " the", " of", "read", " page", " it", "?", "."]


def write_toy_tokenizer(path: Path) -> None:
    """The toy's tokenizer.model: 256 bytes, then each word of TOY_WORDS by way of its prefixes."""
    tokens = [bytes([b]) for b in range(256)]
    for word in TOY_WORDS:
        tokens += [word.encode()[:n] for n in range(2, len(word) + 1) if word.encode()[:n] not in tokens]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))


# ---------------------------------------------------------------------------------------------------------------------
# The six kinds of page

SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LABELS = ["NO", "PO", "ID", "TO", "REF", "DUE", "TAX", "QTY", "TEL", "BOX", "DAY", "FOR", "VIA", "LOT", "ZIP"]


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
        return max(self.columns, self.rows) > 8         # patches a side of the toy's tile


def code(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices(SYMBOLS, k=rng.randint(low, high)))


def distinct_codes(rng: random.Random, n: int) -> list[str]:
    """n different names of three symbols, none of them a word that the page uses itself."""
    codes: list[str] = []
    while len(codes) < n:
        name = code(rng, 3, 3)
        if name not in ("SUM", "KEY", *codes):
            codes.append(name)
    return codes


def value(rng: random.Random, room: int) -> str:
    """A random string, amount or date of three symbols or more, in at most `room` >= 4 characters."""
    kind = rng.random()
    if kind < 0.5:
        return code(rng, 3, room)
    if kind < 0.75:
        return f"{rng.randint(1, 99 if room > 4 else 9)}.{rng.randint(0, 99):02}"
    return f"{rng.randint(10, 28)}/{rng.randint(1, 12 if room > 4 else 9)}"


def rows_of(rng: random.Random, rows: int, first: int, n: int) -> list[int]:
    """n of the rows first, first + 1, ..., rows - 1, in order."""
    return sorted(rng.sample(range(first, rows), n))


def fields(rng: random.Random, page: Page, rows: list[int], column: int = 0, colon: bool = False) -> None:
    """Lines of `LABEL value`, or `LABEL:value`, each with its question."""
    asked = {prompt for prompt, _ in page.questions}
    labels = rng.sample([label for label in LABELS if f"what is {label}?" not in asked], len(rows))
    for row, label in zip(rows, labels):
        gold = value(rng, 7 - len(label))
        if colon:
            page.write(row, (column, f"{label}:{gold}"))
        else:
            page.write(row, (column, label), (column + len(label) + 1, gold))
        page.questions.append((f"what is {label}?", gold))


def invoice(rng: random.Random, large: bool) -> Page:
    page = Page("invoice", 8, 16 if large else rng.choice([6, 8]))
    page.write(0, (rng.randint(0, 1), "INVOICE"))
    fields(rng, page, rows_of(rng, page.rows, 1, rng.randint(4, 6) if large else rng.randint(2, 4)))
    return page


def receipt(rng: random.Random, large: bool) -> Page:
    page = Page("receipt", 8, rng.choice([16, 24]) if large else 8)
    shop = code(rng, 4, 7)
    page.write(0, ((8 - len(shop)) // 2, shop))
    *rows, last = rows_of(rng, page.rows, 1, rng.randint(4, 6) if large else rng.randint(3, 4))
    for row, item in zip([*rows, last], [*distinct_codes(rng, len(rows)), "SUM"]):
        price = f"{rng.randint(1, 9)}.{rng.randint(0, 99):02}"
        page.write(row, (0, item), (4, price))
        page.questions.append((f"what is {item}?", price))
    return page


def letter(rng: random.Random, large: bool) -> Page:
    page = Page("letter", 8, 16 if large else 8)
    n, body = (3, rng.randint(2, 4)) if large else (2, rng.randint(1, 2))
    rows = rows_of(rng, page.rows, 0, n + body)
    fields(rng, page, rows[:n])
    for row in rows[n:]:
        first = code(rng, 2, 5)
        rest = code(rng, 1, 7 - len(first))
        page.write(row, (0, first), (len(first) + 1, rest))
    return page


def form(rng: random.Random, large: bool) -> Page:
    """`LABEL:value`; a large form has two columns, read one after the other."""
    page = Page("form", 16 if large else 8, 8)
    for column in (0, 8) if large else (0,):
        fields(rng, page, rows_of(rng, 8, 0, rng.randint(2, 3) if large else rng.randint(3, 4)), column, colon=True)
    return page


def table(rng: random.Random, large: bool) -> Page:
    """Rows by a random key; a small table has one column of values, a large one three."""
    page = Page("table", 16 if large else 8, 8)
    header = rng.sample([name for name in LABELS if len(name) == 3], 3 if large else 1)
    grid(rng, page, 0, header, rows_of(rng, 8, 1, rng.randint(2, 3) if large else rng.randint(3, 4)))
    return page


def grid(rng: random.Random, page: Page, top: int, header: list[str], rows: list[int]) -> None:
    """A line of names and, by a random key each, lines of values with their questions."""
    page.write(top, (0, "KEY"), *((4 * i, name) for i, name in enumerate(header, 1)))
    for row, key in zip(rows, distinct_codes(rng, len(rows))):
        values = [code(rng, 3, 3) for _ in header]
        page.write(row, (0, key), *((4 * i, v) for i, v in enumerate(values, 1)))
        page.questions += [(f"what is {name} of {key}?", v) for name, v in zip(header, values)]


SIZES = [(16, 16), (24, 16), (24, 24)]      # columns and rows of four, six and nine tiles


def report(rng: random.Random, large: bool) -> Page:
    """Always four to nine tiles: a name, fields in free places and, in half of the reports, a table below."""
    page = Page("report", *rng.choice(SIZES))
    page.write(0, (8 * rng.randrange(page.columns // 8), code(rng, 4, 7)))
    labels = rng.sample(LABELS, len(LABELS))
    header = [name for name in labels if len(name) == 3][:page.columns // 4 - 1] if rng.random() < 0.5 else []
    labels = [name for name in labels if name not in header]
    below = rng.randint(3, 4) if header else 0          # lines of the table
    for row in rows_of(rng, page.rows - below, 1, rng.randint(3, 5)):
        words: list[tuple[int, str]] = []
        lefts = sorted(rng.sample(range(0, page.columns, 8), rng.randint(1, 2)))
        for left in lefts:                              # a field keeps to its tile, and off one that follows
            label, width, gold = labels.pop(), 7 if left + 8 in lefts else 8, None
            while gold is None or len(label) + 1 + len(gold) > width:
                gold = value(rng, 7 - len(label))
            column = left + rng.randint(0, width - len(label) - 1 - len(gold))
            words += [(column, label), (column + len(label) + 1, gold)]
            page.questions.append((f"what is {label}?", gold))
        page.write(row, *words)
    if header:
        top = page.rows - below
        grid(rng, page, top, header, list(range(top + 1, page.rows)))
    return page


PAGES = {"invoice": invoice, "receipt": receipt, "letter": letter, "form": form, "table": table, "report": report}
KINDS = [kind for kind in PAGES if kind != "report"]       # what every toy learns; reports come with hard pages only


def drawn_page(rng: random.Random, kind: str, large: bool, split: str) -> Page:
    """A page of the split: its text decides in which it is, so that no document is in both."""
    while True:
        page = PAGES[kind](rng, large)
        if (zlib.crc32(page.text.encode()) % 10 == 0) == (split == "held-out"):
            return page


def held_out_documents(n: int, seed: int, kinds: list[str] = KINDS) -> list[tuple[Page, str, str]]:
    """n pages that no training run draws, with one question each: (page, prompt, answer). The kinds take turns, and
    a third of the pages have several tiles (of reports all)."""
    documents = []
    for i in range(n):
        rng = random.Random(f"held-out/{seed}/{i}")
        page = drawn_page(rng, kinds[i % len(kinds)], i // len(kinds) % 3 == 0, "held-out")
        documents.append((page, *rng.choice(page.questions)))
    return documents


# ---------------------------------------------------------------------------------------------------------------------
# What the toy learns in each stage, from its beginning (progress 0) to its end (1)

Lesson = tuple[Page, list[tuple[str, str]]]     # (page, [(prompt, answer), ...])


def sticker(rng: random.Random) -> Page:
    """A few words on an otherwise empty page."""
    page = Page("sticker", 8, 8)
    for row in rows_of(rng, 8, 0, rng.randint(1, 3)):
        word = code(rng, 1, 8)
        page.write(row, (rng.randint(0, 8 - len(word)), word))
    return page


def dense_text(rng: random.Random) -> Page:
    """Full lines of random words: most tokens of a transcript teach to copy."""
    page = Page("dense", 8, 8)
    for row in rows_of(rng, 8, 0, rng.randint(3, 6)):
        page.write(row, (0, code(rng, 3, 8)))
    return page


def short_lines(rng: random.Random) -> Page:
    """A word of one to three symbols in most rows, or up to four of them across two tiles: to go on from where a word
    ends to where the next one begins is what the LLM finds hardest, and a common page has few such places."""
    wide = rng.random() < 0.25
    page = Page("short", 16 if wide else 8, 8 if wide else rng.choice([8, 16, 24]))
    share = rng.uniform(0.2, 0.9)
    for row in range(page.rows):
        if wide:
            words = [(4 * i, code(rng, 1, 3)) for i in range(4) if rng.random() < 0.8]
        else:
            words = [(rng.randint(0, 5), code(rng, 1, 3))]
        if words and rng.random() < share:
            page.write(row, *words)
    return page if page.lines else short_lines(rng)


def eye_chart(rng: random.Random) -> Page:
    """Random characters all over the page, read as one line: the k-th of the answer is the k-th patch of the image.

    So the LLM can look at the right patch before it can read any, and every patch gets an error signal of its own.
    """
    page = Page("chart", 8, 8)
    cells = "".join(" " if rng.random() < 0.25 else rng.choice(SYMBOLS + "./:") for _ in range(64))
    page.words = [(row, 0, cells[8 * row:8 * row + 8]) for row in range(8)]
    page.lines = [cells]
    return page


def plain_text(page: Page, config: SigLIPConfig) -> str:
    """The page as stage 0 reads it: at the place of each visual token the character that its patch shows.

    The whole-page tile, on which nothing is legible, and the margins are spaces.
    """
    cells = [[" "] * page.columns for _ in range(page.rows)]
    for row, column, word in page.words:
        cells[row][column:column + len(word)] = word
    side, text = config.patches_per_side, ""
    for left, top, right, bottom in tile_boxes(page.columns * CELL, page.rows * CELL, config):
        if max(right - left, bottom - top) > config.image_size:
            text += " " * side * side
            continue
        x, y = (side - (right - left) // CELL) // 2, (side - (bottom - top) // CELL) // 2       # a tile is centred
        crop = ["".join(row[left // CELL:right // CELL]) for row in cells[top // CELL:bottom // CELL]]
        lines = [""] * y + [" " * x + line for line in crop]
        text += "".join(line.ljust(side) for line in lines).ljust(side * side)
    return text


def text_lesson(rng: random.Random, progress: float, split: str) -> Lesson:
    """Stage 0, plain text: to copy (dense pages, and charts all along), then to read and to look things up."""
    kind, charts = rng.random(), 0.3 - 0.2 * progress
    if kind < charts:
        page = eye_chart(rng)
        return page, [("", page.text)]
    if rng.random() > 4 * progress - 0.5:               # all dense for an eighth of the stage, none after three eighths
        page = dense_text(rng)
        return page, [("", page.text)]
    if kind < charts + 0.3:
        page = short_lines(rng) if rng.random() < 0.75 else sticker(rng)
        return page, [("", page.text)]
    page = drawn_page(rng, rng.choice(KINDS + ["table"]), progress > 0.25 and rng.random() < 0.5, split)
    return page, reading_and_questions(rng, page, read=0.25, ask=0.25)


def caption_lesson(rng: random.Random, progress: float, split: str) -> Lesson:
    """Stage 1: to see. Charts until every character is known in its patch, then words in free places among them."""
    page = eye_chart(rng) if progress < 0.6 or rng.random() < 0.4 else sticker(rng)
    return page, [("", page.text)]


def document_lesson(rng: random.Random, progress: float, split: str) -> Lesson:
    """Stage 2: to read whole pages; those of several tiles come in over the first fifth."""
    page = drawn_page(rng, rng.choice(KINDS + ["table"]), rng.random() < 0.65 * min(1, 5 * progress), split)
    return page, [(READ, page.text)]


def instruction_lesson(rng: random.Random, progress: float, split: str) -> Lesson:
    """Stage 3: to answer, and not to forget reading. Large tables, where row and column must be found across tiles, are
    asked about most."""
    kind = rng.choice(KINDS + ["table"])
    page = drawn_page(rng, kind, rng.random() < (0.8 if kind == "table" else 0.5), split)
    return page, reading_and_questions(rng, page, read=0.35, ask=0.3, most=6)


def scattered(rng: random.Random) -> Page:
    """Short words all over four to nine tiles: where the next one stands is found in the image alone, and a report asks
    that far less often."""
    page, share = Page("scattered", *rng.choice(SIZES)), rng.uniform(0.2, 0.7)
    for row in range(page.rows):
        words = [code(rng, 1, 4) if rng.random() < share else "" for _ in range(0, page.columns, 8)]
        if any(words):
            page.write(row, *((8 * i + rng.randint(0, 7 - len(word)), word) for i, word in enumerate(words) if word))
    return page


def hard_lesson(rng: random.Random, progress: float, split: str) -> Lesson:
    """Stage 3 on hard pages: reports and tables most; for its first four fifths a third are scattered pages.

    A fifth of the others are asked about without being read aloud. Where a row and a column meet has then to be found
    in the image: a page read aloud answers from its own text.
    """
    if rng.random() < 0.35 and progress < 0.8:
        page = scattered(rng)
        return page, [(READ, page.text)]
    kind = rng.choice([*KINDS, *["table"] * 2, *["report"] * 5])
    page = drawn_page(rng, kind, rng.random() < (0.9 if kind == "table" else 0.5), split)
    return page, reading_and_questions(rng, page, read=0.5, ask=0.2, most=9)


def reading_and_questions(rng: random.Random, page: Page, read: float, ask: float,
                          most: int = 3) -> list[tuple[str, str]]:
    """The page read aloud (a share of `read`), some of its questions (`ask`), or, in the rest, one after the other:
    several turns cost its image once. Not the other way round: that taught less of reading at once."""
    kind, asked = rng.random(), rng.sample(page.questions, min(most, len(page.questions)))
    return ([(READ, page.text)] if kind < 1 - ask else []) + (asked if kind >= read else [])


LESSONS = [text_lesson, caption_lesson, document_lesson, instruction_lesson]


class ToyDocuments(Dataset):
    """One stage's samples: sample i depends on (seed, stage, i, n) alone, never on a rank or a worker.

    The split "held-out" has other pages, all as the stage's last ones.
    """

    def __init__(self, stage: int, n: int, seed: int, tokenizer: Tokenizer, config: SigLIPConfig, split: str = "train",
                 tile_tokens: int | None = None, look: str = "clean"):
        self.stage, self.n, self.tokenizer, self.config, self.split = stage, n, tokenizer, config, split
        self.tile_tokens, self.look = tile_tokens, look         # of data.prepare and draw
        self.lesson = hard_lesson if stage == 3 and look == "hard" else LESSONS[stage]
        self.seed = seed if split == "train" else f"{split}/{seed}"

    def draws(self, start: Position) -> Iterator[tuple[int | None, Position]]:
        """As plumbing/streams.py's Documents.draws, for one epoch: the lessons in the order of their numbers."""
        for i in range(*(start.taken or [0]), self.n):
            yield i, Position(0, [i + 1])
        yield None, Position(1)

    def __getitem__(self, index: "int | Position") -> "Sample | Position":
        if isinstance(index, Position):
            return index
        rng = random.Random(f"{self.seed}/{self.stage}/{index}")
        progress = index / self.n if self.split == "train" else 1.0
        page, asks = self.lesson(rng, progress, self.split)
        # Stage 1 begins with clean pages; the others come in over its second quarter.
        look = "clean" if self.stage == 1 and rng.random() > 4 * progress - 1 else self.look
        images = [draw(page, look)] if self.stage > 0 else []
        first = IMAGE if self.stage > 0 else self.as_text(rng, page, progress)
        turns = []
        for i, (prompt, gold) in enumerate(asks):
            parts = [first] if i == 0 else []
            turns += [Turn("user", parts + [prompt] if prompt else parts), Turn("assistant", [gold])]
        sample = prepare(Example(images, turns, f"toy/{self.stage}/{index}"), self.tokenizer, self.config,
                         tile_tokens=self.tile_tokens)
        if self.stage == 0 and page.kind == "chart" and rng.random() < 0.8:
            self.smudge(rng, sample)
        return sample

    def smudge(self, rng: random.Random, sample: Sample) -> None:
        """Overwrite a share of a text chart's characters by any words, and do not ask for these.

        An LLM that has only met legible charts finds its place by what stands there. In stage 1 nothing legible does,
        at first: it looks nowhere, and the encoder learns nothing. A smudged chart can only be read by counting places.
        Special tokens smudge as well: an untrained connector's mean over the vocabulary is mostly made of them.
        """
        cells = sample.tokens.tolist().index(self.tokenizer.special["<|end_header_id|>"]) + 2   # after "\n\n"
        answers = (sample.labels != IGNORE).nonzero()[0].item()
        share = rng.uniform(0.2, 1.0)
        for i in range(self.config.n_patches):
            if rng.random() < share:
                sample.tokens[cells + i] = rng.randrange(len(self.tokenizer))
                sample.labels[answers + i] = IGNORE

    def as_text(self, rng: random.Random, page: Page, progress: float) -> str:
        """Stage 0's page in the image's place: ever more often laid out as the patches will be, else as plain lines."""
        laid_out = {"chart": 1.0, "dense": 0.25}.get(page.kind, 0.5 + 0.5 * progress)
        return plain_text(page, self.config) if rng.random() < laid_out else page.text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=20, metavar="N", help="held-out pages (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which pages (default: %(default)s)")
    parser.add_argument("--look", choices=LOOKS, default="clean", help="how they look (default: %(default)s)")
    parser.add_argument("--kind", choices=PAGES, help="only these pages (default: in turn all kinds but reports)")
    parser.add_argument("folder", type=Path, help="where the PNGs and questions.jsonl go; made if missing")
    args = parser.parse_args()
    if args.draw < 1:
        parser.error("--draw is at least 1")
    rows, kinds = [], [args.kind] if args.kind else KINDS
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        for i, (page, prompt, gold) in enumerate(held_out_documents(args.draw, args.seed, kinds)):
            name = f"{i:04}-{page.kind}.png"
            draw(page, args.look).save(args.folder / name)
            rows.append({"image": name, "prompt": prompt, "answer": gold, "kind": page.kind})
        (args.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        parser.error(f"{args.folder}: {error.strerror or error}")
    print(f"{len(rows)} pages and questions.jsonl in {args.folder}")


if __name__ == "__main__":
    main()
