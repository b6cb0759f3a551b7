"""paper/metrics.py against VLMEvalKit itself (ms-vlmeval 0.0.20), on 200 hard rows a benchmark.

tests/helpers/official_scores.py has run the package; its numbers are in official_scores.json.
"""
import json
import sys
from pathlib import Path

import pytest

from official_scores import NAMES, differences
from paper.metrics import spacy_tokenizer, vcr_tokens

OFFICIAL = json.loads((Path(__file__).parents[1] / "helpers" / "official_scores.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_each_row_scores_as_in_vlmevalkit(name):
    assert len(OFFICIAL[name]) == 200
    apart = differences(name, OFFICIAL[name])
    assert not apart, "\n".join(apart)


@pytest.mark.parametrize("text, tokens", [
    ("the old town hall", ["the", "old", "town", "hall"]),
    ("a\nb", ["a", "\n", "b"]), ("a  b", ["a", " ", "b"]), ("  a ", ["  ", "a"]),
    ("a \n\nb", ["a", "\n\n", "b"]), ("a. AT&T, 1st", ["a.", "AT&T", ",", "1st"]),
    ("the U.S. state", ["the", "U.S.", "state"]), ("don't 1,000.5", ["do", "n't", "1,000.5"]),
    ("old-town's", ["old", "-", "town", "'s"]), ("", [])])
def test_vcr_tokens_are_spacys(text, tokens):
    """What spaCy 3.8's blank English tokenizer makes of it."""
    assert vcr_tokens(text) == tokens


def test_spacy_is_used_where_it_is_installed(monkeypatch):
    """A stand-in that knows its own tokens."""
    class Token:
        def __init__(self, text):
            self.text = text

    class Language:
        def tokenizer(self, text):
            return [Token(part) for part in text.split("+")]

    class Module:
        @staticmethod
        def blank(language):
            assert language == "en"
            return Language()

    monkeypatch.setitem(sys.modules, "spacy", Module)
    spacy_tokenizer.cache_clear()
    try:
        assert vcr_tokens("a b+c") == ["a b", "c"]
    finally:
        spacy_tokenizer.cache_clear()
