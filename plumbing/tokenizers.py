"""A tokenizer's file -> text to ids and back: Llama 3's tokenizer.model, or a tokenizer.json.

tiktoken does the work. Here lies what it needs to know, and what it does not catch: bytes that are
no token, text that is no UTF-8, text that its regular expressions cannot split. The toy and the
reader write a tokenizer.model of their own.
"""
import base64
import re
from pathlib import Path

import tiktoken

from plumbing.settings import CheckpointError, InputError, Settings

# Llama 3's split of text into pieces, within which bytes are merged.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's 256 special tokens follow the last rank; these have a name.
LLAMA3_SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>",
    "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
    "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>",
]

# GPT-2's split.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after single digits were cut out, as SmolLM2 does it in two steps. The look-ahead to a
# digit stands for the end of the text before it.
DIGITS_PATTERN = (GPT2_PATTERN
                  .replace(r" ?\p{N}+", r"\p{N}")
                  .replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!"))

# A file's content: the rank of each token, the split pattern, the special tokens' ids by name.
Vocabulary = tuple[dict[bytes, int], str, dict[str, int]]


def write_tokenizer_model(path: Path, texts: list[str]) -> None:
    """A tokenizer.model of 256 bytes, then these texts as tokens, each by way of its prefixes."""
    tokens = [bytes([byte]) for byte in range(256)]
    for text in texts:
        spelling = text.encode()
        prefixes = [spelling[:n] for n in range(2, len(spelling) + 1)]
        tokens += [prefix for prefix in prefixes if prefix not in tokens]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines))


class TextError(InputError):
    """A text that no tokenizer can encode; the message is one line."""


class BytePairs:
    """A byte-level BPE, by tiktoken.

    path: the file, or the folder that holds it. Attributes: path (of the file), size (tokens),
    special (name -> id), encoding (tiktoken's). Raises CheckpointError, one line, for a file that
    cannot be read, or that is none of the implemented.
    """

    def __init__(self, path: Path):
        self.path = tokenizer_file(path)
        if self.path.suffix == ".json":
            ranks, pattern, self.special = read_tokenizer_json(self.path)
        else:
            ranks, pattern, self.special = read_tokenizer_model(self.path)
        self.size = vocabulary_size(self.path, ranks, self.special)
        self.known = {*ranks.values(), *self.special.values()}
        # tiktoken panics at a byte that is no token, and the reference drops it. So such a byte
        # gets an id of its own, from `size` on, and encode() drops those.
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        extra = {byte: self.size + i for i, byte in enumerate(missing)}
        self.has_missing = bool(missing)
        self.missing_ascii = "".join(re.escape(chr(byte[0])) for byte in missing if byte[0] < 128)
        try:
            self.encoding = tiktoken.Encoding(self.path.name, pat_str=pattern,
                                              mergeable_ranks={**ranks, **extra},
                                              special_tokens=self.special)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.path}: not a vocabulary ({reason})") from None

    def encode(self, text: str) -> list[int]:
        """Text -> ids; the names of special tokens are text like any other.

        Raises TextError for text with lone surrogates, which is what Python makes of bytes that are
        no UTF-8, and for text that tiktoken cannot split.
        """
        check_surrogates(text)
        if self.missing_ascii:
            text = drop_missing(text, self.missing_ascii)
        try:
            ids = self.encoding.encode_ordinary(text)
        except BaseException as error:
            # A run of 1 M spaces overflows the regular expression's stack: Rust panics, and what
            # arrives here is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise TextError(f"text of {len(text):,} characters that tiktoken cannot "
                            "split") from None
        if self.has_missing:
            ids = [i for i in ids if i < self.size]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD, and ids of no token, which pad a
        model's vocabulary, nothing."""
        return self.encoding.decode([i for i in ids if i in self.known])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; of a special one its name; none of an id without a token."""
        if token_id not in self.known:
            return b""
        return self.encoding.decode_single_token_bytes(token_id)


def tokenizer_file(path: Path) -> Path:
    """A folder's tokenizer.json, or else its tokenizer.model; a file is itself."""
    if not path.is_dir():
        return path
    in_json = path / "tokenizer.json"
    return in_json if in_json.exists() else path / "tokenizer.model"


