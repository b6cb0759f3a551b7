"""Text and pages -> training samples: tokenizer, chat format, packed rows.

    python data.py --draw 20 --seed 1 pages/     # look at the data first: 20 held-out pages and questions.jsonl

A sample is one sequence of tokens: begin-of-text, the user's header, IMAGE at the place of every visual token,
the prompt, the assistant's header, the answer; pack_row() joins several into a row. Only answers and their end-of-turn
token are supervised. The toy's examples come from toy/pages.py, those of --data from plumbing/streams.py.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from torch import Tensor

from model import IGNORE, IMAGE
from plumbing.examples import BadSample, Example, Turn
from plumbing.tokenizers import TextError, read_tokenizer_json, read_tokenizer_model
from plumbing.settings import CheckpointError
from vision import SigLIPConfig, tile, tile_boxes

READ = "read the page"          # asks for a page read aloud: the toy's stage 2, and sample.py without --prompt

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


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
        try:
            ids = self.encoding.encode_ordinary(text)
        except BaseException as error:      # a run of 1 M spaces overflows tiktoken's regex: a panic, no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise TextError(f"text of {len(text):,} characters that tiktoken cannot split") from None
        return [i for i in ids if i < self.size] if self.missing else ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(ids)

    def layout(self, parts: list[str]) -> list[int]:
        """The ids of a chat format's parts, where a special token's name is that token."""
        return [i for part in parts for i in ([self.special[part]] if part in self.special else self.encode(part))]


# ---------------------------------------------------------------------------------------------------------------------
# Chat format


@dataclass
class Sample:
    """An example ready for the model: tokens and labels (L,) int64, pixels (T, 3, S, S) fp32 of its n_images' tiles,
    and the example's name."""
    tokens: Tensor
    labels: Tensor
    pixels: Tensor
    key: str
    n_images: int = 0


def encode_chat(turns: list[Turn], tokenizer: Tokenizer, visual_tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Turns -> tokens and labels (L,) int64 in the tokenizer's chat format; image i takes visual_tokens[i] positions.

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


def prepare(example: Example, tokenizer: Tokenizer, config: SigLIPConfig, max_tiles: int = 9,
            max_text: float = math.inf, max_tokens: float = math.inf, tile_tokens: int | None = None) -> Sample:
    """Tile an example's images and encode its turns.

    max_text: text tokens that are kept; max_tokens: text and visual ones. Text is cut at its end, images never are.
    tile_tokens: visual tokens of a tile, AlignVLMConfig.tile_tokens (default: one for each patch). Raises BadSample if
    no answer is left.
    """
    tile_tokens = tile_tokens or config.n_patches
    n = [tile_tokens * len(tile_boxes(*image.size, config, max_tiles)) for image in example.images]
    tokens, labels = encode_chat(example.turns, tokenizer, n)
    room = min(max_text, max_tokens - sum(n))
    kept = (tokens == IMAGE) | ((tokens != IMAGE).cumsum(0) <= room)
    if room < 0 or (labels != IGNORE).any() and (labels[kept] == IGNORE).all():
        raise BadSample("too long", f"{sum(n)} visual tokens and room for {room} of text: no answer is left")
    side = config.image_size
    tiles = [tile(image, config, max_tiles) for image in example.images]
    pixels = torch.cat([torch.empty(0, 3, side, side), *tiles])
    return Sample(tokens[kept], labels[kept], pixels, example.key, len(tiles))


def pack_row(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Samples -> one row: tokens (1, L), labels (1, L), pixels (T, 3, S, S), the samples' lengths."""
    return (torch.cat([s.tokens for s in samples])[None], torch.cat([s.labels for s in samples])[None],
            torch.cat([s.pixels for s in samples]), [len(s.tokens) for s in samples])


def fill_rows(samples: list[Sample], row_tokens: int) -> list[list[Sample]]:
    """Samples -> rows of at most row_tokens each: the longest first, each into the first row that has room. A sample
    that is longer has a row of its own."""
    rows: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: -len(s.tokens)):
        room = (row for row in rows if sum(len(s.tokens) for s in row) + len(sample.tokens) <= row_tokens)
        row = next(room, None)
        if row is None:
            rows.append(row := [])
        row.append(sample)
    return rows

