"""Llama in Meta's own format: params.json with .pth files.

There is one for each of the ranks that Meta ran the model on. They are joined row by row as they
are read.
"""
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from plumbing.settings import CheckpointError, Settings
from plumbing.weights import Stored, Weights, open_pickle

META_NAMES = {
    "embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3"}


def meta_key(name: str) -> str:
    """layers.0.self_attn.q_proj.weight -> layers.0.attention.wq.weight."""
    layer, name = re.fullmatch(r"(layers\.\d+\.|)(.*)\.weight", name).groups()
    return f"{layer}{META_NAMES[name]}.weight"


def read_meta(folder: Path) -> tuple[dict, Weights]:
    """params.json with consolidated.00.pth, or with a file for each of Meta's ranks.

    The files cannot say two things. The embeddings are tied where `output` equals
    `tok_embeddings`; and the factor of the scaled rotary embeddings is then 32 (Llama 3.2),
    otherwise 8 (3.1).
    """
    s = Settings(folder / "params.json")
    s.only("quantization_args", None)
    D, n_heads = s.number("dim"), s.number("n_heads")
    n_kv_heads = s.number("n_kv_heads", n_heads)
    if D % (2 * n_heads) or n_heads % n_kv_heads:
        raise s.error("n_heads", f"is {n_heads}, which does not go with dim {D} and n_kv_heads "
                                 f"{n_kv_heads}")
    paths = sorted(folder.glob("consolidated.*.pth")) or [folder / "consolidated.00.pth"]
    for i, path in enumerate(paths):
        expected = folder / f"consolidated.{i:02}.pth"
        if path != expected:
            raise CheckpointError(f"{expected}: no such file, but {path.name} is there")
    tensors = join_shards(paths, head_dim=D // n_heads)
    weights = Weights(paths[0], tensors, meta_key, r"rope\.freqs")
    head, E_text = tensors.get("output.weight"), tensors.get("tok_embeddings.weight")
    tied = head is None or head.equals(E_text)
    if tied:
        weights.ignored += r"|output\.weight"
    rope_factor = 1.0
    if s.only("use_scaled_rope", None, False, True):
        rope_factor = 32.0 if tied else 8.0
    multiple = s.number("multiple_of", 256)
    width = int(s.number("ffn_dim_multiplier", 1.0, float) * int(2 * 4 * D / 3))
    return dict(
        vocab_size=s.number("vocab_size"),
        hidden_size=D,
        n_layers=s.number("n_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=D // n_heads,
        intermediate_size=-(-width // multiple) * multiple,
        rms_norm_eps=s.number("norm_eps", 1e-5, float),
        rope_theta=s.number("rope_theta", 500_000.0, float),
        rope_factor=rope_factor,
        tie_embeddings=tied), weights


def join_shards(paths: list[Path], head_dim: int) -> dict[str, Stored]:
    """The tensors of Meta's files, each a whole one, its rows in the order of our modules."""
    shards = [open_pickle(path) for path in paths]
    tensors = {}
    for key, first in shards[0].items():
        for path, shard in zip(paths, shards):
            if key not in shard or shard[key].shape != first.shape:
                raise CheckpointError(f"{path}: {key} is missing or has another shape than in "
                                      f"{paths[0].name}")
        dim = joined_dimension(key, first)
        shape = list(first.shape)
        if dim is not None:
            shape[dim] *= len(shards)
        is_qk = first.ndim == 2 and key.endswith((".wq.weight", ".wk.weight"))
        rows = joined_rows(paths, key, dim, first.shape[0] if first.ndim else 0)
        if is_qk:
            rows = in_hub_order(rows, head_dim)
        dtype = first.dtype if first.is_floating_point() else None
        tensors[key] = Stored(paths[0], tuple(shape), dtype, rows)
    for path, shard in zip(paths, shards):
        for key in sorted(shard.keys() - tensors.keys()):
            raise CheckpointError(f"{path}: unexpected tensor {key}, which is not in "
                                  f"{paths[0].name}")
    return tensors


def joined_dimension(key: str, shard: Tensor) -> int | None:
    """Along which dimension Meta's ranks share a tensor; None if each has all of it.

    Every rank has all of a norm, some columns of wo and w2, some rows of each other matrix.
    """
    if shard.ndim != 2:
        return None
    return 1 if key.endswith((".wo.weight", ".w2.weight")) else 0


def joined_rows(paths: list[Path], key: str, dim: int | None, n: int) -> Callable:
    """What reads rows (start, stop) of a tensor that is joined along dim, of shards of n rows."""
    def rows(start: int, stop: int) -> Tensor:
        if dim is None:
            return open_pickle(paths[0])[key][start:stop]
        shards = [open_pickle(path)[key] for path in paths]
        if dim == 1:
            return torch.cat([shard[start:stop] for shard in shards], dim=1)
        return torch.cat([shard[max(start - i * n, 0):max(stop - i * n, 0)]
                          for i, shard in enumerate(shards)])
    return rows


def in_hub_order(rows: Callable, head_dim: int) -> Callable:
    """The same for q and k.

    Meta turns the pairs (2i, 2i + 1) of a head, the hub and we (i, i + head_dim / 2).
    """
    def turned(start: int, stop: int) -> Tensor:
        first = start // head_dim * head_dim                                # whole heads
        last = -(-stop // head_dim) * head_dim
        pairs = rows(first, last).unflatten(0, (-1, head_dim // 2, 2))
        heads = pairs.transpose(1, 2)                           # (heads, 2, head_dim / 2, D)
        return heads.flatten(0, 2)[start - first:stop - first]
    return turned
