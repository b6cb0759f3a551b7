"""Text and pages -> training samples: tokenizer, chat format, and the toy's drawn documents.

    python data.py --draw 20 --seed 1 pages/     # look at the data first: 20 held-out pages and questions.jsonl

A sample is one packed stretch of tokens: begin-of-text, the user's header, IMAGE at the place of every visual token,
the prompt, the assistant's header, the answer. Only answers and their end-of-turn token are supervised.
"""
import argparse
import base64
import functools
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model import IGNORE, IMAGE, AlignVLM, CheckpointError
from vision import SigLIPConfig, tile, tile_boxes

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

# Llama 3's split of text into pieces, within which bytes are merged.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Llama 3's 256 special tokens follow the last rank; these have a name.
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                   "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                   "<|eot_id|>", "<|python_tag|>", "<|image|>"]
# The toy's vocabulary: every byte, and the pieces of its prompts and headers (drawn pages are upper-case).
TOY_WORDS = ["user", "assistant", "\n\n", "what", " is", " the", " of", "read", " page", " it", "?", "."]


class Tokenizer:
    """Llama 3's tokenizer.model: lines of `base64 rank`, read into a tiktoken Encoding with Llama 3's special tokens."""

    def __init__(self, path: str | Path):
        self.path, ranks = Path(path), {}
        try:
            for line in self.path.read_bytes().splitlines():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            if not ranks:
                raise ValueError("empty")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; a model folder holds its tokenizer") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: not lines of `base64 rank` ({error})") from None
        names = LLAMA3_SPECIALS + [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(LLAMA3_SPECIALS) + 2)]
        self.special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.encoding = tiktoken.Encoding(self.path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        self.stop = {self.special["<|end_of_text|>"], self.special["<|eom_id|>"], self.special["<|eot_id|>"]}

    def __len__(self) -> int:
        return self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Text is only ever text: `<|eot_id|>` in it is ten characters of prose, not the token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)


def write_toy_tokenizer(path: Path) -> None:
    """The toy's tokenizer.model: 256 bytes, then each word of TOY_WORDS by way of its prefixes."""
    tokens = [bytes([b]) for b in range(256)]
    for word in TOY_WORDS:
        tokens += [word.encode()[:n] for n in range(2, len(word) + 1) if word.encode()[:n] not in tokens]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))


# ---------------------------------------------------------------------------------------------------------------------
# Chat format


@dataclass
class Turn:
    """One message: its parts in order, each a string or IMAGE, the place of the sample's next image."""
    role: str
    parts: list


def split_images(text: str) -> list:
    """A data set's text -> a turn's parts: its `<image>` or `<|image|>` marks where an image goes.

    For the readers of data sets only: what a user types stays text.
    """
    return [IMAGE if part in ("<image>", "<|image|>") else part
            for part in re.split(r"(<image>|<\|image\|>)", text) if part]


@dataclass
class Example:
    """What every reader of a data set yields: images, turns that refer to them, and a name."""
    images: list[Image.Image]
    turns: list[Turn]
    key: str


@dataclass
class Sample:
    """An example ready for the model: tokens and labels (L,), pixels (T, 3, S, S)."""
    tokens: Tensor
    labels: Tensor
    pixels: Tensor
    key: str


