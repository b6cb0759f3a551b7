"""Models small enough for exact comparisons, the samples that they read, and their answers."""
import re
from dataclasses import replace

import torch
from torch import Tensor

from connector import ConnectorConfig
from model import IGNORE, IMAGE, AlignVLM, AlignVLMConfig, LlamaConfig
from tensors import close, randomise
from vision import Area, SigLIPConfig

VISION = SigLIPConfig(hidden_size=12, n_layers=1, n_heads=2, intermediate_size=20, image_size=9,
                      patch_size=4)         # N = 4
V = 41                                      # of small_vlm's vocabulary
# An original length of 64 puts the wavelengths of head_dim 24 (6 to 29,000) into all three ranges:
# under 16, over 64, and between.
SCALED = dict(rope_factor=8.0, rope_original_length=64)
STEPS = 12                                  # new tokens of an answer


def small_llama(**changes) -> LlamaConfig:
    """A configuration in which all sizes differ."""
    sizes = dict(vocab_size=37, hidden_size=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6,
                 intermediate_size=40, rope_theta=10_000.0, rope_factor=1.0, tie_embeddings=False)
    return LlamaConfig(**{**sizes, **changes})


# What the connectors' tests build: 5 latents and 37 rows of a table do not divide evenly by two.
CONNECTOR = ConnectorConfig(table_size=37, n_latents=5, depth=2, n_heads=4, n_kv_heads=2,
                            head_dim=6)
TILES = replace(VISION, image_size=12, patch_size=3)        # N = 16
LLM = small_llama(vocab_size=23, hidden_size=10, n_layers=1, n_heads=2, n_kv_heads=1,
                  intermediate_size=14, tie_embeddings=True)
# Configuration, B, L.
LLAMAS = {
    "round":               (small_llama(hidden_size=32, head_dim=8), 2, 16),
    "GQA 1":               (small_llama(n_heads=3, n_kv_heads=3), 2, 9),
    "GQA 2":               (small_llama(), 3, 11),
    "GQA 3":               (small_llama(n_heads=6, n_kv_heads=2), 2, 7),
    "MQA":                 (small_llama(hidden_size=25, n_heads=5, n_kv_heads=1), 2, 13),
    "one head":            (small_llama(n_heads=1, n_kv_heads=1, head_dim=24), 1, 10),
    "head_dim 10":         (small_llama(head_dim=10), 2, 12),
    "head_dim 2":          (small_llama(head_dim=2), 2, 12),
    "odd everything":      (small_llama(vocab_size=31, hidden_size=15, n_layers=3, n_heads=3,
                                        n_kv_heads=1, head_dim=14, intermediate_size=19,
                                        rms_norm_eps=1e-2), 3, 5),
    "tied":                (small_llama(tie_embeddings=True), 2, 11),
    "one token":           (small_llama(), 2, 1),
    "scaled":              (small_llama(head_dim=24, **SCALED), 1, 150),
    "scaled, tied, MQA":   (small_llama(head_dim=24, n_kv_heads=1, tie_embeddings=True, **SCALED),
                            2, 131),
    "scaled, other knobs": (small_llama(head_dim=24, rope_factor=3.0, rope_low_freq_factor=2.0,
                                        rope_high_freq_factor=5.0, rope_original_length=100,
                                        rope_theta=500.0), 1, 140),
    "scaled, head_dim 10": (small_llama(head_dim=10, n_heads=6, **SCALED), 1, 90),
}
SIGLIPS = {
    "round":       SigLIPConfig(32, 2, 4, 64, image_size=32, patch_size=8),
    "dropped":     SigLIPConfig(24, 3, 4, 50, image_size=31, patch_size=7),
    "one head":    SigLIPConfig(10, 2, 1, 7, image_size=20, patch_size=6),
    "head dim 1":  SigLIPConfig(5, 2, 5, 11, image_size=9, patch_size=2),
    "head dim 72": SigLIPConfig(144, 1, 2, 99, image_size=44, patch_size=14),
    "one patch":   SigLIPConfig(12, 2, 2, 16, image_size=13, patch_size=7),
    "large eps":   SigLIPConfig(18, 2, 3, 20, image_size=15, patch_size=4, layer_norm_eps=0.1),
}
# Names in SIGLIPS, and feature_layer.
FEATURES = [*((name, None) for name in SIGLIPS),
            *(("dropped", layer) for layer in (0, 1, 3, -1, -2, -4)), ("one patch", -1)]


