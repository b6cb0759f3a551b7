"""Text and pages -> training samples: tokenizer, chat format, packed rows.

    tokenizer = Tokenizer("toy/stage0")
    example = Example([read_image("page.png")], [Turn("user", [IMAGE, "what is TAX?"])], "page.png")
    sample = prepare(example, tokenizer, SIGLIP_PRESETS["toy"])
    tokens, labels, pixels, lengths = pack_row([sample], SIGLIP_PRESETS["toy"])

A sample is one sequence of tokens: begin-of-text (Llama 3's), the user's header, IMAGE at the place
of every visual token, the prompt, end-of-turn, the assistant's header, the answer, end-of-turn.
pack_row() joins several into a row.
Pixels stay bytes until they are on the device: a quarter of what the encoder takes. Only answers
and their end-of-turn token are supervised. The toy's examples come from toy/, the reader's from
reader/, those of --data from plumbing/streams.py.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model import IGNORE, AlignVLM
from plumbing.devices import send
from plumbing.examples import IMAGE, BadSample, Example, Turn
from plumbing.settings import CheckpointError
from plumbing.tokenizers import BytePairs, TextError    # TextError: what Tokenizer.encode raises
from plumbing.weights import model_folder
from vision import Area, SigLIPConfig, cut, normalise, tile_boxes

# Asks for a page read aloud: in training, and when sample.py has no --prompt.
READ = "read the page"
CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# Tokenizer


@dataclass
class ChatFormat:
    """How a chat is laid out, in special tokens by name and plain text.

    No format adds a system message. Llama 3.1's and 3.2's own templates do: two dates.
    """
    begin: list[str]                        # before the first turn
    header: tuple[list[str], list[str]]     # before and after a turn's role
    end: list[str]                          # after a turn; its first is the end-of-turn token
    stop: list[str]                         # tokens after which an answer is over


CHAT_FORMATS = {        # a tokenizer has the first whose special tokens it knows
    "Llama 3": ChatFormat(
        begin=["<|begin_of_text|>"],
        header=(["<|start_header_id|>"], ["<|end_header_id|>", "\n\n"]),
        end=["<|eot_id|>"],
        stop=["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
    ),
    "ChatML": ChatFormat(
        begin=[],
        header=(["<|im_start|>"], ["\n"]),
        end=["<|im_end|>", "\n"],
        stop=["<|im_end|>", "<|endoftext|>"],
    ),
}


class Tokenizer:
    """A byte-level BPE: Llama 3's tokenizer.model, or a tokenizer.json like SmolLM2's.

    path: the file, or the model's folder or name on the hub. vocab_size: the model's, at least the
    tokenizer's: rows of its embeddings beyond that are padding, which has no text.
    Attributes: path (of the file), special (name -> id), chat (its ChatFormat, or None), stop (the
    ids after which an answer is over). Raises CheckpointError for a file that it cannot read, or
    that asks for something else (another model type, a normaliser, an unknown split of text).
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None):
        self.pairs = BytePairs(model_folder(path))
        self.path = self.pairs.path
        self.special = self.pairs.special
        if vocab_size is not None and vocab_size < len(self):
            raise CheckpointError(f"{self.path}: {len(self)} tokens, but the model's vocab_size is "
                                  f"{vocab_size}")
        self.chat = self.find_chat_format()
        stop_names = self.chat.stop if self.chat else []
        self.stop = {self.special[name] for name in stop_names if name in self.special}

    def __len__(self) -> int:
        return self.pairs.size

    def find_chat_format(self) -> ChatFormat | None:
        """The first format whose special tokens are all there."""
        for chat in CHAT_FORMATS.values():
            parts = [*chat.begin, *chat.header[0], *chat.header[1], *chat.end]
            needed = {part for part in parts if part.startswith("<|")}
            if needed <= self.special.keys():
                return chat
        return None

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Text is only ever text: `<|eot_id|>` in it is ten characters of prose, not
        the token. Raises TextError, see plumbing/tokenizers.py."""
        return self.pairs.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; ids without a token have none, bytes that are no UTF-8 become
        U+FFFD."""
        return self.pairs.decode(ids)

    def encode_layout(self, parts: list[str]) -> list[int]:
        """The ids of a chat format's parts, where a special token's name is that token."""
        ids: list[int] = []
        for part in parts:
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids.extend(self.encode(part))
        return ids

    def encode_header(self, role: str) -> list[int]:
        """The ids that open a turn of this role. They are never learnt."""
        before, after = self.chat.header
        return self.encode_layout(before) + self.encode(role) + self.encode_layout(after)


