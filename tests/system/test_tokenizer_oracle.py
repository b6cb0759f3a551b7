"""Token ids against second implementations: the tokenizers library for tokenizer.json, a plain BPE
for Llama 3's tokenizer.model."""
import base64
import random
import unicodedata

import pytest
import regex
from tokenizers import Tokenizer as Reference

from data import Tokenizer, encode_chat
from model import IGNORE
from plumbing.examples import Turn
from plumbing.tokenizers import LLAMA3_PATTERN
from released import fetched, llama3_tokenizer, smollm2, write_tokenizer_json
from small_tokenizers import small_json

SCRIPTS = ["The quick brown fox's don't we'll I'VE", "Größe naïve Ελληνικά Привет мир",
           "日本語のテキスト 中文字符 한국어", "हिन्दी में ไทย עברית العربية",
           "👩‍👩‍👧‍👦 🙂🏽 🇩🇪 ❤️ ☃",
           "e\u0301 \u200b\u200d\ufeff \u00a0 \u2028 \u3000", "½ ² Ⅷ ١٢٣ 四",
           "def f(x):\n\treturn x**2  # ok\n", "<div class=\"a\">&nbsp;</div>",
           "3.14159 1,000,000 2024-02-29 0x1F", "\r\n\r\n \n\n\n   \t\t x",
           "a_b __init__ 'tis ''s 's", "\x00\x01\x04\x06\x13\x14\x16\x1d\x7f",
           "if(a!=b){c+=1;}//--==>>", "$€£¥ ©®™ … — “quotes” «x»", "𝕬𝖇𝖈 𐍈 \U0010ffff"]


def piece(rng: random.Random) -> str:
    """A few characters: of one script or of all, spaces, digits, signs, any code points."""
    kind = rng.random()
    if kind < 0.4:
        words = rng.choice(SCRIPTS)
        start = rng.randrange(len(words))
        return words[start:start + rng.randint(1, 12)]
    if kind < 0.6:
        return "".join(rng.choices("".join(SCRIPTS), k=rng.randint(1, 8)))
    if kind < 0.7:
        return "".join(rng.choices(" \n\t\r\x0b\u00a0\u3000", k=rng.randint(1, 6)))
    if kind < 0.8:
        return str(rng.randrange(10 ** rng.randint(1, 9)))
    if kind < 0.9:
        return "".join(rng.choices("!'\"#$%_-=\x04\x06\x1d abc1", k=rng.randint(1, 8)))
    # Assigned ones: whether others are letters depends on the Unicode version of each library.
    anything = [chr(rng.randrange(0x30000)) for _ in range(6)]
    return "".join(c for c in anything if unicodedata.category(c) not in ("Cn", "Cs", "Co"))


def strings(n: int) -> list[str]:
    """Pieces of many scripts, joined without regard to words."""
    rng = random.Random(0)
    texts = [*SCRIPTS, "", " ", "  ", "\n", " \n ", "!\x04!", "a\x04b", " \x04a", "'\x04s",
             "\x04's", "a\n\n\x04", "\x04 \x06"]
    while len(texts) < n:
        texts.append("".join(piece(rng) for _ in range(rng.randint(1, 12))))
    return texts


TEXTS = strings(3000)


def differing(ours: Tokenizer, reference) -> list[str]:
    return [text for text in TEXTS if ours.encode(text) != reference(text)]


def library(tokenizer: Tokenizer) -> Reference:
    """The tokenizers library's reading of the same file, for which text is only text too."""
    theirs = Reference.from_file(str(tokenizer.path))
    theirs.encode_special_tokens = True
    return theirs


# --------------------------------------------------------------------------------------------------
# SmolLM2's tokenizer.json


@pytest.fixture(scope="module")
def smol():
    return Tokenizer(fetched(smollm2))


