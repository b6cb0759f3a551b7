"""The tokenizer against hand-written expectations, and what it refuses."""
import pytest

from data import CHAT_FORMATS, TextError, Tokenizer, encode_chat
from model import LLAMA_PRESETS
from plumbing.examples import Turn
from plumbing.settings import CheckpointError
from small_tokenizers import small_json, tokenizer  # noqa: F401: a fixture
from toy.pages import write_toy_tokenizer


def test_tokenizer_has_llama3s_layout(tokenizer):
    assert len(tokenizer) == LLAMA_PRESETS["toy"].vocab_size
    first = len(tokenizer) - 256
    assert sorted(tokenizer.special.values()) == list(range(first, first + 256))
    expected = {"begin_of_text": 0, "end_of_text": 1, "finetune_right_pad_id": 4,
                "start_header_id": 6, "end_header_id": 7, "eom_id": 8, "eot_id": 9,
                "python_tag": 10, "image": 11, "reserved_special_token_2": 12,
                "reserved_special_token_245": 255}
    for name, offset in expected.items():
        assert tokenizer.special[f"<|{name}|>"] == first + offset


def test_an_answer_is_over_at_each_of_llama3s_ends(tokenizer):
    """Of a turn, of a message to a tool, of a text: a released Llama writes all three."""
    ends = {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"}
    assert {name for name, i in tokenizer.special.items() if i in tokenizer.stop} == ends


@pytest.mark.parametrize("text", ["", "INVOICE\nTAX 4.75", "what is the page of it?", "  \n\n \t",
                                  "Größe 木 🙂", "\x00\x7f", "users"])
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_of_the_toy_are_single_tokens(tokenizer):
    for word in ["user", "assistant", "\n\n", "what", " is", "read", " the", " page"]:
        assert len(tokenizer.encode(word)) == 1, word
    assert tokenizer.encode("K7Q2") == list(b"K7Q2")    # and a page's characters are each a token


def test_merges_and_missing_bytes_of_a_tokenizer_json(tmp_path):
    tokenizer = Tokenizer(small_json(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("abcab") == [27, 26] and tokenizer.decode([27, 26]) == "abcab"
    assert tokenizer.encode("abcé abc") == [27, 27]     # neither é nor the space is a token
    assert len(tokenizer) == 30


# --------------------------------------------------------------------------------------------------
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


def test_text_that_tiktoken_cannot_split_is_refused(toy):
    with pytest.raises(TextError, match="1,500,001 characters"):
        Tokenizer(toy).encode(" " * 1_500_000 + "x")


@pytest.mark.parametrize("changes, named", [
    ({"model__type": "Unigram"}, "model.type"), ({"normalizer": {"type": "NFC"}}, "normalizer"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
    ({"model__byte_fallback": True, "normalizer": {"type": "Prepend", "prepend": "▁"}},
     "SentencePiece's vocabulary, as in Llama 2 and TinyLlama: not implemented"),
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


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"YQ== 0\nYg== x\n", b"YQ== 0\nYg== 0\n",
                                     b"YQ==\n", b"!!! 0\n"])
def test_a_broken_tokenizer_model_is_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value).splitlines()) == 1


def test_a_model_with_fewer_rows_than_tokens_is_refused(toy):
    assert len(Tokenizer(toy.parent, 542)) == 542
    with pytest.raises(CheckpointError, match="542 tokens, but the model's vocab_size is 541"):
        Tokenizer(toy.parent, 541)


def test_rows_beyond_the_tokenizer_are_padding_without_text(tmp_path, toy):
    """Also where a byte is no token: its inner id is the first one of the padding."""
    padded = Tokenizer(toy.parent, 576)
    assert len(padded) == 542
    assert padded.decode([75, 542, 575, 10 ** 9, 76]) == "KL"
    assert padded.pairs.token_bytes(542) == b""
    small = Tokenizer(small_json(tmp_path / "tokenizer.json"), 64)
    for i in range(64):
        assert isinstance(small.decode([i]), str)
        assert i < len(small) or small.decode([i]) == "" and small.pairs.token_bytes(i) == b""


def test_special_tokens_of_no_chat_format_are_refused_when_it_is_needed(tmp_path):
    path = small_json(tmp_path / "tokenizer.json", added_tokens=[])
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("abc") == [27] and tokenizer.chat is None
    with pytest.raises(CheckpointError, match="chat format"):
        encode_chat([Turn("user", ["abc"])], tokenizer, [])
    assert list(CHAT_FORMATS) == ["Llama 3", "ChatML"]


@pytest.mark.parametrize("chat", CHAT_FORMATS)
def test_a_chat_format_that_lacks_a_token_is_none(tmp_path, chat):
    """Else the token would be spelt out as prose in every sample."""
    layout = CHAT_FORMATS[chat]
    names = [*layout.begin, *layout.header[0], *layout.header[1], *layout.end]
    names = [name for name in names if name.startswith("<|")]
    for missing in [None, *names]:
        added = [{"id": 28 + i, "content": name, "special": True}
                 for i, name in enumerate(names) if name != missing]
        tokenizer = Tokenizer(small_json(tmp_path / "tokenizer.json", added_tokens=added))
        assert tokenizer.chat is (layout if missing is None else None)