def close_gradients(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None],
                    alone: bool = False) -> None:
    """The same gradients, by the parameters' names; None for what has had no part.

    alone: whether every position attends to itself only. What q and k are is the same then.
    """
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        if theirs[name] is None:
            assert gradient is None, name
        elif alone and re.search("[qk]_proj", name):
            # Rounding noise, measured against the values' gradient.
            values = theirs[re.sub(r"[qk]_proj\.\w+", "v_proj.weight", name)]
            close(gradient, torch.zeros_like(gradient), scale=values.abs().max().item())
        elif name.endswith("k_proj.bias"):
            # A bias on the keys shifts a query's scores all alike, so its true gradient is 0 and
            # both sides hold rounding noise: measured against the weight's gradient.
            weight = theirs[name.replace("bias", "weight")]
            close(gradient, theirs[name], scale=weight.abs().max().item())
        else:
            close(gradient, theirs[name])


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


def small_vlm(seed: int = 0, scale: float = 1.0, **llm) -> AlignVLM:
    """Random weights. scale: of E_text, against what the layers add.

    Decoding must not fall into one repeated token.
    """
    config = AlignVLMConfig(VISION, small_llama(vocab_size=V, **llm))
    vlm = randomise(AlignVLM(config), seed).eval()
    with torch.no_grad():
        vlm.llm.embed_tokens.weight.mul_(scale)
    return vlm


def prompt(seed: int, tiles: int, n_text: int) -> tuple[Tensor, Tensor]:
    """One sample: a token, its tiles' places, n_text - 1 tokens more.

    -> tokens (L,), pixels (T, 3, S, S)
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(V, (n_text,), generator=generator)
    image = torch.full((tiles * VISION.n_patches,), IMAGE)
    side = VISION.image_size
    pixels = torch.randn(tiles, 3, side, side, generator=generator)
    return torch.cat([text[:1], image, text[1:]]), pixels


def in_bytes(pixels: Tensor) -> tuple[Tensor, list[Area]]:
    """Pixels (T, 3, S, S) about 0 -> a Sample's: bytes, and the areas of pages that fill a tile."""
    side = pixels.shape[-1]
    return (60 * pixels + 128).clamp(0, 255).byte(), [(0, 0, side, side)] * len(pixels)


def labelled(tokens: Tensor) -> Tensor:
    """Every token after the first two is an answer, except each third."""
    labels = torch.cat([tokens[1:], torch.tensor([IGNORE])])
    labels[:2] = IGNORE
    labels[::3] = IGNORE
    labels[labels == IMAGE] = IGNORE
    return labels


SAMPLES = [prompt(1, 1, 9), prompt(2, 0, 5), prompt(3, 3, 12), prompt(4, 0, 14), prompt(5, 2, 7)]
# The last two: one token, and an image that ends the prompt.
PROMPTS = [*SAMPLES, prompt(6, 0, 1), prompt(7, 1, 1)]


def row_of(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """One packed row: what AlignVLM.forward takes."""
    tokens = torch.cat([tokens for tokens, _ in samples])[None]
    labels = torch.cat([labelled(tokens) for tokens, _ in samples])[None]
    pixels = torch.cat([pixels for _, pixels in samples])
    return tokens, labels, pixels, [len(tokens) for tokens, _ in samples]


def generated(vlm: AlignVLM, prompts: list[tuple[Tensor, Tensor]], stop=frozenset(),
              steps: int = STEPS, **options) -> list[list[int]]:
    """generate's answers, one list a prompt; a row that has stopped must stay so."""
    tokens, pixels = zip(*prompts)
    answers = [[] for _ in prompts]
    for ids in vlm.generate(tokens, pixels, set(stop), steps, **options):
        assert len(ids) == len(prompts) and any(i is not None for i in ids)
        for answer, i in zip(answers, ids):
            answer.append(i)
    for answer in answers:
        assert None not in answer or not any(i is not None for i in answer[answer.index(None):])
    return [[i for i in answer if i is not None] for answer in answers]