# --------------------------------------------------------------------------------------------------
# Chat format: turns -> tokens and labels


def chat_pieces(turns: list[Turn], tokenizer: Tokenizer,
                visual_tokens: list[int]) -> Iterator[tuple[list[int], bool]]:
    """The pieces of a chat in their order: (token ids, whether they are supervised)."""
    chat = tokenizer.chat
    images = iter(visual_tokens)
    yield tokenizer.encode_layout(chat.begin), False
    for turn in turns:
        is_answer = turn.role == "assistant" and turn.is_learnt
        yield tokenizer.encode_header(turn.role), False
        for part in turn.parts:
            if part == IMAGE:
                yield [IMAGE] * next(images), False         # never a target
            else:
                yield tokenizer.encode(part), is_answer
        # The end-of-turn token is learnt with the answer. What follows it is not: generation has
        # stopped before.
        yield tokenizer.encode_layout(chat.end[:1]), is_answer
        yield tokenizer.encode_layout(chat.end[1:]), False
    if turns[-1].role != "assistant":
        yield tokenizer.encode_header("assistant"), False       # ready to be continued


def encode_chat(turns: list[Turn], tokenizer: Tokenizer,
                visual_tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Turns -> tokens and labels, (L,) int64 each, in the tokenizer's chat format.

    Image i takes visual_tokens[i] positions. labels[t] is the token that should follow tokens[t],
    or IGNORE outside the assistant's answers. Unless the last turn is the assistant's, the sequence
    ends with its header. Raises CheckpointError where the tokenizer has no chat format, ValueError
    where the turns have more or fewer places for images than visual_tokens has entries.
    """
    if tokenizer.chat is None:
        raise CheckpointError(f"{tokenizer.path}: its special tokens fit no chat format "
                              f"({' or '.join(CHAT_FORMATS)})")
    n_places = sum(turn.parts.count(IMAGE) for turn in turns)
    if n_places != len(visual_tokens):
        raise ValueError(f"{n_places} places for {len(visual_tokens)} images")
    ids: list[int] = []
    learnt: list[bool] = []
    for piece, is_supervised in chat_pieces(turns, tokenizer, visual_tokens):
        ids.extend(piece)
        learnt.extend([is_supervised] * len(piece))
    tokens = torch.tensor(ids)                                              # (L,)
    supervised = torch.tensor(learnt)                                       # (L,) bool
    labels = torch.full_like(tokens, IGNORE)                                # (L,)
    labels[:-1] = torch.where(supervised[1:], tokens[1:], IGNORE)           # the next token
    return tokens, labels


# --------------------------------------------------------------------------------------------------
# Samples, and rows of them


@dataclass
class Sample:
    """An example ready for the model."""
    tokens: Tensor          # (L,) int64, IMAGE at the place of a visual token
    labels: Tensor          # (L,) int64, IGNORE where nothing is learnt
    pixels: Tensor          # (T, 3, S, S) uint8, the tiles of all of its images
    areas: list[Area]       # T of them: the part of each tile that the page fills
    key: str                # the example's name
    n_images: int = 0


def prepare(example: Example, tokenizer: Tokenizer, config: SigLIPConfig,
            max_tiles: int | None = None, max_text: float = math.inf,
            max_tokens: float = math.inf, tile_tokens: int | None = None) -> Sample:
    """Tile an example's images and encode its turns.

    max_tiles: of a page (default: the config's). max_text: text tokens that are kept; max_tokens:
    text and visual ones. Text is cut at its end, images never are. tile_tokens: visual tokens of a
    tile, AlignVLMConfig.tile_tokens (default: one for each of its N patches). Raises BadSample
    where the visual tokens alone are too many, or no answer is left; else as encode_chat.
    """
    if tile_tokens is None:
        tile_tokens = config.n_patches
    n_tiles = [len(tile_boxes(*image.size, config, max_tiles)) for image in example.images]
    visual_tokens = [n * tile_tokens for n in n_tiles]
    tokens, labels = encode_chat(example.turns, tokenizer, visual_tokens)   # (L,) each

    room = min(max_text, max_tokens - sum(visual_tokens))                   # for text tokens
    is_visual = tokens == IMAGE                                             # (L,) bool
    text_so_far = (~is_visual).cumsum(0)                                    # (L,)
    kept = is_visual | (text_so_far <= room)                                # (L,) bool
    has_answer = (labels != IGNORE).any()           # a prompt that is to be continued has none
    has_lost_it = has_answer and (labels[kept] == IGNORE).all()
    if room < 0 or has_lost_it:
        raise BadSample("too long", f"{sum(visual_tokens)} visual tokens and room for "
                                    f"{max(0, room)} of text: no answer is left")

    # Only now, as it costs the most: the tiles' pixels, an empty tensor for text alone.
    tiles = [torch.empty(0, 3, config.image_size, config.image_size, dtype=torch.uint8)]
    areas = []
    for image in example.images:
        its_tiles, its_areas = cut(image, config, max_tiles)                # (T_i, 3, S, S)
        tiles.append(its_tiles)
        areas += its_areas
    pixels = torch.cat(tiles)                                               # (T, 3, S, S)
    return Sample(tokens[kept], labels[kept], pixels, areas, example.key, len(example.images))


def prepare_question(model: AlignVLM, tokenizer: Tokenizer, pages: list[Image.Image], prompt: str,
                     max_tiles: int | None = None) -> tuple[Tensor, Tensor]:
    """A user's turn, the pages and then the prompt: tokens (L,) and pixels (T, 3, S, S) for the
    model."""
    parts = [IMAGE] * len(pages)
    if prompt:
        parts.append(prompt)
    example = Example(pages, [Turn("user", parts)], "")
    config = model.config
    sample = prepare(example, tokenizer, config.vision, max_tiles, tile_tokens=config.tile_tokens)
    return sample.tokens, normalise(sample.pixels, sample.areas, config.vision)


def pack_row(samples: list[Sample], config: SigLIPConfig,
             device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Samples -> one row: tokens (1, L), labels (1, L), pixels (T, 3, S, S), the samples' lengths.

    The lengths keep them apart: none sees another, and each one's positions begin at 0 (model.py).
    The pixels are normalised, fp32, on the device; the rest stays on the CPU.
    """
    tokens = torch.cat([sample.tokens for sample in samples])[None]         # (1, L)
    labels = torch.cat([sample.labels for sample in samples])[None]         # (1, L)
    pixels = torch.cat([sample.pixels for sample in samples])               # (T, 3, S, S) uint8
    areas = [area for sample in samples for area in sample.areas]           # T of them
    pixels = normalise(send(pixels, device), areas, config)                 # (T, 3, S, S) fp32
    lengths = [len(sample.tokens) for sample in samples]                    # they add up to L
    return tokens, labels, pixels, lengths


def fill_rows(samples: list[Sample], row_tokens: int) -> list[list[Sample]]:
    """Samples -> rows of at most row_tokens each: the longest first, each into the first row that
    has room. A sample that is longer has a row of its own."""
    rows: list[list[Sample]] = []
    used: list[int] = []                    # tokens of each row
    for sample in sorted(samples, key=lambda sample: -len(sample.tokens)):
        n = len(sample.tokens)
        for i, row in enumerate(rows):
            if used[i] + n <= row_tokens:
                row.append(sample)
                used[i] += n
                break
        else:
            rows.append([sample])
            used.append(n)
    return rows
