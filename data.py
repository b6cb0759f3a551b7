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

from model import IGNORE, IMAGE, AlignVLM
from vision import CheckpointError, InputError, Settings, SigLIPConfig, tile, tile_boxes

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

# Llama 3's split of text into pieces, within which bytes are merged.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Llama 3's 256 special tokens follow the last rank; these have a name.
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                   "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>",
                   "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"]
# The toy's vocabulary: every byte, and the pieces of its prompts and headers (drawn pages are upper-case).
TOY_WORDS = ["user", "assistant", "\n\n", "what", " is", " the", " of", "read", " page", " it", "?", "."]

# GPT-2's split, and the same after single digits were cut out, as SmolLM2 does it in two steps: the look-ahead to
# a digit stands for the end of the text before it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")


@dataclass
class ChatFormat:
    """How a chat is laid out: texts, and special tokens by name. A header has the role between its two ends."""
    begin: list[str]
    header: tuple[list[str], list[str]]
    end: list[str]
    stop: list[str]             # tokens after which an answer is over


# A tokenizer has the first format whose special tokens it knows. No system message is added where none is given.
CHAT_FORMATS = {
    "Llama 3": ChatFormat(["<|begin_of_text|>"], (["<|start_header_id|>"], ["<|end_header_id|>", "\n\n"]),
                          ["<|eot_id|>"], ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]),
    "ChatML": ChatFormat([], (["<|im_start|>"], ["\n"]), ["<|im_end|>", "\n"], ["<|im_end|>", "<|endoftext|>"]),
}


class TextError(InputError):
    """A text that no tokenizer can encode; the message is one line."""


