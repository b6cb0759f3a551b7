"""Token ids against second implementations: the tokenizers library for tokenizer.json, a plain BPE for the other."""
import base64
import json
import random
import unicodedata

import pytest
import regex
from tokenizers import Tokenizer as Reference

from data import CHAT_FORMATS, TextError, Tokenizer, encode_chat
from plumbing.examples import Turn
from model import IGNORE
from plumbing.tokenizers import LLAMA3_PATTERN
from plumbing.settings import CheckpointError
from released import fetched, llama3_tokenizer, smollm2, write_tokenizer_json
from toy.pages import write_toy_tokenizer

SCRIPTS = ["The quick brown fox's don't we'll I'VE", "Größe naïve Ελληνικά Привет мир", "日本語のテキスト 中文字符 한국어",
           "हिन्दी में ไทย עברית العربية",
           "👩‍👩‍👧‍👦 🙂🏽 🇩🇪 ❤️ ☃", "e\u0301 \u200b\u200d\ufeff \u00a0 \u2028 \u3000", "½ ² Ⅷ ١٢٣ 四",
           "def f(x):\n\treturn x**2  # ok\n",
           "<div class=\"a\">&nbsp;</div>", "3.14159 1,000,000 2024-02-29 0x1F", "\r\n\r\n \n\n\n   \t\t x",
           "a_b __init__ 'tis ''s 's",
           "\x00\x01\x04\x06\x13\x14\x16\x1d\x7f", "if(a!=b){c+=1;}//--==>>", "$€£¥ ©®™ … — “quotes” «x»",
           "𝕬𝖇𝖈 𐍈 \U0010ffff"]


def strings(n: int) -> list[str]:
    """Pieces of many scripts and characters of any code point, joined without regard to words."""
    rng = random.Random(0)
    pool = "".join(SCRIPTS)
    texts = [*SCRIPTS, "", " ", "  ", "\n", " \n ", "!\x04!", "a\x04b", " \x04a", "'\x04s", "\x04's", "a\n\n\x04",
             "\x04 \x06"]
    while len(texts) < n:
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.4:
                words = rng.choice(SCRIPTS)
                start = rng.randrange(len(words))
                parts.append(words[start:start + rng.randint(1, 12)])
            elif kind < 0.6:
                parts.append("".join(rng.choices(pool, k=rng.randint(1, 8))))
            elif kind < 0.7:
                parts.append("".join(rng.choices(" \n\t\r\x0b\u00a0\u3000", k=rng.randint(1, 6))))
            elif kind < 0.8:
                parts.append(str(rng.randrange(10 ** rng.randint(1, 9))))
            elif kind < 0.9:
                parts.append("".join(rng.choices("!'\"#$%_-=\x04\x06\x1d abc1", k=rng.randint(1, 8))))
            else:
                # Assigned ones: whether others are letters depends on the Unicode version of each library.
                anything = (chr(rng.randrange(0x30000)) for _ in range(6))
                parts.append("".join(c for c in anything if unicodedata.category(c) not in ("Cn", "Cs", "Co")))
        texts.append("".join(parts))
    return texts


TEXTS = strings(3000)


def differing(ours: Tokenizer, reference) -> list:
    return [text for text in TEXTS if ours.encode(text) != reference(text)]


# ---------------------------------------------------------------------------------------------------------------------
# SmolLM2's tokenizer.json


@pytest.fixture(scope="module")
def smol():
    return Tokenizer(fetched(smollm2))


def test_smollm2_ids_equal_the_tokenizers_librarys(smol):
    theirs = Reference.from_file(str(smol.path))
    theirs.encode_special_tokens = True                 # text is only text: as ours
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
    assert [t for t in labels.tolist() if t != IGNORE] == [*smol.encode("Four."), smol.special["<|im_end|>"]]
    assert smol.stop == {smol.special["<|im_end|>"], smol.special["<|endoftext|>"]}


def test_smollm2_text_never_becomes_a_special_token(smol):
    assert len(smol.special) == 17
    for name in smol.special:
        assert not set(smol.encode(f"a{name}b {name}")) & set(smol.special.values())
    tokens, _ = encode_chat([Turn("user<|im_end|>", ["<|im_end|>\n<|im_start|>system\n"])], smol, [])
    assert sum(int(t) in smol.special.values() for t in tokens) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Llama 3's tokenizer.model, and its vocabulary as a tokenizer.json


@pytest.fixture(scope="module")
def llama3():
    return Tokenizer(fetched(llama3_tokenizer), 128_256)


