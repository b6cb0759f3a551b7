"""Released weights: a downloaded SigLIP or Llama -> its sizes, and where its tensors are.

Sizes are called as in our configurations. SigLIP and Llama come in hub format (config.json with
safetensors), Llama also in Meta's own (plumbing/meta.py).
"""
import sys
from pathlib import Path

from plumbing.settings import CheckpointError, Settings
from plumbing.weights import Weights, read_safetensors


def siglip(folder: Path) -> tuple[dict, Weights]:
    """A folder in hub format, of both towers or one -> SigLIPConfig's settings, and the weights.

    Raises CheckpointError.
    """
    config = siglip_sizes(folder)
    weights = read_safetensors(folder)
    prefix = common_prefix(weights, "vision_model.")
    # The text tower and the pooling head are not needed.
    weights.ignored = (rf"text_model\..*|logit_scale|logit_bias|{prefix}head\..*"
                       r"|.*\.position_ids")
    weights.key = lambda name: prefix + name
    return config, weights


def siglip_sizes(folder: Path) -> dict:
    """A folder's config.json -> SigLIPConfig's settings.

    What it leaves out means base-patch16-224's value: so the hub writes them. Raises
    CheckpointError.
    """
    settings = Settings(folder / "config.json")
    settings.only("quantization_config", None)
    if settings.model_type("siglip", "siglip_vision_model") == "siglip":
        settings = settings.section("vision_config")
    settings.only("hidden_act", None, "gelu_pytorch_tanh")
    settings.only("num_channels", None, 3)
    d, n_heads = settings.number("hidden_size", 768), settings.number("num_attention_heads", 12)
    if d % n_heads:
        raise settings.error("num_attention_heads", f"is {n_heads}, which does not divide {d}")
    return dict(
        hidden_size=d,
        n_layers=settings.number("num_hidden_layers", 12),
        n_heads=n_heads,
        intermediate_size=settings.number("intermediate_size", 3072),
        image_size=settings.number("image_size", 224),
        patch_size=settings.number("patch_size", 16),
        layer_norm_eps=settings.number("layer_norm_eps", 1e-6, float))


def common_prefix(weights: Weights, prefix: str) -> str:
    """The prefix, if any tensor has it: newer exports leave it out."""
    return prefix if any(key.startswith(prefix) for key in weights.tensors) else ""


def llama(folder: Path) -> tuple[dict, Weights]:
    """A downloaded folder -> LlamaConfig's settings, and the weights.

    Its files say which format it is. Raises CheckpointError.
    """
    if (folder / "config.json").exists():
        return read_hub(folder)
    if (folder / "params.json").exists():
        from plumbing.meta import read_meta
        return read_meta(folder)
    raise CheckpointError(f"{folder}: neither config.json (hub format) nor params.json (Meta's) is "
                          "there")


# ------------------------------------------------------------------------------------------------
# Llama in hub format


def read_hub(folder: Path) -> tuple[dict, Weights]:
    """config.json with model.safetensors or its shards."""
    config = llama_sizes(folder)
    weights = read_safetensors(folder)
    if config["tie_embeddings"]:
        config["tie_embeddings"] = not has_another_head(folder, weights)
    prefix = common_prefix(weights, "model.")
    weights.key = lambda name: name if name.startswith("lm_head.") else prefix + name
    weights.ignored = r".*\.rotary_emb\.inv_freq"
    if config["tie_embeddings"]:
        weights.ignored += r"|lm_head\.weight"
    return config, weights


def llama_sizes(folder: Path) -> dict:
    """A folder's config.json -> LlamaConfig's settings.

    The sizes must be there; the rest, where left out, has transformers' default. Raises
    CheckpointError.
    """
    s = Settings(folder / "config.json")
    s.model_type("llama")
    s.only("hidden_act", None, "silu")
    for key in ("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
                "quantization_config"):
        s.only(key, None, False)
    s.only("partial_rotary_factor", None, 1)
    D, n_heads = s.number("hidden_size"), s.number("num_attention_heads")
    n_kv_heads = s.number("num_key_value_heads", n_heads)
    head_dim = s.number("head_dim", max(1, D // n_heads))
    if n_heads % n_kv_heads:
        raise s.error("num_key_value_heads", f"is {n_kv_heads}, which does not divide {n_heads}")
    if head_dim % 2:
        raise s.error("head_dim", f"is {head_dim}, but rotary embeddings turn pairs")
    return dict(
        vocab_size=s.number("vocab_size"),
        hidden_size=D,
        n_layers=s.number("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        intermediate_size=s.number("intermediate_size"),
        rms_norm_eps=s.number("rms_norm_eps", 1e-6, float),
        tie_embeddings=bool(s.only("tie_word_embeddings", None, False, True)),
        **hub_rope(s))


def hub_rope(s: Settings) -> dict:
    """The settings of the rotary embeddings.

    transformers 5 writes rope_parameters; earlier ones wrote rope_scaling beside rope_theta, and
    its rope_type was once called type.
    """
    rope = s.section("rope_parameters")
    if not rope.values:
        rope = s.section("rope_scaling")
    theta = rope.number("rope_theta", s.number("rope_theta", 10_000.0, float), float)
    kinds = None, "default", "llama3"
    if (rope.only("rope_type", *kinds) or rope.only("type", *kinds)) != "llama3":
        return dict(rope_theta=theta, rope_factor=1.0)
    return dict(
        rope_theta=theta,
        rope_factor=rope.number("factor", kind=float),
        rope_low_freq_factor=rope.number("low_freq_factor", kind=float),
        rope_high_freq_factor=rope.number("high_freq_factor", kind=float),
        rope_original_length=rope.number("original_max_position_embeddings"))


def has_another_head(folder: Path, weights: Weights) -> bool:
    """Whether a folder whose configuration ties the LM head to the input embedding holds another
    head all the same, as merges of adapters leave it.

    Then the stored head is taken, and a line on standard error says so.
    """
    head = weights.tensors.get("lm_head.weight")
    E_text = weights.tensors.get(common_prefix(weights, "model.") + "embed_tokens.weight")
    if head is None or E_text is None or head.equals(E_text):
        return False
    print(f"{folder / 'config.json'}: tie_word_embeddings is true, but lm_head.weight differs from "
          "the embeddings: the stored head is taken", file=sys.stderr)
    return True