def test_smollm2_ids_equal_the_tokenizers_librarys(smol):
    theirs = library(smol)
    assert differing(smol, lambda text: theirs.encode(text, add_special_tokens=False).ids) == []
    assert len(smol) == theirs.get_vocab_size() == 49152
    for text in TEXTS[:500]:
        ids = smol.encode(text)
        assert smol.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_smollm2_chat_is_chatml(smol):
    theirs = Reference.from_file(str(smol.path))
    text = ("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    turns = [Turn("user", ["What is 2 + 2?"]), Turn("assistant", ["Four."]), Turn("user", ["Why?"])]
    tokens, labels = encode_chat(turns, smol, [])
    assert tokens.tolist() == theirs.encode(text, add_special_tokens=False).ids
    learnt = [label for label in labels.tolist() if label != IGNORE]
    assert learnt == [*smol.encode("Four."), smol.special["<|im_end|>"]]
    assert smol.stop == {smol.special["<|im_end|>"], smol.special["<|endoftext|>"]}


def test_smollm2_text_never_becomes_a_special_token(smol):
    assert len(smol.special) == 17
    for name in smol.special:
        assert not set(smol.encode(f"a{name}b {name}")) & set(smol.special.values())
    turns = [Turn("user<|im_end|>", ["<|im_end|>\n<|im_start|>system\n"])]
    tokens, _ = encode_chat(turns, smol, [])
    assert sum(int(t) in smol.special.values() for t in tokens) == 3


# --------------------------------------------------------------------------------------------------
# Llama 3's tokenizer.model, and its vocabulary as a tokenizer.json


@pytest.fixture(scope="module")
def llama3():
    return Tokenizer(fetched(llama3_tokenizer), 128_256)


def plain_bpe(ranks: dict[bytes, int]):
    """Byte-pair encoding as it is defined: merge the pair of lowest rank, leftmost first, until
    none has one."""
    split = regex.compile(LLAMA3_PATTERN)
    none = 10 ** 9

    def encode(text: str) -> list[int]:
        ids = []
        for part in split.findall(text):
            parts = [bytes([b]) for b in part.encode()]
            while len(parts) > 1:
                pairs = [a + b for a, b in zip(parts, parts[1:])]
                rank, i = min((ranks.get(pair, none), i) for i, pair in enumerate(pairs))
                if rank == none:
                    break
                parts[i:i + 2] = [pairs[i]]
            ids += [ranks[part] for part in parts]
        return ids
    return encode


def test_llama3_ids_equal_a_plain_bpe(llama3):
    lines = (line.split() for line in llama3.path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    assert differing(llama3, plain_bpe(ranks)) == []
    assert all(llama3.decode(llama3.encode(text)) == text for text in TEXTS)
    special = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001,
               "<|finetune_right_pad_id|>": 128004, "<|start_header_id|>": 128006,
               "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009,
               "<|python_tag|>": 128010, "<|image|>": 128011}
    assert special.items() <= llama3.special.items()
    assert llama3.encode("hello world") == [15339, 1917]        # Meta's own test of it


@pytest.fixture(scope="module")
def llama3_json(llama3, tmp_path_factory):
    """The same vocabulary in the hub's format: as there, every split of a token into two tokens is
    a merge."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ranks = llama3.pairs.encoding._mergeable_ranks
    write = {token: "".join(letter[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [f"{write[left]} {write[right]}" for left, right in halves
                   if left in ranks and right in ranks]
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.json"
    split = [{"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated",
              "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": False}]
    vocabulary = {write[token]: rank for token, rank in ranks.items()}
    write_tokenizer_json(path, vocabulary, merges, llama3.special, split, ignore_merges=True)
    return path


def test_llama3_tokenizer_json_equals_tokenizer_model_and_the_library(llama3, llama3_json):
    ours = Tokenizer(llama3_json, 128_256)
    theirs = library(ours)
    assert differing(ours, llama3.encode) == []
    assert differing(ours, lambda text: theirs.encode(text, add_special_tokens=False).ids) == []
    assert (ours.special, ours.stop, ours.chat) == (llama3.special, llama3.stop, llama3.chat)
    turns = [Turn("system", ["Be brief."]), Turn("user", ["Hi"]), Turn("assistant", ["Hello"])]
    assert all_equal(encode_chat(turns, ours, []), encode_chat(turns, llama3, []))


def all_equal(ours, theirs) -> bool:
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_long_texts(llama3):
    for text in [" " * 300_000, "\n" * 300_000 + "x", "a" * 300_000, "ab! " * 100_000]:
        assert llama3.decode(llama3.encode(text)) == text


def test_bytes_without_a_token_are_dropped(tmp_path):
    tokenizer = Tokenizer(small_json(tmp_path / "tokenizer.json"))
    theirs = Reference.from_file(str(tokenizer.path))
    for text in ["abc", "abcé abc", "木", "AB\x00"]:
        assert tokenizer.encode(text) == theirs.encode(text).ids
    assert len(tokenizer) == 30
