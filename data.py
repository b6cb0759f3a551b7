"""Text and pages -> training samples: tokenizer, chat format, data sets.

    python data.py --draw 20 --seed 1 pages/     # look at the data first: 20 held-out pages and questions.jsonl

A sample is one packed stretch of tokens: begin-of-text, the user's header, IMAGE at the place of every visual token,
the prompt, the assistant's header, the answer. Only answers and their end-of-turn token are supervised.
"""
import base64
import functools
import glob
import io
import itertools
import json
import math
import mmap
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from model import IGNORE, IMAGE
from plumbing.weights import CheckpointError, InputError, Settings
from vision import ImageError, SigLIPConfig, read_image, tile, tile_boxes

READ = "read the page"          # the prompt of stage 2, where no other is given

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

# Llama 3's split of text into pieces, within which bytes are merged.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Llama 3's 256 special tokens follow the last rank; these have a name.
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                   "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>",
                   "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"]

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
        try:
            ids = self.encoding.encode_ordinary(text)
        except BaseException as error:      # a run of 1 M spaces overflows tiktoken's regex: a panic, no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise TextError(f"text of {len(text):,} characters that tiktoken cannot split") from None
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
    n_images: int = 0


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


def pack(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Samples -> one row: tokens (1, L), labels (1, L), pixels (T, 3, S, S), the samples' lengths."""
    return (torch.cat([s.tokens for s in samples])[None], torch.cat([s.labels for s in samples])[None],
            torch.cat([s.pixels for s in samples]), [len(s.tokens) for s in samples])


def fill_rows(samples: list[Sample], row_tokens: int) -> list[list[Sample]]:
    """Samples -> rows of at most row_tokens each: the longest first, each into the first row that has room."""
    rows: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: -len(s.tokens)):
        room = (row for row in rows if sum(len(s.tokens) for s in row) + len(sample.tokens) <= row_tokens)
        row = next(room, None)
        if row is None:
            rows.append(row := [])
        row.append(sample)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Data sets, in the formats in which people have them on disk

BAD_KINDS = ["unreadable file", "broken record", "missing field", "empty answer", "image not found",
             "image outside the folder", "unreadable image", "too long"]
GROUP = 8192                # samples that are shuffled together, at least
BLOCK = 2 ** 20             # bytes of a JSON file that make a shard
PARQUET_PARTS = 16          # shards of a parquet file
MAX_RECORD = 256 * 2 ** 20  # bytes of a sample
PARQUET_COLUMNS = [["image", "query", "annotations"], ["stacked_image", "crossed_text"]]        # BigDocs, VCR-wiki
VCR_PROMPT = ("What is the covered texts in the image? "
              "Please restore the covered texts without outputting the explanations.")
HELD_OUT = re.compile(r"(val|valid|validation|test|dev)(?![a-z])")      # names of files and folders
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class BadSample(Exception):
    """A sample that nothing can be learnt from: its kind, one of BAD_KINDS, and what is wrong with it."""


@dataclass
class Bad:
    """The hole that a bad sample leaves in its step."""
    kind: str
    why: str
    reference: tuple        # where it lies: Documents.where says it in words


@dataclass
class Position:
    """How far an order of samples has come: all that a restart needs, on any number of ranks and workers."""
    epoch: int = 0
    taken: list[int] = field(default_factory=list)      # samples drawn in this epoch, of each data set
    places: list[tuple] = field(default_factory=list)   # where each data set is (DataSet.references)


def data_files(path: str) -> tuple[Path, list[Path]]:
    """A folder, a file or a glob -> the folder that its images may lie in, and its files.

    Of a folder: the files of one format, in it or else one level below; img2dataset puts parquet and JSON beside its
    tars, so tars come first. What is called val, test or dev is left to evaluation. Raises InputError.
    """
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        files = [root] if root.is_file() else sorted(Path(file) for file in glob.glob(str(root)))
        if not files:
            raise InputError(f"--data {path}: no such file or folder")
        return Path(os.path.commonpath([file.parent for file in files])), files
    for pattern, suffix in itertools.product(("*", "*/*"), (".tar", ".parquet", ".jsonl", ".json")):
        files = [file for file in sorted(root.glob(pattern + suffix))
                 if not any(HELD_OUT.match(part) for part in file.relative_to(root).parts)
                 and (suffix != ".json" or file_format(file) == "json")]        # else it describes the others
        if files:
            return root, files
    raise InputError(f"--data {path}: no .tar, .parquet, .jsonl or .json (a list) in this folder or one level below")


