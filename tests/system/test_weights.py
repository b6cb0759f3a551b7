"""Weights on disk: every format against transformers, released ones, memory, and bad folders."""
import contextlib
import json
import math
import os
import shutil
import sys
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig as TheirConfig
from transformers import (LlamaForCausalLM, SiglipConfig, SiglipModel, SiglipTextConfig,
                          SiglipVisionConfig, SiglipVisionModel)

import sample
from conftest import alone, close, randomise, run, torchrun
from data import Tokenizer, encode_chat
from model import LLAMA_PRESETS, AlignVLM, Llama, read_llama
from plumbing import fast
from plumbing.examples import Turn
from plumbing.settings import CheckpointError, InputError
from released import (change_tensors, edit, fetched, random_state, smollm2, truncate, write_meta,
                      write_safetensors_of_holes)
from toy.pages import write_toy_tokenizer
from vision import SIGLIP_PRESETS, SigLIP, SigLIPConfig, read_siglip

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_tensors(ours: dict, theirs: dict) -> None:
    """Bit by bit."""
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]), name


# ------------------------------------------------------------------------------------------------
# SigLIP


def small_siglip() -> SiglipConfig:
    vision = SiglipVisionConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                                intermediate_size=40, image_size=36, patch_size=7)
    text = SiglipTextConfig(vocab_size=11, hidden_size=24, num_hidden_layers=1,
                            num_attention_heads=2, intermediate_size=30)
    return SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    """Both towers, as the hub has the released ones."""
    folder = tmp_path_factory.mktemp("siglip")
    randomise(SiglipModel(small_siglip())).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["both towers", "vision only", "vision only, bare names",
                                  "sharded"])
def test_siglip_folders(siglip_folder, tmp_path, form):
    theirs = SiglipModel.from_pretrained(siglip_folder).eval().vision_model
    folder = tmp_path / "weights"
    if form == "both towers":
        folder = siglip_folder
        keys = load_file(folder / "model.safetensors")
        assert any(key.startswith("text_model.") for key in keys)
    elif form == "sharded":
        whole = SiglipModel.from_pretrained(siglip_folder)
        whole.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
    else:
        tower = SiglipVisionModel.from_pretrained(siglip_folder)
        tower.save_pretrained(folder)
        prefix = "" if "bare" in form else "vision_model."
        state = load_file(folder / "model.safetensors")
        state = {prefix + key.removeprefix("vision_model."): p for key, p in state.items()}
        save_file(state, folder / "model.safetensors")
    ours = SigLIP.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        close(ours(pixels), theirs(pixels).last_hidden_state)
    half = SigLIP.from_pretrained(folder, torch.bfloat16)
    assert half.post_layernorm.weight.dtype == torch.bfloat16


def test_siglip_configuration_of_the_hub(tmp_path):
    """What google/siglip-so400m-patch14-384 and -base-patch16-224 write.

    The latter leaves all of it out.
    """
    written = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
               "model_type": "siglip_vision_model", "num_attention_heads": 16,
               "num_hidden_layers": 27, "patch_size": 14}
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    for values, config in [(written, SIGLIP_PRESETS["so400m-patch14-384"]),
                           ({"model_type": "siglip_vision_model"},
                            SigLIPConfig(768, 12, 12, 3072, 224, 16))]:
        for top in ({"model_type": "siglip", "vision_config": values}, values):
            (tmp_path / "config.json").write_text(json.dumps(top))
            assert read_siglip(tmp_path)[0] == config


# ------------------------------------------------------------------------------------------------
# Llama


def their_config(tied: bool, **changes) -> TheirConfig:
    sizes = dict(vocab_size=542, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=6, intermediate_size=40,
                 tie_word_embeddings=tied, rms_norm_eps=1e-5, max_position_embeddings=512,
                 rope_parameters={"rope_theta": 10_000.0, **ROPE})
    return TheirConfig(**{**sizes, **changes})