class Tokenizer:
    """A byte-level BPE as a tiktoken Encoding: Llama 3's tokenizer.model, or a tokenizer.json like SmolLM2's.

    path: the file, or the folder that holds it. vocab_size: what the model has, which must be the same. Attributes:
    path, special (name -> id), chat (its ChatFormat), stop (ids). Raises CheckpointError for a file that it cannot read
    or that asks for something else (another model type, a normaliser, an unknown split of text).
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None):
        path = Path(path)
        if path.is_dir():
            path = path / ("tokenizer.json" if (path / "tokenizer.json").exists() else "tokenizer.model")
        self.path = path
        ranks, pattern, self.special = (read_tokenizer_json if path.suffix == ".json" else read_tokenizer_model)(path)
        ids = [*ranks.values(), *self.special.values()]
        if len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < 2 ** 31 for i in ids) or not ranks:
            raise CheckpointError(f"{path}: not a vocabulary: ids that are no numbers, or that two tokens share")
        self.size = 1 + max(ids)
        if vocab_size not in (None, self.size):
            raise CheckpointError(f"{path}: {self.size} tokens, but the model's vocab_size is {vocab_size}")
        # tiktoken panics at a byte that is no token. The reference drops it, so it gets an id that encode() drops.
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self.missing = "".join(re.escape(chr(b[0])) for b in missing if b[0] < 128)
        try:
            self.encoding = tiktoken.Encoding(path.name, pat_str=pattern, special_tokens=self.special, mergeable_ranks={
                **ranks, **{b: self.size + i for i, b in enumerate(missing)}})
        except ValueError as error:
            raise CheckpointError(f"{path}: not a vocabulary ({' '.join(str(error).split())})") from None
        self.chat = next((chat for chat in CHAT_FORMATS.values()
                          if {*chat.header[0], chat.end[0]} <= self.special.keys()), None)
        self.stop = {self.special[name] for name in (self.chat.stop if self.chat else []) if name in self.special}

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Text is only ever text: `<|eot_id|>` in it is ten characters of prose, not the token.

        Raises TextError for text with lone surrogates, which is what Python makes of bytes that are no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"text with the lone surrogate {text[error.start]!r} at position {error.start}: "
                            "it was not valid UTF-8") from None
        if self.missing and re.search(f"[{self.missing}]", text):
            # They are dropped between split and merging: what stood around one in its piece (a run without letters,
            # digits and spaces) may merge, what stood in two pieces may not. So one stays, at the end of the run.
            # That is exact for control characters, the only ones that released vocabularies lack.
            run = r"(?:[^\w\s]|[_\x1c-\x1f])*"      # Python counts four control characters as spaces
            text = re.sub(f"{run}([{self.missing}]){run}", lambda m: re.sub(f"[{self.missing}]", "", m[0]) + m[1], text)
        ids = self.encoding.encode_ordinary(text)
        return [i for i in ids if i < self.size] if self.missing else ids

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def layout(self, parts: list[str]) -> list[int]:
        """The ids of a chat format's parts, where a special token's name is that token."""
        return [i for part in parts for i in ([self.special[part]] if part in self.special else self.encode(part))]


def read_tokenizer_model(path: Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Lines of `base64 rank`, after which come Llama 3's 256 special tokens -> ranks, split pattern, special tokens."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; a model folder holds its tokenizer") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not lines of `base64 rank` ({error})") from None
    names = LLAMA3_SPECIALS + [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(LLAMA3_SPECIALS) + 2)]
    return ranks, LLAMA3_PATTERN, {name: len(ranks) + i for i, name in enumerate(names)}


def read_tokenizer_json(path: Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """A byte-level BPE of the tokenizers library -> ranks, split pattern, special tokens.

    tiktoken merges the pair whose result has the lowest id, so the merges must be listed in the order of their ids.
    """
    top = Settings(path)
    model, steps = top.section("model"), top.section("pre_tokenizer").values
    top.only("normalizer", None)
    model.only("type", "BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        model.only(key, None, False, "")
    try:
        special = {token["content"]: token["id"] for token in top.values.get("added_tokens", [])}
        # Every byte is written as one character: a printable one as itself, the others as those from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        ranks = {bytes(byte_of[c] for c in token): i for token, i in model.values["vocab"].items()
                 if token not in special}
        last = -1
        for merge in model.values["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            this = model.values["vocab"][left + right]
            if this < last:
                raise top.error("model.merges", f"are not in the order of the vocabulary at {merge!r}: not implemented")
            last = this
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a byte-level BPE vocabulary ({type(error).__name__}: {error})") from None
    match steps.get("pretokenizers", [steps]):
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return ranks, GPT2_PATTERN, special
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return ranks, DIGITS_PATTERN, special
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return ranks, pattern, special
    raise top.error("pre_tokenizer", "is none of the implemented: ByteLevel, Digits + ByteLevel, Split + ByteLevel")


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
    """Turns -> tokens and labels (L,) in the tokenizer's chat format; image i takes visual_tokens[i] positions.

    labels[t] is the token that should follow tokens[t], or IGNORE outside the assistant's answers. Unless the last
    turn is the assistant's, the sequence ends with its header, ready to be continued. Raises CheckpointError where
    the tokenizer has no chat format.
    """
    chat, counts = tokenizer.chat, iter(visual_tokens)
    if chat is None:
        raise CheckpointError(f"{tokenizer.path}: its special tokens fit no chat format ({' or '.join(CHAT_FORMATS)})")
    tokens, answers = tokenizer.layout(chat.begin), [False] * len(chat.begin)

    def add(ids: list[int], supervised: bool = False) -> None:
        tokens.extend(ids)
        answers.extend([supervised] * len(ids))

    def header(role: str) -> None:
        add(tokenizer.layout(chat.header[0]) + tokenizer.encode(role) + tokenizer.layout(chat.header[1]))

    for turn in turns:
        header(turn.role)
        supervised = turn.role == "assistant"
        for part in turn.parts:
            add([IMAGE] * next(counts) if part == IMAGE else tokenizer.encode(part), supervised)
        add(tokenizer.layout(chat.end[:1]), supervised)
        add(tokenizer.layout(chat.end[1:]))         # not to be learnt: generation has stopped before
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
        crop = ["".join(row[left // CELL:right // CELL]) for row in cells[top // CELL:bottom // CELL]]
        lines = [""] * y + [" " * x + line for line in crop]
        text += "".join(line.ljust(side) for line in lines).ljust(side * side)
    return text


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=20, metavar="N", help="held-out pages (default: %(default)s)")
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