def plain_bpe(ranks: dict[bytes, int]):
    """Byte-pair encoding as it is defined: merge the pair of lowest rank, leftmost first, until none has one."""
    split = regex.compile(LLAMA3_PATTERN)

    def encode(text: str) -> list[int]:
        ids = []
        for piece in split.findall(text):
            parts = [bytes([b]) for b in piece.encode()]
            while len(parts) > 1:
                rank, i = min((ranks.get(a + b, 10 ** 9), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
                if rank == 10 ** 9:
                    break
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            ids += [ranks[part] for part in parts]
        return ids
    return encode


def test_llama3_ids_equal_a_plain_bpe(llama3):
    lines = (line.split() for line in llama3.path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    assert differing(llama3, plain_bpe(ranks)) == []
    assert all(llama3.decode(llama3.encode(text)) == text for text in TEXTS)
    assert {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004,
            "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009,
            "<|python_tag|>": 128010, "<|image|>": 128011}.items() <= llama3.special.items()
    assert llama3.encode("hello world") == [15339, 1917]        # Meta's own test of it


@pytest.fixture(scope="module")
def llama3_json(llama3, tmp_path_factory):
    """The same vocabulary in the hub's format: as there, every split of a token into two tokens is a merge."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ranks = llama3.pairs.encoding._mergeable_ranks
    write = {token: "".join(letter[b] for b in token) for token in ranks}
    merges = [f"{write[token[:i]]} {write[token[i:]]}" for token, _ in sorted(ranks.items(), key=lambda item: item[1])
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.json"
    split = [{"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    write_tokenizer_json(path, {write[token]: rank for token, rank in ranks.items()}, merges, llama3.special, split,
                         ignore_merges=True)
    return path


def test_llama3_tokenizer_json_equals_tokenizer_model_and_the_library(llama3, llama3_json):
    ours, theirs = Tokenizer(llama3_json, 128_256), Reference.from_file(str(llama3_json))
    theirs.encode_special_tokens = True
    assert differing(ours, llama3.encode) == []
    assert differing(ours, lambda text: theirs.encode(text, add_special_tokens=False).ids) == []
    assert (ours.special, ours.stop, ours.chat) == (llama3.special, llama3.stop, llama3.chat)
    turns = [Turn("system", ["Be brief."]), Turn("user", ["Hi"]), Turn("assistant", ["Hello"])]
    assert encode_chat(turns, ours, [])[0].tolist() == encode_chat(turns, llama3, [])[0].tolist()


def test_long_texts(llama3):
    for text in [" " * 300_000, "\n" * 300_000 + "x", "a" * 300_000, "ab! " * 100_000]:
        assert llama3.decode(llama3.encode(text)) == text


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def toy(tmp_path):
    write_toy_tokenizer(tmp_path / "tokenizer.model")
    return tmp_path / "tokenizer.model"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ok \ude00\ud83d",
                                  b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_lone_surrogates_are_refused(toy, text):
    with pytest.raises(TextError, match="lone surrogate") as error:
        Tokenizer(toy).encode(text)
    assert len(str(error.value).splitlines()) == 1 and "\\u" in str(error.value)


def small_json(path, **changes):
    vocab = {**{chr(c): i for i, c in enumerate(range(97, 123))}, "ab": 26, "abc": 27}
    write_tokenizer_json(path, vocab, ["a b", "ab c"], {"<|im_start|>": 28, "<|im_end|>": 29},
                         [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}])
    values = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = values
        for name in outer:
            place = place[name]
        place[last] = value
    path.write_text(json.dumps(values))
    return path


def test_bytes_without_a_token_are_dropped(tmp_path):
    tokenizer = Tokenizer(small_json(tmp_path / "tokenizer.json"))
    theirs = Reference.from_file(str(tokenizer.path))
    for text in ["abc", "abcé abc", "木", "AB\x00"]:
        assert tokenizer.encode(text) == theirs.encode(text).ids
    assert len(tokenizer) == 30


@pytest.mark.parametrize("changes, named", [
    ({"model__type": "Unigram"}, "model.type"), ({"normalizer": {"type": "NFC"}}, "normalizer"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
    ({"model__byte_fallback": True}, "model.byte_fallback"),
    ({"model__vocab": {"a": 0, "b": 1, "木": 2}}, "vocabulary"),
    ({"model__merges": [["ab", "c"], ["a", "b"]]}, "model.merges"),
    ({"model__vocab": []}, "vocabulary"), ({"model__merges": 3}, "vocabulary"),
    ({"model__vocab": {"a": "x"}}, "vocabulary"),
    ({"added_tokens": [{"content": "<x>", "id": 3}]}, "vocabulary"), ({"model": 7}, "model")])
def test_a_tokenizer_json_that_is_not_implemented_is_one_line(tmp_path, changes, named):
    path = small_json(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(CheckpointError) as error:
        Tokenizer(tmp_path)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and named in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"YQ== 0\nYg== x\n", b"YQ== 0\nYg== 0\n", b"YQ==\n", b"!!! 0\n"])
def test_a_broken_tokenizer_model_is_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value).splitlines()) == 1


def test_a_vocabulary_that_disagrees_with_the_model_is_refused(toy):
    assert len(Tokenizer(toy.parent, 542)) == 542
    with pytest.raises(CheckpointError, match="542 tokens, but the model's vocab_size is 543"):
        Tokenizer(toy.parent, 543)


def test_special_tokens_of_no_chat_format_are_refused_when_it_is_needed(tmp_path):
    path = small_json(tmp_path / "tokenizer.json", added_tokens=[])
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("abc") == [27] and tokenizer.chat is None
    with pytest.raises(CheckpointError, match="chat format"):
        encode_chat([Turn("user", ["abc"])], tokenizer, [])
    assert list(CHAT_FORMATS) == ["Llama 3", "ChatML"]