def meta_params(config: TheirConfig, **changes) -> dict:
    return {"dim": config.hidden_size, "n_layers": config.num_hidden_layers,
            "n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads,
            "vocab_size": config.vocab_size, "ffn_dim_multiplier": 1.0, "multiple_of": 8,
            "norm_eps": 1e-5, "rope_theta": 10_000.0, "use_scaled_rope": True, **changes}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama_folders(request, tmp_path_factory):
    """The same weights in every form, and transformers' model of them."""
    folder, tied = tmp_path_factory.mktemp("llama"), request.param
    # Meta's files cannot say the factor nor the original length: what they mean is 32 or 8, and
    # 8192.
    rope = {**ROPE, "rope_theta": 10_000.0, "factor": 32.0 if tied else 8.0,
            "original_max_position_embeddings": 8192}
    config = their_config(tied, intermediate_size=64, rope_parameters=rope)
    theirs = randomise(LlamaForCausalLM(config)).eval()
    theirs.save_pretrained(folder / "hub")
    theirs.save_pretrained(folder / "sharded", max_shard_size="20KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 3
    state = {key: p.clone() for key, p in theirs.state_dict().items()}
    same = torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert same == tied
    for shards in (1, 2):
        write_meta(folder / f"meta{shards}", state, meta_params(config), shards)
    return folder, theirs


@pytest.mark.parametrize("form", ["hub", "sharded", "meta1", "meta2"])
def test_llama_folders(llama_folders, form):
    folder, theirs = llama_folders
    ours = Llama.from_pretrained(folder / form).eval()
    assert ours.config.tie_embeddings == theirs.config.tie_word_embeddings
    tokens = torch.randint(0, 542, (2, 40))
    with torch.no_grad():
        close(ours(tokens), theirs(tokens).logits)
    reference = Llama.from_pretrained(folder / "hub")
    assert ours.config == reference.config
    same_tensors(ours.state_dict(), reference.state_dict())     # whatever the format
    half = Llama.from_pretrained(folder / form, torch.bfloat16)
    for p, q in zip(half.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16())


def test_a_sharded_matrix_is_read_by_parts(llama_folders, monkeypatch):
    """Blocks of a few rows that fit neither heads nor shards give the same weights."""
    folder, _ = llama_folders
    reference = Llama.from_pretrained(folder / "hub").state_dict()
    monkeypatch.setattr("plumbing.weights.BLOCK_BYTES", 5 * 24 * 4)
    for form in ("sharded", "meta2"):
        same_tensors(Llama.from_pretrained(folder / form).state_dict(), reference)


@pytest.mark.parametrize("differs", [True, False])
def test_a_stored_head_wins_over_a_tied_configuration(differs, tmp_path, capsys):
    """As merges of adapters leave it: a line says so. A mere copy of the embeddings is no head."""
    theirs = randomise(LlamaForCausalLM(their_config(False))).eval()
    if not differs:
        theirs.lm_head.weight.data.copy_(theirs.model.embed_tokens.weight)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    capsys.readouterr()
    ours = Llama.from_pretrained(tmp_path).eval()
    assert ours.config.tie_embeddings != differs
    said = capsys.readouterr().err
    assert ("the stored head is taken" in said) == differs
    assert len(said.splitlines()) == differs
    tokens = torch.randint(0, 542, (2, 9))
    with torch.no_grad():
        close(ours(tokens), theirs(tokens).logits)


def released_config(**changes) -> dict:
    return {"model_type": "llama", "hidden_act": "silu", "vocab_size": 128256,
            "hidden_size": 2048, "head_dim": 64, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, **changes}


def test_both_spellings_of_rope(tmp_path):
    scaling = {**ROPE, "factor": 32.0, "original_max_position_embeddings": 8192}
    named = dict(scaling)
    named["type"] = named.pop("rope_type")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    for rope in ({"rope_theta": 500000.0, "rope_scaling": scaling},
                 {"rope_theta": 500000.0, "rope_scaling": named},
                 {"rope_parameters": {"rope_theta": 500000.0, **scaling}}):
        (tmp_path / "config.json").write_text(json.dumps(released_config(**rope)))
        assert read_llama(tmp_path)[0] == LLAMA_PRESETS["llama-3.2-1b"]
    for rope in ({}, {"rope_theta": 10000.0, "rope_scaling": None},
                 {"rope_parameters": {"rope_type": "default"}},
                 {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}):
        (tmp_path / "config.json").write_text(json.dumps(released_config(**rope)))
        config = read_llama(tmp_path)[0]
        assert (config.rope_theta, config.rope_factor) == (10000.0, 1.0)


def test_what_a_llamas_configuration_leaves_out_is_transformers_default(tmp_path):
    given = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
             "intermediate_size": 40}
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **given}))
    ours, theirs = read_llama(tmp_path)[0], TheirConfig(**given)
    assert (ours.rms_norm_eps, ours.n_kv_heads, ours.head_dim, ours.tie_embeddings) == (
        theirs.rms_norm_eps, theirs.num_key_value_heads, theirs.head_dim,
        theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_factor == 1


@pytest.mark.parametrize("preset, multiplier, multiple", [
    ("llama-3.2-1b", 1.5, 256), ("llama-3.2-3b", 1.0, 256), ("llama-3.1-8b", 1.3, 1024)])
def test_metas_numbers_for_the_released_models(preset, multiplier, multiple, tmp_path):
    """One row of a vocabulary says whether the embeddings are tied: its files do not."""
    config = LLAMA_PRESETS[preset]
    (tmp_path / "params.json").write_text(json.dumps(
        {"dim": config.hidden_size, "n_layers": config.n_layers, "n_heads": config.n_heads,
         "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": multiplier,
         "multiple_of": multiple, "norm_eps": 1e-5, "rope_theta": 500000.0,
         "use_scaled_rope": True}))
    E_text, head = torch.ones(3, 4), torch.ones(3, 4)
    head[2, 3] += 0 if config.tie_embeddings else 1
    torch.save({"tok_embeddings.weight": E_text, "output.weight": head},
               tmp_path / "consolidated.00.pth")
    assert read_llama(tmp_path)[0] == config


# ------------------------------------------------------------------------------------------------
# The assembled model


@pytest.fixture(scope="module")
def backbones(siglip_folder, tmp_path_factory):
    """Two folders as people have them.

    The LLM's vocabulary is the toy's, in Meta's format of two shards.
    """
    folder = tmp_path_factory.mktemp("backbones")
    config = their_config(True, hidden_size=36, num_attention_heads=6, num_key_value_heads=2,
                          intermediate_size=96)
    theirs = randomise(LlamaForCausalLM(config), seed=1)
    write_meta(folder / "llm", theirs.state_dict(), meta_params(config), shards=2)
    write_toy_tokenizer(folder / "llm" / "tokenizer.model")
    return siglip_folder, folder / "llm"


OURS = ["config.json", "model.safetensors", "tokenizer.model"]


def test_from_backbones_and_back(backbones, tmp_path):
    torch.manual_seed(0)
    tokenizer = backbones[1] / "tokenizer.model"
    model = AlignVLM.from_backbones(*backbones)
    assert torch.equal(model.connector.W2.weight, model.llm.head)
    assert model.connector.W2.weight.data_ptr() != model.llm.head.data_ptr()
    model.save_pretrained(tmp_path / "whole", tokenizer)
    model.save_pretrained(tmp_path / "shards", tokenizer, torch.float32, shard_bytes=100_000)
    assert names_in(tmp_path / "whole") == OURS
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "shards").glob("model-*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 3
    state = model.state_dict()
    same_tensors(AlignVLM.from_pretrained(tmp_path / "shards").state_dict(), state)
    same_tensors(AlignVLM.from_pretrained(tmp_path / "whole").state_dict(),
                 {name: p.bfloat16() for name, p in state.items()})
    # Saved again where it was: a shorter list of files leaves nothing of the longer one.
    model.save_pretrained(tmp_path / "shards", tokenizer)
    assert names_in(tmp_path / "shards") == OURS


def test_a_folder_of_somebody_else_is_not_replaced(backbones, tmp_path):
    """Nor one's own file in a model's folder, which stays beside the next model."""
    tokenizer = backbones[1] / "tokenizer.model"
    model = AlignVLM.from_backbones(*backbones)
    # A file alone has a name of ours, too, if the user's weights or tokenizer lie without a config.
    for name, content in [("notes.txt", "mine"), ("config.json", '{"model_type": "llama"}'),
                          ("model.safetensors", "weights"), ("tokenizer.json", "mine"),
                          ("log.jsonl", "mine"), ("step-1", "mine")]:
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match="holds something, and is not a model's folder"):
            model.save_pretrained(folder, tokenizer)
        assert names_in(folder) == [name] and (folder / name).read_text() == content
    (tmp_path / "new.partial").mkdir()          # by way of which it would be written
    (tmp_path / "new.partial" / "model.safetensors").write_text("weights")
    with pytest.raises(InputError, match="new.partial: holds something"):
        model.save_pretrained(tmp_path / "new", tokenizer)
    assert (tmp_path / "new.partial" / "model.safetensors").read_text() == "weights"
    shutil.rmtree(tmp_path / "new.partial")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="a file, where a model's folder should be"):
        model.save_pretrained(tmp_path / "file", tokenizer)
    with pytest.raises(InputError, match="the tokenizer's file is no such file"):
        model.save_pretrained(tmp_path / "new", backbones[1])
    theirs = ["config", "file", "log", "model", "notes", "step-1", "tokenizer"]
    assert names_in(tmp_path) == theirs
    for _ in range(2):
        model.save_pretrained(tmp_path / "own", tokenizer)
        (tmp_path / "own" / "notes.txt").write_text("mine")
        (tmp_path / "own" / "log.jsonl").write_text("of the older model")
    model.save_pretrained(tmp_path / "own", tokenizer)
    assert names_in(tmp_path / "own") == sorted([*OURS, "notes.txt"])
    assert names_in(tmp_path) == sorted([*theirs, "own"])


