"""A tokenizer's file -> ranks, split pattern, special tokens: Llama 3's tokenizer.model, or a tokenizer.json."""
import base64
from pathlib import Path

from plumbing.settings import CheckpointError, InputError, Settings

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


class TextError(InputError):
    """A text that no tokenizer can encode; the message is one line."""


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
