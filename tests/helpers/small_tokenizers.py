"""Tokenizers that the tests make themselves: the toy's, and a tokenizer.json of 30 tokens."""
import json
from pathlib import Path

import pytest

from data import Tokenizer
from released import write_tokenizer_json
from toy.pages import write_toy_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """The toy's."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_toy_tokenizer(path)
    return Tokenizer(path)


def small_json(path: Path, **changes) -> Path:
    """A tokenizer.json with the letters a to z, "ab" and "abc", and ChatML's special tokens.

    changes: values of the file, by their keys joined with "__", that it has instead.
    """
    letters = {chr(c): i for i, c in enumerate(range(97, 123))}
    split = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}]
    write_tokenizer_json(path, {**letters, "ab": 26, "abc": 27}, ["a b", "ab c"],
                         {"<|im_start|>": 28, "<|im_end|>": 29}, split)
    values = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = values
        for name in outer:
            place = place[name]
        place[last] = value
    path.write_text(json.dumps(values))
    return path