def test_two_ranks_load_and_save_what_one_does(backbones, tmp_path):
    """Rows that two ranks cannot share evenly, among them: 25 positions, 542 tokens."""
    torchrun(2, "tests/helpers/loading.py", "vlm", *backbones, tmp_path / "two")
    torch.manual_seed(0)
    one = AlignVLM.from_backbones(*backbones).state_dict()
    assert any(len(p) % 2 for p in one.values())
    same_tensors(AlignVLM.from_pretrained(tmp_path / "two").state_dict(), one)


def test_train_from_released_weights_and_sample_elsewhere(backbones, tmp_path):
    vision, llm = backbones
    out = tmp_path / "run"
    options = ["--steps", 2, "--batch-size", 2, "--out", out]
    torchrun(2, "train.py", "--stage", 1, "--vision", vision, "--llm", llm, *options)
    assert not (out / "stage0").exists()
    run("train.py", "--stage", 2, "--preset", "llama-3.2-1b", *options)
    state = load_file(out / "stage2" / "model.safetensors")
    assert {p.dtype for p in state.values()} == {torch.bfloat16}
    shutil.move(out / "stage2", tmp_path / "elsewhere")
    run("-m", "toy.pages", "--draw", 1, tmp_path)
    done = run("sample.py", "--checkpoint", tmp_path / "elsewhere", "--device", "cpu",
               "--image", tmp_path / "0000-invoice.png", "--max-new-tokens", 3)
    assert str(tmp_path / "elsewhere") in done.stderr


