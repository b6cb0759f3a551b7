"""Released weights: a downloaded SigLIP or Llama -> its sizes, by our configurations' names, and where its tensors are.

SigLIP and Llama in hub format (config.json with safetensors), Llama also in Meta's own (params.json with .pth files,
one for each of the ranks that Meta ran the model on, which are joined row by row as they are read).
"""
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from plumbing.settings import CheckpointError, Settings
from plumbing.weights import Stored, Weights, open_pickle, read_safetensors


def siglip(folder: Path) -> tuple[dict, Weights]:
    """A folder in hub format, of both towers or the vision tower alone -> SigLIPConfig's settings, and the weights.

    What a configuration leaves out means base-patch16-224's value: so the hub writes them.
    """
    settings = Settings(folder / "config.json")
    settings.only("quantization_config", None)
    if settings.only("model_type", "siglip", "siglip_vision_model") == "siglip":
        settings = settings.section("vision_config")
    settings.only("hidden_act", None, "gelu_pytorch_tanh")
    settings.only("num_channels", None, 3)
    d, n_heads = settings.number("hidden_size", 768), settings.number("num_attention_heads", 12)
    config = dict(hidden_size=d, n_layers=settings.number("num_hidden_layers", 12), n_heads=n_heads,
                  intermediate_size=settings.number("intermediate_size", 3072),
                  image_size=settings.number("image_size", 224), patch_size=settings.number("patch_size", 16),
                  layer_norm_eps=settings.number("layer_norm_eps", 1e-6, float))
    if d % n_heads:
        raise settings.error("num_attention_heads", f"is {n_heads}, which does not divide {d}")
    weights = read_safetensors(folder)
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in weights.tensors) else ""
    unused = rf"text_model\..*|logit_scale|logit_bias|{prefix}head\..*|.*\.position_ids"    # the pooling head too
    return config, Weights(weights.path, weights.tensors, lambda name: prefix + name, unused)


def llama(folder: Path) -> tuple[dict, Weights]:
    """A downloaded folder -> LlamaConfig's settings, and the weights; its files say which format it is."""
    if (folder / "config.json").exists():
        return read_hub(folder)
    if (folder / "params.json").exists():
        return read_meta(folder)
    raise CheckpointError(f"{folder}: neither config.json (hub format) nor params.json (Meta's) is there")