def file_format(path: Path) -> str | None:
    """tar, parquet, jsonl or json (one list), by the file's first bytes; None if it is none of them."""
    try:
        with path.open("rb") as file:
            head = file.read(2 ** 16)
    except OSError:
        return None
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]         # after a byte order mark
    known = {"parquet": head[:4] == b"PAR1", "tar": head[257:262] == b"ustar", "json": first == b"[",
             "jsonl": first == b"{" or re.search(rb'^[ \t]*\{[ \t]*"', head, re.M)}       # a first line may be broken
    return next((kind for kind, fits in known.items() if fits), None)


def tar_spans(path: Path) -> list[tuple[int, int]]:
    """The bytes (start, stop) of each sample: neighbouring members that have one name up to its first dot.

    From where the archive is damaged or cut off the rest is one span (start, -1); a whole one ends in zeros.
    """
    spans, last, whole = [], None, False
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                if member.size < 0:         # the next header would be this one again, for ever
                    raise tarfile.ReadError("negative size")
                if member.isdir():
                    last = None
                    continue
                stop = member.offset_data + -(-member.size // 512) * 512
                name = re.match(r"(?:.*/)?[^.]*", member.name)[0]
                start = spans.pop()[0] if name == last else member.offset
                spans.append((start, stop))
                last = name
            tar.fileobj.seek(tar.offset)
            whole = tar.fileobj.read(512) == bytes(512)
        except tarfile.ReadError:
            pass
    return spans if whole else [*spans[:-1], (spans[-1][0] if spans else 0, -1)]


def line_spans(text: mmap.mmap, start: int, stop: int) -> list[tuple[int, int]]:
    """The bytes of each line that begins in text[start:stop]."""
    spans = []
    if start > 0:
        start = text.find(b"\n", start - 1, stop) + 1 or stop
    while start < min(stop, len(text)):
        end = text.find(b"\n", start) + 1 or len(text)
        if end - start > MAX_RECORD or text[start:end].strip():
            spans.append((start, end))
        start = end
    return spans


def list_spans(text: mmap.mmap, start: int, stop: int) -> list[tuple[int, int]]:
    """The bytes of each record of a JSON list from the first one with turns in text[start:stop] to that of the next.

    Records follow one another. Where the list is broken, and where a shard begins, the next one is found by its key,
    which cannot be inside a string: quotes are escaped there.
    """
    window, decoder = text[start:stop + 2 ** 22].decode("latin-1"), json.JSONDecoder()      # a character a byte

    def record_at(at: int) -> tuple[bool, int]:
        """Whether what is there has turns, and where it ends; 0 if it is broken."""
        try:
            record, end = decoder.raw_decode(window, at)
            return isinstance(record, dict) and not {"conversations", "messages"}.isdisjoint(record), end
        except (ValueError, RecursionError):
            return False, 0

    def next_record(first: int) -> int:
        for key in re.finditer(r'"(?:conversations|messages)"\s*:', window[first:]):
            at = first + key.start()
            for _ in range(20):         # its brace is the last one before it, or there are objects between
                at = window.rfind("{", first, at)
                if at < 0:
                    break
                if (found := record_at(at))[0] and found[1] > first + key.start():
                    return at
        return len(window)

    spans, at, broken = [], window.find("[") + 1 if start == 0 else next_record(0), start > 0
    while (at := re.compile(r"[\s,]*").match(window, at).end()) < len(window):
        if window[at] == "]" and not window[at + 1:].strip():
            break
        has_turns, end = record_at(at)
        if has_turns and at >= stop - start:        # the next shard's first
            break
        broken, end = not end, end or next_record(at + 1)
        spans.append((start + at, start + end))
        at = end
    else:
        if start + len(window) == len(text) and not broken:      # no "]": cut off between two records
            spans.append((start + at, start + at))
    return spans


class DataSet:
    """Samples of files, streamed in an order that depends on (seed, epoch) alone.

    A shard is a tar, 1 MB of a JSON file or a sixteenth of a parquet file's rows. Shards are permuted; those that
    together hold GROUP samples are indexed, which reads headers and looks for line ends, and their samples permuted.
    """

    def __init__(self, paths: list[str], seed: int):
        self.seed, self.files, self.shards = seed, [], []
        for file, root in {file: root for root, files in map(data_files, paths) for file in files}.items():
            kind, parts = file_format(file), 1
            if kind in ("json", "jsonl"):
                parts = -(-file.stat().st_size // BLOCK)
            elif kind == "parquet":
                parts = PARQUET_PARTS
            self.shards += [(len(self.files), part, parts) for part in range(parts)]
            self.files.append((root, file, kind))
        if not any(kind for _, _, kind in self.files):
            raise InputError(f"{self.files[0][1]}: neither tar nor parquet nor JSON")

    def index(self, shard: int) -> list[tuple[int, int]]:
        """The samples of a shard as (start, stop), in bytes or rows; stop is -1 where the file is damaged."""
        file, part, parts = self.shards[shard]
        _, path, kind = self.files[file]
        try:
            match kind:
                case "tar":
                    return tar_spans(path)
                case "parquet":
                    n = read_parquet(path).metadata.num_rows
                    return [(row, row + 1) for row in range(n * part // parts, n * (part + 1) // parts)]
                case "json" | "jsonl":
                    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                        return (line_spans if kind == "jsonl" else list_spans)(text, part * BLOCK, (part + 1) * BLOCK)
        except InputError:
            raise
        except (OSError, ValueError, tarfile.TarError):
            pass
        return [(0, -1)] if part == 0 else []

    @functools.lru_cache(maxsize=8)         # the first one serves estimate() and the epoch
    def group(self, epoch: int, first: int) -> tuple[list[tuple[int, int, int]], int]:
        """The references (shard, start, stop) of a group in their order, and where in the shards the next begins."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards)).tolist()
        references, after = [], first
        while len(references) < GROUP and after < len(order):
            references += [(order[after], *span) for span in self.index(order[after])]
            after += 1
        shuffled = np.random.default_rng([self.seed, epoch, first]).permutation(len(references))
        return [references[i] for i in shuffled], after

    def references(self, epoch: int = 0, first: int = 0, taken: int = 0) -> Iterator[tuple]:
        """(reference, place after it) from the place (epoch, first shard of the group, taken from the group) on, for
        ever; None instead of a reference where an epoch ends."""
        with ThreadPoolExecutor(1) as ahead:        # puts the next group into the cache while this one is used
            while True:
                while first < len(self.shards):
                    references, after = self.group(epoch, first)
                    if not references and after - first == len(self.shards):
                        raise InputError(f"--data {self.files[0][1]}: not a single sample there")
                    ahead.submit(self.group, *((epoch, after) if after < len(self.shards) else (epoch + 1, 0)))
                    for i in range(taken, len(references)):
                        yield references[i], (epoch, first, i + 1)
                    first, taken = after, 0
                epoch, first = epoch + 1, 0
                yield None, (epoch, 0, 0)

    def estimate(self) -> int:
        """About how many samples there are, from the first group."""
        references, after = self.group(0, 0)
        return round(len(references) * len(self.shards) / after)

    def where(self, shard: int, start: int, stop: int) -> str:
        """Where a sample lies, in words: a tar's member, or the line of a JSONL file, which is counted now."""
        _, path, kind = self.files[self.shards[shard][0]]
        if kind not in ("tar", "jsonl") or stop < 0:
            return f"{path}, {'row' if kind == 'parquet' else 'byte'} {start}"
        with path.open("rb") as file:
            if kind == "tar":
                file.seek(start)
                return f"{path}, {file.read(100).partition(bytes(1))[0].decode(errors='replace')}"
            before = sum(block.count(b"\n") for block in iter(lambda: file.read(min(BLOCK, start - file.tell())), b""))
        return f"{path}, line {before + 1}"

    def read(self, shard: int, start: int, stop: int) -> Example:
        """Read and decode one sample. Raises BadSample or ImageError."""
        root, path, kind = self.files[self.shards[shard][0]]
        if stop < 0:
            raise BadSample("unreadable file", "damaged or cut off from here")
        if stop - start > MAX_RECORD:
            raise BadSample("broken record", f"{stop - start:,} bytes are more than {MAX_RECORD:,}")
        key = f"{path}:{start}"
        if kind == "parquet":
            return parquet_example(path, start, key)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        return tar_example(data, key) if kind == "tar" else json_example(data, (path.parent, root), key)


def tar_example(data: bytes, key: str) -> Example:
    """img2dataset's sample: an image, its caption in .txt, or else in .json."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = [m for m in tar if m.isfile()]
        if any(m.size > len(data) for m in files):
            raise BadSample("broken record", "a sparse member, larger than the sample")
        members = {m.name.rpartition(".")[2].lower(): tar.extractfile(m).read() for m in files}
    image = next((members[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in members), None)
    try:
        caption = members["txt"].decode() if "txt" in members else json.loads(members["json"])["caption"]
    except (KeyError, TypeError):
        raise BadSample("missing field", "neither a .txt nor a caption in a .json") from None
    if image is None:
        raise BadSample("missing field", f"no image among {', '.join(members)}")
    return conversation([io.BytesIO(image)], [("user", ""), ("assistant", caption)], key)


def read_parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs `pip install pyarrow`") from None
    return pyarrow.parquet.ParquetFile(path)


def parquet_example(path: Path, row: int, key: str) -> Example:
    """A row of BigDocs (image, lists of queries and annotations) or VCR-wiki (stacked_image, crossed_text); its row
    group is read with it."""
    try:
        file = read_parquet(path)
        names = file.schema_arrow.names
        columns = next((columns for columns in PARQUET_COLUMNS if {*columns} <= {*names}), None)
        if columns is None:
            raise BadSample("missing field", f"no columns {' or '.join(map(', '.join, PARQUET_COLUMNS))} among "
                            + ", ".join(names))
        group = 0
        while row >= (n := file.metadata.row_group(group).num_rows):
            row, group = row - n, group + 1
        image, *texts = file.read_row_group(group, columns).slice(row, 1).to_pylist()[0].values()
    except BadSample:
        raise
    except Exception as error:      # a damaged file shows itself in many ways
        raise BadSample("unreadable file", " ".join(str(error).split())) from None
    if not (isinstance(image, dict) and isinstance(image.get("bytes"), bytes) and image["bytes"] and all(texts)
            and all(isinstance(text, list) and all(isinstance(t, str) for t in text) for text in texts)
            and len(texts[0]) == len(texts[-1])):
        raise BadSample("missing field", f"{', '.join(columns)}: empty, of another type, or not as many of each")
    asked, answers = texts if len(texts) == 2 else ([VCR_PROMPT], [", ".join(texts[0])])
    turns = [turn for pair in zip(asked, answers) for turn in zip(("user", "assistant"), pair)]
    return conversation([io.BytesIO(image["bytes"])], turns, key)


def json_example(data: bytes, folders: tuple[Path, Path], key: str) -> Example:
    """A record of DocDownstream or MS-Swift (messages; image or images) or of LLaVA (conversations; image).

    folders: the record's, then the data set's; images are files relative to either, and not outside the latter.
    """
    record, images = json.loads(data.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n,")), []
    try:
        turns = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
                 for turn in record.get("messages", record.get("conversations"))]
        names = record.get("images", record.get("image")) or []
        for name in [names] if isinstance(names, str) else names:
            paths = [Path(os.path.normpath(folder / name)) for folder in folders]
            inside = [path for path in paths if path.is_relative_to(folders[-1])]
            images.append(next((path for path in inside if os.path.isfile(path)), None))
            if images[-1] is None:
                raise BadSample("image not found" if inside else "image outside the folder", str(name))
    except (AttributeError, TypeError):
        raise BadSample("missing field", "no messages with role and content, or an image that is no name") from None
    return conversation(images, turns, key)


def conversation(images: list, turns: list[tuple[str, str]], key: str) -> Example:
    """Image files and (role, text) pairs -> Example; images without marks stand before the first user's text."""
    if not all(isinstance(role, str) and role in ROLES and isinstance(text, str) for role, text in turns):
        raise BadSample("missing field", f"a turn that is no text of {', '.join(ROLES)}")
    turns = [Turn(ROLES[role], split_images(text) if ROLES[role] == "user" else [text]) for role, text in turns]
    asked = [turn.parts for turn in turns if turn.role == "user"]
    answers = [turn.parts for turn in turns if turn.role == "assistant"]
    marks = sum(parts.count(IMAGE) for parts in asked)
    if asked and marks == 0:
        asked[0][:0] = [IMAGE] * len(images)
    elif marks != len(images):
        raise BadSample("missing field", f"{marks} marks for {len(images)} images")
    if not answers:
        raise BadSample("missing field", "no answer")
    if not all(text.strip() for [text] in answers):
        raise BadSample("empty answer", "nothing to learn")
    return Example([read_image(image) for image in images], turns, key)


class Documents(Dataset):
    """The samples of --data, ready for the model; a Bad one where a sample cannot be used.

    specs: PATH, or PATH:WEIGHT for a data set of its own, of which WEIGHT samples are drawn for one of a set with
    weight 1. An epoch ends when the first set is through; the others go on from there, and begin anew as they end.
    """

    def __init__(self, specs: list[str], seed: int, **settings):
        parsed = [re.fullmatch(r"(.*?)(?::(\d+(?:\.\d+)?))?", spec, re.S).groups() for spec in specs]
        if any(weight and float(weight) == 0 for _, weight in parsed):
            raise InputError(f"--data {' '.join(specs)}: a weight is more than 0")
        weighted = any(weight for _, weight in parsed)
        self.sets = [DataSet([path], seed) for path, _ in parsed] if weighted else [DataSet(specs, seed)]
        self.weights = [float(weight or 1) for _, weight in parsed] if weighted else [1.0]
        self.settings = settings        # of prepare

    def __getitem__(self, reference: "tuple | Position") -> "Sample | Bad | Position":
        if isinstance(reference, Position):         # the end of a step, on its way through the loader
            return reference
        try:
            return prepare(self.sets[reference[0]].read(*reference[1:]), **self.settings)
        except BadSample as bad:
            return Bad(*bad.args, reference)
        except ImageError as error:
            return Bad("unreadable image", str(error), reference)
        except TextError as error:
            return Bad("broken record", str(error), reference)
        except InputError:
            raise
        except (OSError, tarfile.TarError) as error:
            return Bad("unreadable file", str(error), reference)
        except (ValueError, RecursionError) as error:
            return Bad("broken record", str(error), reference)

    def where(self, bad: Bad) -> str:
        """Where a bad sample lies, in words."""
        return self.sets[bad.reference[0]].where(*bad.reference[1:])

    def draws(self, p: Position) -> Iterator[tuple[tuple | None, Position]]:
        """(reference, position after it) for ever; None for a reference where an epoch ends."""
        taken, places = p.taken or [0] * len(self.sets), p.places or [(0, 0, 0)] * len(self.sets)
        epoch, streams = p.epoch, [s.references(*place) for s, place in zip(self.sets, places)]
        while True:
            i = min(range(len(self.sets)), key=lambda i: (taken[i] + 1) / self.weights[i])
            reference, place = next(streams[i])
            places = [*places[:i], place, *places[i + 1:]]
            if reference is not None:
                taken = [n + (i == k) for k, n in enumerate(taken)]
            elif place[0] > epoch:
                epoch, taken = epoch + 1, [0] * len(taken)
            else:
                continue        # it has been through less often than the one that makes the epochs
            yield reference and (i, *reference), Position(epoch, taken, places)

    def epoch_samples(self) -> int:
        """About how many samples an epoch has."""
        return round(min(s.estimate() / w for s, w in zip(self.sets, self.weights)) * sum(self.weights))


def deal(draws: Iterator[tuple], batch_size: int, rank: int, world: int) -> Iterator:
    """The references of one rank, and after those of each step the Position that all ranks have then reached.

    A step owns batch_size draws in a row, or what is left of an epoch; they are dealt out to the ranks in turn.
    """
    n, reached = 0, None
    for reference, position in draws:
        if n == batch_size or n and reference is None:
            yield position if reference is None else reached
            n = 0
        if reference is not None:
            if n % world == rank:
                yield reference
            n, reached = n + 1, position


if __name__ == "__main__":
    from toy.pages import main
    main()