def test_the_small_setup_trains_the_connector_alone_also_on_replicas(backbones, tmp_path):
    """Two replicas of two shards read and learn what one process does.

    Their rows (542 tokens, 25 positions) do not divide evenly.
    """
    states, losses = {}, {}
    for name, processes, more in [("one", 1, []), ("four", 4, ["--shard-size", 2])]:
        torchrun(processes, "train.py", "--stage", 1, "--preset", "low-resource",
                 "--vision", backbones[0], "--llm", backbones[1], "--steps", 2,
                 "--batch-size", 4, "--out", tmp_path / name, *more)
        folder = tmp_path / name / "stage1"
        states[name] = load_file(folder / "model.safetensors")
        log = (folder / "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in log]
    assert losses["four"] == pytest.approx(losses["one"], rel=1e-5)
    torch.manual_seed(0)
    before = AlignVLM.from_backbones(*backbones, dtype=torch.float32).state_dict()
    changed = {name.split(".")[0] for name, p in states["one"].items()
               if not torch.equal(p, before[name].bfloat16())}
    assert changed == {"connector"}


# ------------------------------------------------------------------------------------------------
# Released weights: SmolLM2-135M-Instruct

PROMPTS = [
    "What is the capital of France?", "Write a haiku about the sea.", "2 + 2 =",
    "Translate to French: good morning", "List three prime numbers.", "def fibonacci(n):",
    "Who wrote Hamlet?", "Explain photosynthesis to a child.", "The quick brown fox",
    "Name the planets of the solar system in order."]


@pytest.fixture(scope="module")
def released():
    folder = fetched(smollm2)
    ours = Llama.from_pretrained(folder, torch.float32).eval()
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer(folder, ours.config.vocab_size)
    return folder, ours, theirs, tokenizer


def chat_ids(tokenizer: Tokenizer, prompt: str) -> torch.Tensor:
    return encode_chat([Turn("user", [prompt])], tokenizer, [])[0]


def test_smollm2_logits_equal_transformers(released):
    """Within 1e-4 where the products are transformers' own.

    And 1e-5 of the largest by oneDNN, which rounds otherwise.
    """
    folder, ours, theirs, tokenizer = released
    used = Llama.from_pretrained(folder, torch.float32).eval()
    fast.use(used)
    for prompt in PROMPTS:
        tokens = chat_ids(tokenizer, prompt)[None]
        with torch.no_grad():
            expected = theirs(tokens).logits
            close(ours(tokens), expected, 1e-4, scale=1.0)
            close(used(tokens), expected, 1e-5)


def test_smollm2_greedy_tokens_equal_transformers_and_uncached_ones(released):
    _, ours, theirs, tokenizer = released
    prompts = [chat_ids(tokenizer, prompt) for prompt in PROMPTS]
    x = ours.embed_tokens(torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True))
    lengths = [len(prompt) for prompt in prompts]
    new = torch.tensor(list(ours.generate(x, lengths, set(), 64))).T        # (10, 64), cached
    with torch.no_grad():
        for tokens, answer in zip(prompts, new):
            # A greedy token is the best one after those before it: so, all at once, is each of
            # theirs and, without a cache, each of ours.
            row = torch.cat([tokens, answer])[None]
            for logits in (ours(row), theirs(row).logits):
                assert logits[0, len(tokens) - 1:-1].argmax(-1).tolist() == answer.tolist()
        # And once through their own loop.
        one = theirs.generate(prompts[0][None], attention_mask=torch.ones_like(prompts[0][None]),
                              do_sample=False, max_new_tokens=64, min_new_tokens=64,
                              eos_token_id=None, pad_token_id=2)
    assert one[0, len(prompts[0]):].tolist() == new[0].tolist()