def vocabulary_size(path: Path, ranks: dict[bytes, int], special: dict[str, int]) -> int:
    """1 + the highest id. Raises CheckpointError unless every token has an id of its own."""
    ids = [*ranks.values(), *special.values()]
    are_numbers = all(type(i) is int and 0 <= i < 2 ** 31 for i in ids)
    if not ranks or not are_numbers or len(set(ids)) < len(ids):
        raise CheckpointError(f"{path}: not a vocabulary: ids that are no numbers, or that two "
                              "tokens share")
    return 1 + max(ids)


def check_surrogates(text: str) -> None:
    """Raise TextError for text that has no UTF-8: tiktoken would replace it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = text[error.start]
        raise TextError(f"text with the lone surrogate {surrogate!r} at position {error.start}: "
                        "it was not valid UTF-8") from None


def drop_missing(text: str, missing: str) -> str:
    """Text without the ASCII characters that are no tokens, except for one in each run of them.

    missing: these characters, escaped for a regular expression. The reference drops them between
    split and merging: what stood around one in its piece (a run without letters, digits and spaces)
    may merge, what stood in two pieces may not. So one stays, at the end of the run, to keep pieces
    apart. That is exact for control characters, the only ones that released vocabularies lack.
    """
    if not re.search(f"[{missing}]", text):
        return text
    in_piece = r"(?:[^\w\s]|[_\x1c-\x1f])*"     # Python counts four control characters as spaces

    def move_to_end(run: re.Match) -> str:
        last = run[1]
        return re.sub(f"[{missing}]", "", run[0]) + last

    return re.sub(f"{in_piece}([{missing}]){in_piece}", move_to_end, text)


# --------------------------------------------------------------------------------------------------
# The two kinds of file


def read_tokenizer_model(path: Path) -> Vocabulary:
    """Lines of `base64 rank`, after which come Llama 3's 256 special tokens."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; a model folder holds its "
                              "tokenizer") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not lines of `base64 rank` ({error})") from None
    n_reserved = 256 - len(LLAMA3_SPECIALS)
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(2, 2 + n_reserved)]
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS + reserved)}
    return ranks, LLAMA3_PATTERN, special


def read_tokenizer_json(path: Path) -> Vocabulary:
    """A byte-level BPE of the tokenizers library."""
    top = Settings(path)
    model = top.section("model")
    model.only("type", "BPE")
    if model.values.get("byte_fallback"):
        raise top.error("model.byte_fallback", "is true: this is SentencePiece's vocabulary, as in "
                        "Llama 2 and TinyLlama: not implemented, only byte-level BPE is")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        model.only(key, None, False, "")
    top.only("normalizer", None)
    try:
        special = {token["content"]: token["id"] for token in top.values.get("added_tokens", [])}
        vocabulary = model.values["vocab"]
        byte_of = byte_alphabet()
        ranks = {bytes(byte_of[character] for character in token): rank
                 for token, rank in vocabulary.items() if token not in special}
        check_merges(top, vocabulary, model.values["merges"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a byte-level BPE vocabulary "
                              f"({type(error).__name__}: {error})") from None
    return ranks, split_pattern(top), special


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a tokenizer.json's vocabulary stands for: a printable byte is
    written as itself, the others as the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        byte_of[chr(256 + i)] = byte
    return byte_of


def check_merges(top: Settings, vocabulary: dict[str, int], merges: list) -> None:
    """Raise CheckpointError unless merges are listed in the order of their results' ids: tiktoken
    merges the pair whose result has the lowest id."""
    last = -1
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        this = vocabulary[left + right]
        if this < last:
            raise top.error("model.merges", f"are not in the order of the vocabulary at {merge!r}: "
                                            "not implemented")
        last = this


def split_pattern(top: Settings) -> str:
    """The regular expression that does what the file's pre_tokenizer does. Raises
    CheckpointError."""
    steps = top.section("pre_tokenizer").values
    match steps.get("pretokenizers", [steps]):
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] \
                if rest.get("use_regex", True):
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, **rest}] \
                if rest.get("use_regex", True):
            return DIGITS_PATTERN
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return pattern
    raise top.error("pre_tokenizer", "is none of the implemented: ByteLevel, Digits + ByteLevel, "
                                     "Split + ByteLevel")