def read_hub(folder: Path) -> tuple[dict, Weights]:
    """config.json with model.safetensors or its shards; what the configuration leaves out has transformers' default."""
    s = Settings(folder / "config.json")
    s.only("model_type", "llama")
    s.only("hidden_act", None, "silu")
    for key in ("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "quantization_config"):
        s.only(key, None, False)
    s.only("partial_rotary_factor", None, 1)
    rope = s.section("rope_parameters")                 # transformers 5
    if not rope.values:
        rope = s.section("rope_scaling")                # before, beside rope_theta; its type was once called "type"
    rope_type = rope.only("rope_type", None, "default", "llama3") or rope.only("type", None, "default", "llama3")
    scaling = {}
    if rope_type == "llama3":
        scaling = dict(rope_factor=rope.number("factor", kind=float),
                       rope_low_freq_factor=rope.number("low_freq_factor", kind=float),
                       rope_high_freq_factor=rope.number("high_freq_factor", kind=float),
                       rope_original_length=rope.number("original_max_position_embeddings"))
    D, n_heads = s.number("hidden_size"), s.number("num_attention_heads")
    tied = bool(s.only("tie_word_embeddings", None, False, True))
    n_kv_heads, head_dim = s.number("num_key_value_heads", n_heads), s.number("head_dim", max(1, D // n_heads))
    config = dict(
        vocab_size=s.number("vocab_size"), hidden_size=D, n_layers=s.number("num_hidden_layers"), n_heads=n_heads,
        n_kv_heads=n_kv_heads, head_dim=head_dim, intermediate_size=s.number("intermediate_size"),
        rms_norm_eps=s.number("rms_norm_eps", 1e-6, float),
        rope_theta=rope.number("rope_theta", s.number("rope_theta", 10_000.0, float), float), tie_embeddings=tied,
        **{"rope_factor": 1.0, **scaling})
    if n_heads % n_kv_heads:
        raise s.error("num_key_value_heads", f"is {n_kv_heads}, which does not divide {n_heads}")
    if head_dim % 2:
        raise s.error("head_dim", f"is {head_dim}, but rotary embeddings turn pairs")
    weights = read_safetensors(folder)
    prefix = "model." if any(key.startswith("model.") for key in weights.tensors) else ""
    unused = r".*\.rotary_emb\.inv_freq" + (r"|lm_head\.weight" if tied else "")
    return config, Weights(weights.path, weights.tensors,
                           lambda name: name if name.startswith("lm_head.") else prefix + name, unused)


META_NAMES = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output",
              "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
              "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
              "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
              "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}


def meta_key(name: str) -> str:
    """layers.0.self_attn.q_proj.weight -> layers.0.attention.wq.weight."""
    layer, name = re.fullmatch(r"(layers\.\d+\.|)(.*)\.weight", name).groups()
    return f"{layer}{META_NAMES[name]}.weight"


def read_meta(folder: Path) -> tuple[dict, Weights]:
    """params.json with consolidated.00.pth, or with a file for each of the ranks that Meta ran the model on.

    The files cannot say two things. The embeddings are tied where `output` equals `tok_embeddings`; and the factor of
    the scaled rotary embeddings is then 32 (Llama 3.2), otherwise 8 (3.1).
    """
    s = Settings(folder / "params.json")
    s.only("quantization_args", None)
    D, n_heads = s.number("dim"), s.number("n_heads")
    n_kv_heads = s.number("n_kv_heads", n_heads)
    if D % (2 * n_heads) or n_heads % n_kv_heads:
        raise s.error("n_heads", f"is {n_heads}, which does not go with dim {D} and n_kv_heads {n_kv_heads}")
    multiple = s.number("multiple_of", 256)
    ffn = int(s.number("ffn_dim_multiplier", 1.0, float) * int(2 * 4 * D / 3))
    paths = sorted(folder.glob("consolidated.*.pth")) or [folder / "consolidated.00.pth"]
    for i, path in enumerate(paths):
        if path.name != f"consolidated.{i:02}.pth":
            raise CheckpointError(f"{folder / f'consolidated.{i:02}.pth'}: no such file, but {path.name} is there")
    tensors = join_shards(paths, head_dim=D // n_heads)
    weights = Weights(paths[0], tensors, meta_key, r"rope\.freqs")
    tied = "output.weight" not in tensors or tensors["output.weight"].equals(tensors.get("tok_embeddings.weight"))
    if tied:
        weights.ignored += r"|output\.weight"
    scaled = s.only("use_scaled_rope", None, False, True)
    return dict(
        vocab_size=s.number("vocab_size"), hidden_size=D, n_layers=s.number("n_layers"), n_heads=n_heads,
        n_kv_heads=n_kv_heads, head_dim=D // n_heads, intermediate_size=-(-ffn // multiple) * multiple,
        rms_norm_eps=s.number("norm_eps", 1e-5, float), rope_theta=s.number("rope_theta", 500_000.0, float),
        rope_factor=(32.0 if tied else 8.0) if scaled else 1.0, tie_embeddings=tied), weights


def join_shards(paths: list[Path], head_dim: int) -> dict[str, Stored]:
    """The tensors of Meta's files by name, each a whole one and in the order of rows that our modules expect."""
    shards = [open_pickle(path) for path in paths]
    tensors = {}
    for key, first in shards[0].items():
        for path, shard in zip(paths, shards):
            if key not in shard or shard[key].shape != first.shape:
                raise CheckpointError(f"{path}: {key} is missing or has another shape than in {paths[0].name}")
        # Every rank has all of a norm, some columns of wo and w2, and some rows of each other matrix.
        dim = None if first.ndim != 2 else 1 if key.endswith((".wo.weight", ".w2.weight")) else 0
        shape = [n * len(shards) if i == dim else n for i, n in enumerate(first.shape)]
        pairs = head_dim if key.endswith((".wq.weight", ".wk.weight")) and first.ndim == 2 else None
        tensors[key] = Stored(paths[0], tuple(shape), first.dtype if first.is_floating_point() else None,
                              meta_rows(paths, key, dim, first.shape[0] if first.ndim else 0, pairs))
    for path, shard in zip(paths, shards):
        for key in sorted(shard.keys() - tensors.keys()):
            raise CheckpointError(f"{path}: unexpected tensor {key}, which is not in {paths[0].name}")
    return tensors


def meta_rows(paths: list[Path], key: str, dim: int | None, n: int, head_dim: int | None) -> Callable:
    """What reads rows (start, stop) of a tensor joined along dim from shards of n rows; head_dim: for q and k alone."""
    def rows(start: int, stop: int) -> Tensor:
        pieces = [open_pickle(path)[key] for path in (paths if dim is not None else paths[:1])]
        if dim != 0:
            return torch.cat([piece[start:stop] for piece in pieces], dim=-1)
        return torch.cat([piece[max(start - i * n, 0):max(stop - i * n, 0)] for i, piece in enumerate(pieces)])

    def turned(start: int, stop: int) -> Tensor:
        """Meta turns the pairs (2i, 2i + 1) of a head, the hub's order and ours is (i, i + head_dim / 2)."""
        a, b = start // head_dim * head_dim, -(-stop // head_dim) * head_dim            # whole heads
        heads = rows(a, b).unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)         # (heads, 2, head_dim / 2, D)
        return heads.flatten(0, 2)[start - a:stop - a]

    return rows if head_dim is None else turned