def test_sample_talks_to_the_bare_llm(released):
    done = run("sample.py", "--llm", released[0], "--prompt", "What is the capital of France?",
               "--device", "cpu")
    assert "Paris" in done.stdout and len(done.stdout.splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# Folders that cannot be used: one line that names the file and the key, status 2, nothing
# half-written


class Evil:
    """What a pickle may hold: a call."""

    def __reduce__(self):
        return os.system, ("touch executed",)


INDEX, PTH, HUB = "model.safetensors.index.json", "consolidated.00.pth", "model.safetensors"
THIRD = "model-00003-of-"


def third_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[2]


def drop_from_index(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    dropped = third_shard(folder).name
    edit(folder / INDEX, weight_map={key: file for key, file in places.items() if file != dropped})


def tensors(file: str, **changes):
    """What changes the tensors of that file."""
    return lambda folder: change_tensors(folder / file, **changes)


def settings(file: str, **changes):
    """What changes the settings of that file."""
    return lambda folder: edit(folder / file, **changes)


def removed(file: str):
    return lambda folder: (folder / file).unlink()


def cut(file: str):
    return lambda folder: truncate(folder / file)


def pickled(value):
    return lambda folder: torch.save(value, folder / PTH)


# form of the folder, what is done to it, the file that the message names, and the key
BAD_LLAMAS = {
    "no config": ("hub", removed("config.json"), "", "config.json"),
    "config is no JSON": ("hub", cut("config.json"), "config.json", "not JSON"),
    "no weights": ("hub", removed(HUB), HUB, "no such file"),
    "truncated": ("hub", cut(HUB), HUB, "not a complete"),
    "empty": ("hub", lambda folder: (folder / HUB).write_bytes(b""), HUB, "not a complete"),
    "shard missing": ("sharded", lambda f: third_shard(f).unlink(), THIRD, "no such file"),
    "shard truncated": ("sharded", lambda f: truncate(third_shard(f)), THIRD, "not a complete"),
    "shard not in the index": ("sharded", drop_from_index, INDEX, "model."),
    "index elsewhere": ("sharded", settings(INDEX, weight_map={"x": "../x"}), INDEX, "'../x'"),
    "index without map": ("sharded", settings(INDEX, weight_map=None), INDEX, "weight_map"),
    "missing": ("hub", tensors(HUB, model__norm__weight=None), HUB, "model.norm.weight"),
    "unexpected": ("hub", tensors(HUB, model__extra=torch.zeros(1)), HUB, "model.extra"),
    "mis-shaped": ("hub", tensors(HUB, model__norm__weight=torch.zeros(7)), HUB,
                   "model.norm.weight has shape [7]"),
    "integers": ("hub", tensors(HUB, model__norm__weight=torch.arange(24)), HUB,
                 "model.norm.weight"),
    "meta missing": ("meta1", tensors(PTH, norm__weight=None), PTH, "norm.weight"),
    "meta unexpected": ("meta1", tensors(PTH, extra=torch.zeros(1)), PTH, "extra"),
    "meta mis-shaped": ("meta1", tensors(PTH, norm__weight=torch.zeros(7)), PTH,
                        "norm.weight has shape [7]"),
    "meta shards differ": ("meta2", tensors("consolidated.01.pth", tok_embeddings__weight=None),
                           "consolidated.01.pth", "tok_embeddings.weight"),
    "meta shard missing": ("meta2", removed(PTH), PTH, "no such file"),
    "meta last shard missing": ("meta2", removed("consolidated.01.pth"), PTH, "has shape"),
    "meta truncated": ("meta1", cut(PTH), PTH, "not a complete"),
    "meta no weights": ("meta1", removed(PTH), PTH, "no such file"),
    "meta params": ("meta1", settings("params.json", dim="24"), "params.json", "dim is '24'"),
    "meta without layers": ("meta1", settings("params.json", n_layers=None), "params.json",
                            "n_layers is missing"),
    "evil pickle": ("meta1", pickled({"norm.weight": Evil()}), PTH, "only tensors"),
    "pickle of a number": ("meta1", pickled({"norm.weight": 3}), PTH,
                           "norm.weight is not a tensor"),
    "pickle of a list": ("meta1", pickled([torch.zeros(2)]), PTH, "holds a list"),
}
for bad in (
        {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"},
        {"sliding_window": 4096}, {"model_type": "mistral"}, {"partial_rotary_factor": 0.5},
        {"quantization_config": {"bits": 4}}, {"num_key_value_heads": 3}, {"hidden_size": -1},
        {"vocab_size": None}, {"num_hidden_layers": 2.5}, {"head_dim": 7},
        {"rope_parameters": 3}):
    for key, value in bad.items():
        BAD_LLAMAS[f"{key} {value}"] = ("hub", settings("config.json", **bad), "config.json", key)
without_factor = {key: value for key, value in ROPE.items() if key != "factor"}
for section, rope, key in (
        ("rope_parameters", {**ROPE, "rope_type": "yarn"}, "rope_type"),
        ("rope_scaling", {**ROPE, "rope_type": "linear"}, "rope_type"),
        ("rope_scaling", {"type": "dynamic"}, "type"),
        ("rope_parameters", without_factor, "factor")):
    changes = {"rope_parameters": None, section: rope}
    BAD_LLAMAS[f"{section}.{key} {rope.get(key)}"] = (
        "hub", settings("config.json", **changes), "config.json", f"{section}.{key}")


def refused(monkeypatch, capsys, *options) -> str:
    """Run sample.py in this process; its complaint, after the checks that all of them share."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, options), "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        sample.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert printed.out == ""
    return line


@pytest.mark.parametrize("case", BAD_LLAMAS)
def test_bad_llama_folders(llama_folders, tmp_path, monkeypatch, capsys, case):
    form, spoil, file, key = BAD_LLAMAS[case]
    folder = tmp_path / "folder"
    shutil.copytree(llama_folders[0] / form, folder)
    spoil(folder)
    monkeypatch.chdir(tmp_path)
    line = refused(monkeypatch, capsys, "--llm", folder, "--prompt", "x")
    assert line.startswith(f"sample.py: {folder / file}") and key in line
    assert not (tmp_path / "executed").exists()


def test_bad_tokenizers_and_prompts(backbones, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(backbones[1], folder)
    tokenizer = folder / "tokenizer.model"
    lines = tokenizer.read_bytes().splitlines(keepends=True)
    one_more = b64encode(b"one more") + f" {len(lines)}\n".encode()
    tokenizer.write_bytes(b"".join([*lines, one_more]))
    line = refused(monkeypatch, capsys, "--llm", folder, "--prompt", "x")
    assert str(tokenizer) in line and "543" in line and "542" in line and "vocab_size" in line
    tokenizer.unlink()
    line = refused(monkeypatch, capsys, "--llm", folder, "--prompt", "x")
    assert str(tokenizer) in line
    tokenizer.write_bytes(b"".join(lines))
    lone = b"caf\xe9".decode("utf-8", "surrogateescape")
    done = run("sample.py", "--llm", folder, "--prompt", lone, code=2)
    assert len(done.stderr.splitlines()) <= 2 and "lone surrogate" in done.stderr


NORM = "vision_model.post_layernorm.bias"
BAD_SIGLIPS = {
    "truncated": (cut(HUB), HUB, "not a complete"),
    "missing": (tensors(HUB, **{NORM: None}), HUB, NORM),
    "unexpected": (tensors(HUB, vision_model__x=torch.zeros(1)), HUB, "vision_model.x"),
    "mis-shaped": (tensors(HUB, **{NORM: torch.zeros(5)}), HUB, NORM),
    "model_type": (settings("config.json", model_type="clip"), "config.json", "model_type"),
    "hidden_act": (settings("config.json", vision_config={"hidden_act": "quick_gelu"}),
                   "config.json", "vision_config.hidden_act"),
    "heads": (settings("config.json", vision_config={"num_attention_heads": 7}), "config.json",
              "vision_config.num_attention_heads"),
    "a Llama": (settings("config.json", **released_config()), "config.json", "model_type"),
}


@pytest.mark.parametrize("case", BAD_SIGLIPS)
def test_bad_siglip_folders(siglip_folder, tmp_path, case):
    spoil, file, key = BAD_SIGLIPS[case]
    folder = tmp_path / "folder"
    shutil.copytree(siglip_folder, folder)
    spoil(folder)
    with pytest.raises(CheckpointError) as error:
        SigLIP.from_pretrained(folder)
    line = str(error.value)
    assert line.startswith(str(folder / file)) and key in line and len(line.splitlines()) == 1


def test_bad_saved_models(backbones, tmp_path):
    model = AlignVLM.from_backbones(*backbones)
    model.save_pretrained(tmp_path / "good", backbones[1] / "tokenizer.model")
    good = json.loads((tmp_path / "good" / "config.json").read_text())
    for section, key, value in [
            ("vision", "n_layers", 3), ("llm", "n_layers", -1), ("llm", "vocab_size", 541),
            ("llm", "rope_theta", "x"), ("llm", "tie_embeddings", 3), ("llm", "typo", 1),
            ("vision", "feature_layer", 7), ("vision", "image_mean", None),
            ("vision", "max_tiles", 0), ("vision", "max_tiles", None),
            ("vision", "max_tiles", 1001), ("vision", "image_mean", True),
            ("vision", "feature_layer", 1.0), ("vision", "feature_layer", True),
            ("llm", "rope_theta", 10 ** 400), ("llm", "hidden_size", 10 ** 18)]:
        config = {**good, section: {**good[section], key: value}}
        (tmp_path / "good" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError) as error:
            AlignVLM.from_pretrained(tmp_path / "good")
        line = str(error.value)
        assert str(tmp_path / "good") in line and len(line.splitlines()) == 1
        assert (f"{section}.{key}" if "config.json" in line else "model.safetensors: ") in line


def test_training_on_a_bad_folder_writes_nothing(backbones, siglip_folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(siglip_folder, tmp_path / "vision")
    truncate(tmp_path / "vision" / HUB)
    done = run("train.py", "--stage", 1, "--vision", tmp_path / "vision", "--llm", backbones[1],
               "--steps", 1, "--out", out, code=2)
    [line] = done.stderr.splitlines()
    assert str(tmp_path / "vision" / HUB) in line
    assert [path.name for path in out.iterdir()] == [".lock"]
    shutil.rmtree(out)
    done = run("train.py", "--stage", 1, "--vision", siglip_folder, "--llm", backbones[1],
               "--out", out, code=2)
    [line] = done.stderr.splitlines()
    assert "--steps" in line and not out.exists()


# ------------------------------------------------------------------------------------------------
# Random weights at the released shapes. What stands in every layer stands in two as well: so many
# are compared. All of them are loaded where memory is measured.


@pytest.fixture
def all_threads():
    """For the released shapes; conftest.py has one thread for the others.

    pytest-xdist's processes share the cores.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, os.cpu_count() // workers))
    yield
    torch.set_num_threads(1)


def write_1b(folder: Path, n_layers: int, holes: bool = False) -> None:
    """Llama-3.2-1B's shape in bf16: in three shards of the hub, and in Meta's format.

    holes: the files have the size, and nothing is written of the tensors; they read as zeros.
    """
    rope = {**ROPE, "factor": 32.0, "rope_theta": 500000.0,
            "original_max_position_embeddings": 8192}
    config = TheirConfig(**released_config(num_hidden_layers=n_layers, rope_parameters=rope,
                                           max_position_embeddings=131_072))
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):      # a tied head is no parameter
        named = LlamaForCausalLM(config).named_parameters()
        shapes = {name: p.shape for name, p in named}
    if holes:
        state = {name: torch.empty(s, dtype=torch.bfloat16) for name, s in shapes.items()}
    else:
        state = random_state(shapes)
    write_hub(folder / "hub", config, state, write_safetensors_of_holes if holes else save_file)
    params = meta_params(config, ffn_dim_multiplier=1.5, multiple_of=256, rope_theta=500000.0)
    # Meta's files repeat the tied embeddings, as other bytes.
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    with torch.serialization.skip_data() if holes else contextlib.nullcontext():
        write_meta(folder / "meta", state, params)


def write_hub(folder: Path, config: TheirConfig, state: dict, write) -> None:
    """Three shards with their index."""
    folder.mkdir()
    config.save_pretrained(folder)
    names, third = list(state), math.ceil(len(state) / 3)
    places = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = {name: state[name] for name in names[i * third:(i + 1) * third]}
        write(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_1b_in_every_format_equals_transformers(tmp_path, all_threads):
    write_1b(tmp_path, n_layers=2)
    hub = Llama.from_pretrained(tmp_path / "hub").eval()
    meta = Llama.from_pretrained(tmp_path / "meta").eval()
    assert hub.config == meta.config == replace(LLAMA_PRESETS["llama-3.2-1b"], n_layers=2)
    tokens = torch.randint(0, 128_256, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same_tensors(hub.state_dict(), meta.state_dict())
        del meta
        ours = hub.float()(tokens)          # what was bf16 is as exact in fp32
        del hub
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32).eval()
        close(ours, theirs(tokens).logits, 1e-4)
    shutil.rmtree(tmp_path)     # 2 GB


def test_1b_loads_lean(tmp_path):
    """Peak memory above what importing torch takes.

    1.15 times the weights at most, 0.65 times on each of 2 ranks.
    """
    write_1b(tmp_path, n_layers=16, holes=True)
    for form in ("hub", "meta"):
        done = run("tests/helpers/loading.py", "load", tmp_path / form, start=alone)
        whole = json.loads(done.stdout)
        assert whole["bytes"] == 2 * 1_235_814_400
        share = whole["peak"] / whole["bytes"]
        print(f"{form}: {share:.3f} times the weights")
        assert 1 < share <= 1.15
    torchrun(2, "tests/helpers/loading.py", "ranks", tmp_path / "hub", tmp_path, start=alone)
    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert sum(rank["bytes"] for rank in ranks) == whole["bytes"]
    for rank in ranks:
        share = rank["peak"] / whole["bytes"]
        print(f"one of two ranks: {share:.3f} times the weights")
        assert 0.5 < share <= 0.65


def test_so400m_equals_transformers(tmp_path, all_threads):
    """Of its 27 layers 3."""
    config = SiglipVisionConfig(hidden_size=1152, image_size=384, intermediate_size=4304,
                                num_attention_heads=16, num_hidden_layers=3, patch_size=14)
    with torch.device("meta"):
        named = SiglipVisionModel(config).named_parameters()
        shapes = {name: p.shape for name, p in named}
    bare = not any(name.startswith("vision_model.") for name in shapes)
    prefix = "vision_model." if bare else ""
    state = {prefix + name: p for name, p in random_state(shapes).items()}
    config.save_pretrained(tmp_path)
    # As the released file: the text tower's tensors are there too, and are not looked at.
    others = {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 4),
              "logit_scale": torch.zeros(1)}
    save_file({**state, **others}, tmp_path / HUB, metadata={"format": "pt"})
    ours = SigLIP.from_pretrained(tmp_path, torch.float32).eval()
    assert ours.config == replace(SIGLIP_PRESETS["so400m-patch14-384"], n_layers=3)
    theirs = SiglipVisionModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 384, 384, generator=generator) * 2 - 1
    with torch.no_grad():
        close(ours(pixels), theirs(pixels).last_hidden_state, 1e-4)
    assert len(list(theirs.parameters())) == len(state)


# What the released config.json files say, with defaults for what they leave out: base's sizes.
# SigLIP 2 of a fixed resolution has SigLIP's vision tower; its text tower has 256,000 tokens.
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
          "intermediate_size": 4304}
GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 16,
         "intermediate_size": 6144}
SIGLIPS_2 = {
    "base-patch16-224": {}, "base-patch16-512": {"image_size": 512},
    "base-patch32-256": {"image_size": 256, "patch_size": 32},
    "large-patch16-384": {**LARGE, "image_size": 384},
    "so400m-patch14-384": {**SO400M, "image_size": 384, "patch_size": 14},
    "so400m-patch16-512": {**SO400M, "image_size": 512},
    "giant-opt-patch16-384": {**GIANT, "image_size": 384}}
N_PATCHES = {"base-patch16-224": 196, "base-patch16-512": 1024, "base-patch32-256": 64,
             "large-patch16-384": 576, "so400m-patch14-384": 729, "so400m-patch16-512": 1024,
             "giant-opt-patch16-384": 576}


def write_siglip_2(folder: Path, changes: dict) -> None:
    """The released files' names and shapes: both towers, nothing written of the tensors."""
    text = {"model_type": "siglip_text_model", "vocab_size": 256_000}
    vision = {"model_type": "siglip_vision_model", **changes}
    config = {"model_type": "siglip", "text_config": text, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        whole = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).bfloat16()
    write_safetensors_of_holes(whole.state_dict(), folder / HUB, {"format": "pt"})


@pytest.mark.parametrize("name", SIGLIPS_2)
def test_siglip_2_of_a_fixed_resolution(name, tmp_path):
    """Each tensor of the vision tower is found, and has the shape; the others are ignored."""
    write_siglip_2(tmp_path, SIGLIPS_2[name])
    config, weights = read_siglip(tmp_path)
    assert weights.tensors["text_model.embeddings.token_embedding.weight"].shape[0] == 256_000
    with torch.device("meta"):
        ours = SigLIP(config)
    assert set(weights.check(ours)) == {torch.bfloat16}
    assert config.n_patches == N_PATCHES[name]