def encode_chat(turns: list[Turn], tokenizer: Tokenizer, visual_tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Turns -> tokens and labels (L,) in Llama 3's chat format; image i takes visual_tokens[i] positions.

    labels[t] is the token that should follow tokens[t], or IGNORE outside the assistant's answers. Unless the last
    turn is the assistant's, the sequence ends with its header, ready to be continued.
    """
    special, counts = tokenizer.special, iter(visual_tokens)
    tokens, answers = [special["<|begin_of_text|>"]], [False]

    def add(ids: list[int], supervised: bool = False) -> None:
        tokens.extend(ids)
        answers.extend([supervised] * len(ids))

    def header(role: str) -> None:
        add([special["<|start_header_id|>"], *tokenizer.encode(role), special["<|end_header_id|>"],
             *tokenizer.encode("\n\n")])

    for turn in turns:
        header(turn.role)
        supervised = turn.role == "assistant"
        for part in turn.parts:
            add([IMAGE] * next(counts) if part == IMAGE else tokenizer.encode(part), supervised)
        add([special["<|eot_id|>"]], supervised)
    if turns[-1].role != "assistant":
        header("assistant")
    labels = [t if a else IGNORE for t, a in zip(tokens[1:] + [0], answers[1:] + [False])]
    return torch.tensor(tokens), torch.tensor(labels)


def prepare(example: Example, tokenizer: Tokenizer, config: SigLIPConfig, max_tiles: int = 9) -> Sample:
    """Tile an example's images and encode its turns."""
    tiles = [tile(image, config, max_tiles) for image in example.images]
    tokens, labels = encode_chat(example.turns, tokenizer, [len(t) * config.n_patches for t in tiles])
    side = config.image_size
    return Sample(tokens, labels, torch.cat([torch.empty(0, 3, side, side), *tiles]), example.key)


def pack(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Samples -> one row: tokens (1, L), labels (1, L), pixels (T, 3, S, S), the samples' lengths."""
    return (torch.cat([s.tokens for s in samples])[None], torch.cat([s.labels for s in samples])[None],
            torch.cat([s.pixels for s in samples]), [len(s.tokens) for s in samples])


# ---------------------------------------------------------------------------------------------------------------------
# The toy's documents: five kinds of page, one character a cell, every value random

CELL = 14                                   # pixels a side: a character fills one patch of the toy's encoder
SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LABELS = ["NO", "PO", "ID", "TO", "REF", "DUE", "TAX", "QTY", "TEL", "BOX", "DAY", "FOR", "VIA", "LOT", "ZIP"]
READ = "read the page"                      # the prompt of stage 2


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
        return max(self.columns, self.rows) > 8


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
    rows = rows_of(rng, 8, 1, rng.randint(2, 3) if large else rng.randint(3, 4))
    page.write(0, (0, "KEY"), *((4 * i, name) for i, name in enumerate(header, 1)))
    for row, key in zip(rows, distinct_codes(rng, len(rows))):
        values = [code(rng, 3, 3) for _ in header]
        page.write(row, (0, key), *((4 * i, v) for i, v in enumerate(values, 1)))
        page.questions += [(f"what is {name} of {key}?", v) for name, v in zip(header, values)]
    return page


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


def eye_chart(rng: random.Random) -> Page:
    """Random characters all over the page, read as one line: the k-th of the answer is the k-th patch of the image.

    So the LLM can look at the right patch before it can read any, and every patch gets an error signal of its own.
    """
    page = Page("chart", 8, 8)
    cells = "".join(" " if rng.random() < 0.25 else rng.choice(SYMBOLS + "./:") for _ in range(64))
    page.words = [(row, 0, cells[8 * row:8 * row + 8]) for row in range(8)]
    page.lines = [cells]
    return page


PAGES = {"invoice": invoice, "receipt": receipt, "letter": letter, "form": form, "table": table}
KINDS = list(PAGES)


@functools.cache
def glyph(character: str) -> Image.Image:
    """The inked mask (CELL x CELL, 8-bit grey) of one character in Pillow's built-in font, centred in its cell."""
    font = ImageFont.load_default(size=CELL - 1)
    mask = Image.new("L", (CELL, CELL), 0)
    left, _, right, _ = font.getbbox(character)
    ImageDraw.Draw(mask).text(((CELL - right - left) / 2, -1), character, font=font, fill=255)
    return mask


def draw(page: Page) -> Image.Image:
    image = Image.new("L", (page.columns * CELL, page.rows * CELL), 255)
    for row, column, word in page.words:
        for i, character in enumerate(word):
            image.paste(0, ((column + i) * CELL, row * CELL), glyph(character))
    return image.convert("RGB")


def drawn_page(rng: random.Random, kind: str, large: bool, split: str) -> Page:
    """A page of the split: its text decides in which it is, so that no document is in both."""
    while True:
        page = PAGES[kind](rng, large)
        if (zlib.crc32(page.text.encode()) % 10 == 0) == (split == "held-out"):
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
        lines = [""] * y + [" " * x + "".join(row[left // CELL:right // CELL]) for row in cells[top // CELL:bottom // CELL]]
        text += "".join(line.ljust(side) for line in lines).ljust(side * side)
    return text


# What a stage teaches, (page, [(prompt, answer), ...]), from its beginning (progress 0) to its end (1): easier pages first.


def text_lesson(rng: random.Random, progress: float) -> tuple[Page, list[tuple[str, str]]]:
    """Stage 0, plain text: to copy (dense pages, and charts all along), then to read and to look things up."""
    kind = rng.random()
    if kind < 0.2:
        page = eye_chart(rng)
        return page, [("", page.text)]
    if rng.random() > 4 * progress - 0.5:               # all dense for an eighth of the stage, none after three eighths
        page = dense_text(rng)
        return page, [("", page.text)]
    if kind < 0.3:
        page = sticker(rng)
        return page, [("", page.text)]
    page = drawn_page(rng, rng.choice(KINDS), progress > 0.25 and rng.random() < 0.25, "train")
    return page, questions(rng, page) if rng.random() < 0.5 else [(READ, page.text)]


def caption_lesson(rng: random.Random, progress: float) -> tuple[Page, list[tuple[str, str]]]:
    """Stage 1: to see. Charts until every character is known in its patch, then words in free places among them."""
    page = eye_chart(rng) if progress < 0.6 or rng.random() < 0.4 else sticker(rng)
    return page, [("", page.text)]


def document_lesson(rng: random.Random, progress: float) -> tuple[Page, list[tuple[str, str]]]:
    """Stage 2: to read whole pages; those of several tiles come in over the first fifth."""
    page = drawn_page(rng, rng.choice(KINDS), rng.random() < 0.35 * min(1, 5 * progress), "train")
    return page, [(READ, page.text)]


def instruction_lesson(rng: random.Random, progress: float) -> tuple[Page, list[tuple[str, str]]]:
    """Stage 3: to answer, and not to forget reading."""
    page = drawn_page(rng, rng.choice(KINDS), rng.random() < 0.35, "train")
    return page, questions(rng, page) if rng.random() < 0.75 else [(READ, page.text)]


def questions(rng: random.Random, page: Page) -> list[tuple[str, str]]:
    """Up to three of a page's questions: several turns cost its image once."""
    return rng.sample(page.questions, min(3, len(page.questions)))


LESSONS = [text_lesson, caption_lesson, document_lesson, instruction_lesson]


class ToyDocuments(torch.utils.data.Dataset):
    """The toy's training samples of one stage: sample i depends on (seed, stage, i, n) alone, never on a rank or worker."""

    def __init__(self, stage: int, n: int, seed: int, tokenizer: Tokenizer, config: SigLIPConfig):
        self.stage, self.n, self.seed, self.tokenizer, self.config = stage, n, seed, tokenizer, config

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        rng, progress = random.Random(f"{self.seed}/{self.stage}/{index}"), index / self.n
        page, asks = LESSONS[self.stage](rng, progress)
        images = [draw(page)] if self.stage > 0 else []
        first = IMAGE if self.stage > 0 else self.as_text(rng, page, progress)
        turns = []
        for i, (prompt, gold) in enumerate(asks):
            parts = [first] if i == 0 else []
            turns += [Turn("user", parts + [prompt] if prompt else parts), Turn("assistant", [gold])]
        sample = prepare(Example(images, turns, f"toy/{self.stage}/{index}"), self.tokenizer, self.config)
        if self.stage == 0 and page.kind == "chart" and rng.random() < 0.5:
            self.smudge(rng, sample)
        return sample

    def smudge(self, rng: random.Random, sample: Sample) -> None:
        """Overwrite a share of a text chart's characters by any words, and do not ask for these.

        An LLM that has only met legible charts finds its place by what stands there. In stage 1 nothing legible does,
        at first: it looks nowhere, and the encoder learns nothing. A smudged chart can only be read by counting places.
        """
        cells = sample.tokens.tolist().index(self.tokenizer.special["<|end_header_id|>"]) + 2   # after "\n\n"
        answers = (sample.labels != IGNORE).nonzero()[0].item()
        share = rng.uniform(0.2, 1.0)
        for i in range(self.config.n_patches):
            if rng.random() < share:
                sample.tokens[cells + i] = rng.randrange(min(self.tokenizer.special.values()))
                sample.labels[answers + i] = IGNORE

    def as_text(self, rng: random.Random, page: Page, progress: float) -> str:
        """Stage 0's page in the image's place: more and more often laid out as the patches will be, else as plain lines."""
        laid_out = {"chart": 1.0, "dense": 0.25}.get(page.kind, 0.5 + 0.5 * progress)
        return plain_text(page, self.config) if rng.random() < laid_out else page.text


def held_out_documents(n: int, seed: int) -> list[tuple[Page, str, str]]:
    """n pages that no training run draws, with one question each: (page, prompt, answer). The kinds take turns, and
    a third of the pages have several tiles."""
    documents = []
    for i in range(n):
        rng = random.Random(f"held-out/{seed}/{i}")
        page = drawn_page(rng, KINDS[i % len(KINDS)], i // len(KINDS) % 3 == 0, "held-out")
        documents.append((page, *rng.choice(page.questions)))
    return documents


def answer(model: AlignVLM, tokenizer: Tokenizer, images: list[Image.Image], prompts: list[str], max_tiles: int = 9,
           **generation) -> Iterator[list[str]]:
    """Answer each (image, prompt) as one batch; yields the answers so far after every token, the last time complete.

    generation: what AlignVLM.generate takes (max_new_tokens, temperature, top_p, seed). An empty prompt asks for a
    caption: the user's turn is the image alone, as in stage 1.
    """
    samples = [prepare(Example([image], [Turn("user", [IMAGE, prompt] if prompt else [IMAGE])], ""), tokenizer,
                       model.config.vision, max_tiles) for image, prompt in zip(images, prompts)]
    ids: list[list[int]] = [[] for _ in samples]
    for step in model.generate([s.tokens for s in samples], [s.pixels for s in samples], tokenizer.stop, **generation):
        for row, token in zip(ids, step):
            row += [] if token is None else [token]
        yield [tokenizer.decode(row) for row in ids]
    yield [tokenizer.decode(row) for row in ids]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of characters from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=20, metavar="N", help="held-out pages to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which pages (default: %(default)s)")
    parser.add_argument("folder", type=Path, help="where the PNGs and questions.jsonl go; made if missing")
    args = parser.parse_args()
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{args.folder}: {error.strerror}")
    rows = []
    for i, (page, prompt, gold) in enumerate(held_out_documents(args.draw, args.seed)):
        name = f"{i:04}-{page.kind}.png"
        draw(page).save(args.folder / name)
        rows.append({"image": name, "prompt": prompt, "answer": gold, "kind": page.kind})
    (args.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} pages and questions.jsonl in {args.folder}")


if __name__ == "__main__":
    main()
