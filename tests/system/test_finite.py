"""A model with a weight that is not finite is refused by name; so are logits that are not."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import run, sample
from model import AlignVLM, Llama
from plumbing.settings import CheckpointError, InputError
from shipped import ASK, PAGE
from small_models import small_llama
from tensors import randomise
from toy.pages import STAGE0


def struck(folder: Path, key: str, value: float, at: int | slice = -1, dtype=torch.float32) -> Path:
    """A toy with one number of one tensor exchanged, or some."""
    shutil.copytree(STAGE0, folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    tensors[key].view(-1)[at] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


KEYS = ["vision.post_layernorm.weight", "connector.W1.weight", "connector.W2.weight",
        "connector.norm_V.bias", "llm.embed_tokens.weight", "llm.layers.0.mlp.down_proj.weight",
        "llm.norm.weight"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_weight_that_is_not_finite(tmp_path, key, value, dtype):
    at = KEYS.index(key) % 3 - 1            # the last, the first, the second number
    folder = struck(tmp_path / "model", key, value, at, dtype)
    with pytest.raises(CheckpointError, match=f"{folder}/model.safetensors: {key} has weights "
                                              "that are not finite"):
        AlignVLM.from_pretrained(folder)


def test_weights_of_any_size_are_weights(tmp_path):
    largest = torch.finfo(torch.float16).max
    folder = struck(tmp_path / "model", "llm.norm.weight", largest, dtype=torch.float16)
    assert AlignVLM.from_pretrained(folder).llm.norm.weight.max() == largest


def test_a_shard_is_named(tmp_path):
    model = AlignVLM.from_pretrained(STAGE0)
    with torch.no_grad():
        model.llm.norm.weight[3] = math.nan
    model.save_pretrained(tmp_path / "model", STAGE0 / "tokenizer.model", torch.float32,
                          shard_bytes=10 ** 6)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["llm.norm.weight"]
    assert len(set(index["weight_map"].values())) > 1
    with pytest.raises(CheckpointError, match=f"{shard}: llm.norm.weight has weights"):
        AlignVLM.from_pretrained(tmp_path / "model")


def test_every_command_says_so_in_a_line(tmp_path):
    folder = struck(tmp_path / "stage2", "connector.W1.weight", math.nan)
    line = f"{folder}/model.safetensors: connector.W1.weight has weights that are not finite"
    questions = tmp_path / "questions.jsonl"
    page = tmp_path / "page.png"
    shutil.copyfile(PAGE, page)
    questions.write_text('{"image": "page.png", "prompt": "?"}\n')
    for more in (ASK, [*ASK, "--temperature", 1], ["--image", page, "--interactive"],
                 ["--questions", questions, "--answers", tmp_path / "answers.jsonl"],
                 ["--image", page, "--explain", tmp_path / "tokens.png"]):
        assert line in sample("--checkpoint", folder, *more, code=2).stderr
    assert not (tmp_path / "answers.jsonl").exists()
    for command in (["eval.py", "--checkpoint", folder, "--benchmark", "toy"],
                    ["train.py", "--stage", 3, "--steps", 1, "--out", tmp_path]):
        last = run(*command, code=2).stderr.splitlines()[-1]
        assert last.startswith(f"{command[0]}: {line}")
    assert not (tmp_path / "stage3").exists()


@pytest.mark.parametrize("more", [[], ["--temperature", 1]])
def test_weights_that_are_too_large_to_compute_with(tmp_path, more):
    folder = struck(tmp_path / "model", "llm.layers.1.mlp.up_proj.weight", 3e38, slice(None))
    done = sample("--checkpoint", folder, *ASK, *more, code=2)
    assert done.stderr.splitlines()[-1].startswith("sample.py: the logits are not finite")
    assert not done.stdout.strip()


def test_one_bad_prompt_of_a_batch_is_enough():
    llm = randomise(Llama(small_llama())).eval()
    x = torch.randn(3, 5, llm.config.hidden_size)
    [*_] = llm.generate(x, [5, 4, 5], set(), 2)
    x[1, 2] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="the logits are not finite"):
            next(llm.generate(x, [5, 4, 5], set(), 2, temperature=temperature))