@pytest.mark.parametrize("name", ["base-patch16-512", "so400m-patch16-512"])
def test_siglip_2_equals_transformers(name, tmp_path, all_threads):
    """Of its layers one."""
    config = SiglipVisionConfig(**{**SIGLIPS_2[name], "num_hidden_layers": 1})
    randomise(SiglipVisionModel(config)).save_pretrained(tmp_path)
    ours = SigLIP.from_pretrained(tmp_path, torch.float32).eval()
    theirs = SiglipVisionModel.from_pretrained(tmp_path).eval()
    pixels = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        close(ours(pixels), theirs(pixels).last_hidden_state, 1e-4)


@pytest.mark.parametrize("kind", ["siglip2", "siglip2_vision_model"])
def test_siglip_2_naflex_is_refused_by_name(kind, tmp_path):
    sizes = {"num_patches": 256, "patch_size": 16}      # instead of an image's size
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": sizes}))
    with pytest.raises(CheckpointError, match=r"config.json: model_type is SigLIP 2's NaFlex"):
        SigLIP.from_pretrained(tmp_path)


# As released; the parameters are their numbers.
SMALL_LLAMAS = {
    "SmolLM2-360M": (dict(vocab_size=49_152, hidden_size=960, num_hidden_layers=32,
                          num_attention_heads=15, num_key_value_heads=5, intermediate_size=2560,
                          rope_theta=100_000.0, tie_word_embeddings=True), 361_821_120),
    "SmolLM2-1.7B": (dict(vocab_size=49_152, hidden_size=2048, num_hidden_layers=24,
                          num_attention_heads=32, num_key_value_heads=32, intermediate_size=8192,
                          rope_theta=130_000.0, tie_word_embeddings=True), 1_711_376_384),
    "TinyLlama-1.1B": (dict(vocab_size=32_000, hidden_size=2048, num_hidden_layers=22,
                            num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632,
                            rope_theta=10_000.0, tie_word_embeddings=False), 1_100_048_384)}


@pytest.mark.parametrize("name", SMALL_LLAMAS)
def test_small_llamas_at_their_released_shapes(name, tmp_path):
    """All layers by name and shape; the number of parameters is the published one."""
    sizes, n = SMALL_LLAMAS[name]
    values = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_scaling": None,
              "rope_interleaved": False, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        theirs = LlamaForCausalLM(TheirConfig(**values)).bfloat16()
    write_safetensors_of_holes(dict(theirs.named_parameters()), tmp_path / HUB, {"format": "pt"})
    config, weights = read_llama(tmp_path)
    with torch.device("meta"):
        ours = Llama(config)
    assert set(weights.check(ours)) == {torch.bfloat16}
    assert sum(p.numel() for p in ours.parameters()) == n
    assert (config.rope_theta, config.rope_factor) == (sizes["rope_theta"], 1.0)


@pytest.mark.parametrize("name", SMALL_LLAMAS)
def test_small_llamas_equal_transformers(name, tmp_path, all_threads):
    """Of their layers one."""
    sizes, _ = SMALL_LLAMAS[name]
    config = TheirConfig(**{**sizes, "num_hidden_layers": 1, "rms_norm_eps": 1e-5})
    theirs = randomise(LlamaForCausalLM(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 32_000, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(ours(tokens), theirs(tokens).logits, 1e-4)
    shutil.rmtree(tmp_path)
