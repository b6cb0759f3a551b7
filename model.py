"""F' and text -> answer: the Llama decoder, and AlignVLM, which puts the three parts together (paper section 3.1).

    H_input = concat(F'_align, E_text(x)),  E_text(x) = [E_text(x_1), ..., E_text(x_M)]     equation 3

    config = ALIGNVLM_PRESETS["llama-3.2-1b"]
    loss = AlignVLM(config)(tokens, labels, pixels, lengths)        # one packed row of samples
    for ids in model.generate([tokens], [pixels], stop={eot}): ...  # one new token of every prompt at a time

Llama's parameter names are those of the released checkpoints in hub format, without the "model." prefix; so is the
order of q and k: rotary embeddings turn the pairs (i, i + head_dim / 2).
"""
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as nnf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from connector import Align
from vision import SIGLIP_PRESETS, InputError, SigLIP, SigLIPConfig

IMAGE = -1      # marks the position of a visual token in a token sequence; no vocabulary has this id
IGNORE = -100   # marks a label that is not supervised, as in torch's cross_entropy


@dataclass
class LlamaConfig:
    """The architecture of a Llama 3 decoder; the defaults are Llama-3.2-1B's."""
    vocab_size: int = 128_256               # V
    hidden_size: int = 2048                 # D
    n_layers: int = 16
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_factor: float = 32.0               # Llama 3.1's scaling of the long wavelengths; 1 is plain RoPE
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    tie_embeddings: bool = True             # the LM head is the input embedding


LLAMA_PRESETS = {
    "llama-3.2-1b": LlamaConfig(),
    "llama-3.2-3b": LlamaConfig(hidden_size=3072, n_layers=28, n_heads=24, head_dim=128),
    "llama-3.1-8b": LlamaConfig(hidden_size=4096, n_layers=32, head_dim=128, intermediate_size=14_336,
                                rope_factor=8.0, tie_embeddings=False),
    "toy": LlamaConfig(vocab_size=542, hidden_size=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32,
                       intermediate_size=384, rope_theta=10_000.0, rope_factor=1.0),
}


def rope(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Positions (B, L) -> cos and sin (B, 1, L, head_dim), fp32, of rotary embeddings with Llama 3.1's scaling.

    Wavelengths over the original length are stretched by the factor, those under a quarter of it are kept, and in
    between the two are interpolated. Computed, not stored: no buffer to lose on the meta device or in a bf16 cast.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    freq = 1.0 / config.rope_theta ** (half / config.head_dim)                     # (head_dim / 2)
    wavelength = 2 * math.pi / freq
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    keep = ((config.rope_original_length / wavelength - low) / (high - low)).clamp(0, 1)
    freq = (1 - keep) * freq / config.rope_factor + keep * freq
    angle = positions[:, None, :, None].float() * freq                             # (B, 1, L, head_dim / 2)
    angle = torch.cat([angle, angle], dim=-1)                                      # (B, 1, L, head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim / 2}) of x (B, heads, L, head_dim) by its position's angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-x2, x1], dim=-1) * sin.to(x.dtype)


class KVCache:
    """Preallocated keys and values of every layer, written by position: two tensors (layers, B, kv_heads, L, head_dim)."""

    def __init__(self, config: LlamaConfig, batch: int, length: int, device, dtype):
        shape = config.n_layers, batch, config.n_kv_heads, length, config.head_dim
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.rows = torch.arange(batch, device=device)[:, None]                    # (B, 1)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, kv_heads, L, head_dim) at positions (B, L) of a layer; returns all that the layer holds."""
        self.k[layer][self.rows, :, positions] = k.transpose(1, 2)
        self.v[layer][self.rows, :, positions] = v.transpose(1, 2)
        return self.k[layer], self.v[layer]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()                                                              # the mean of squares needs fp32
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention: n_heads queries share n_kv_heads keys and values."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        D, q_size, kv_size = config.hidden_size, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(D, q_size, bias=False)
        self.k_proj = nn.Linear(D, kv_size, bias=False)
        self.v_proj = nn.Linear(D, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths=None, cache=None, positions=None) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (proj(x).view(B, L, -1, self.head_dim).transpose(1, 2)           # (B, heads or kv_heads, L, head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            past_k, past_v = cache.write(self.layer, positions, k, v)
            if L == 1:      # decoding: every row sees its own past; a prefill starts at 0 and is causal among itself
                seen = torch.arange(past_k.shape[2], device=x.device) <= positions[:, :, None, None]    # (B, 1, 1, L_max)
                return self.output(attend(q, past_k, past_v, attn_mask=seen))
        if lengths is None:
            return self.output(attend(q, k, v, is_causal=True))
        # Packed: the row holds several samples and none may see another, so each attends by itself.
        samples = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2))
        return self.output(torch.cat([attend(*qkv, is_causal=True) for qkv in samples], dim=2))

    def output(self, y: Tensor) -> Tensor:
        return self.o_proj(y.transpose(1, 2).flatten(2))                           # (B, L, D)


def attend(q: Tensor, k: Tensor, v: Tensor, **kind) -> Tensor:
    """Scaled dot-product attention of q (B, heads, L, head_dim) over k and v (B, kv_heads, M, head_dim)."""
    return nnf.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kind)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nnf.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-RMSNorm transformer block."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)    # E_text (V, D)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The LM head's weight (V, D)."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def hidden(self, x: Tensor, lengths: list[int] | None = None, cache: KVCache | None = None,
               positions: Tensor | None = None) -> Tensor:
        """Embeddings x (B, L, D) -> final hidden states (B, L, D).

        lengths: the row (B = 1) holds samples of these lengths, packed; each is read by itself, from position 0.
        cache, positions (B, L): keep keys and values there; L = 1 continues, a longer x starts at position 0.
        """
        if positions is None:
            positions = torch.cat([torch.arange(n, device=x.device) for n in lengths or [x.shape[1]]])[None]
        cos, sin = rope(positions, self.config)
        for layer in self.layers:
            x = layer(x, cos, sin, lengths, cache, positions)
        return self.norm(x)

    def forward(self, tokens: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """tokens (B, L) int64, or embeddings (B, L, D) -> logits (B, L, V)."""
        x = self.embed_tokens(tokens) if embeddings is None else embeddings
        return nnf.linear(self.hidden(x), self.head)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights for training from scratch: every projection keeps its input's variance, the residual branches start small."""
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            else:
                branch = (2 * self.config.n_layers) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
                p.normal_(std=branch * p.shape[-1] ** -0.5)


# ---------------------------------------------------------------------------------------------------------------------
# The three together


@dataclass
class AlignVLMConfig:
    vision: SigLIPConfig = field(default_factory=SigLIPConfig)
    llm: LlamaConfig = field(default_factory=LlamaConfig)


ALIGNVLM_PRESETS = {
    name: AlignVLMConfig(SIGLIP_PRESETS["toy" if name == "toy" else "so400m-patch14-384"], llm)
    for name, llm in LLAMA_PRESETS.items()
}


class CheckpointError(InputError):
    """A model folder that cannot be used; the message names the file."""


def save_checkpoint(folder: Path, config: AlignVLMConfig, state: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors into FOLDER.partial, then rename that: a folder is complete or not there."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial / "model.safetensors")
    os.chmod(partial / "model.safetensors", 0o644)     # safetensors makes it the owner's alone
    (partial / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(partial, folder)


class AlignVLM(nn.Module):
    """Vision encoder -> Align -> Llama (Figure 2)."""

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        self.config = config
        self.vision = SigLIP(config.vision)
        self.connector = Align(config.vision.hidden_size, config.llm.hidden_size, config.llm.vocab_size)
        self.llm = Llama(config.llm)

    def embed(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """tokens (B, L) with IMAGE at T * N places, pixels (T, 3, S, S) -> H_input (B, L, D).

        Raises ValueError when the image positions and the visual tokens differ in number.
        """
        E_text = self.llm.embed_tokens.weight                                      # (V, D)
        image = tokens == IMAGE                                                    # (B, L)
        n = len(pixels) * self.config.vision.n_patches
        if image.sum() != n:
            raise ValueError(f"{int(image.sum())} image positions for {n} visual tokens")
        H = nnf.embedding(tokens.masked_fill(image, 0), E_text)                    # (B, L, D), equation 3
        if n == 0:      # where some ranks have images and others none, FSDP would wait here: every toy stage has one kind
            return H
        F = self.vision(pixels)                                                    # (T, N, d)
        F_align = self.connector(F, E_text).flatten(0, 1)                          # (T * N, D), equations 1 and 2
        return H.masked_scatter(image[..., None], F_align.to(H.dtype))

    def forward(self, tokens: Tensor, labels: Tensor, pixels: Tensor, lengths: list[int]) -> Tensor:
        """One packed row of samples -> the sum of its supervised tokens' cross-entropies (nats), fp32.

        tokens (1, L), samples of `lengths` one after another; labels (1, L): at each position the token that should
        come next there, or IGNORE; pixels (T, 3, S, S): the tiles of all samples, in their order.
        """
        h = self.llm.hidden(self.embed(tokens, pixels), lengths)                   # (1, L, D)
        supervised = labels != IGNORE                                              # the LM head runs only there
        logits = nnf.linear(h[supervised], self.llm.head)                          # (supervised, V)
        return nnf.cross_entropy(logits.float(), labels[supervised], reduction="sum")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "AlignVLM":
        """The model of a folder that save_checkpoint wrote. Raises CheckpointError, which names the file."""
        config_file, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        for file in (config_file, weights):
            if not file.is_file():
                raise CheckpointError(f"{file}: no such file; a model folder is one of a run's stages, out/toy/stage3 say")
        try:
            text = json.loads(config_file.read_text())
            with torch.device("meta"):
                model = cls(AlignVLMConfig(SigLIPConfig(**text["vision"]), LlamaConfig(**text["llm"])))
        except (ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(f"{config_file}: not an AlignVLM configuration ({error})") from None
        try:
            model.load_state_dict(load_file(weights), assign=True)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{weights}: {' '.join(str(error).split())[:300]}") from None
        return model

    @torch.inference_mode()
    def generate(self, prompts: list[Tensor], pixels: list[Tensor], stop: set[int], max_new_tokens: int = 256,
                 temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Iterator[list[int | None]]:
        """Continue B prompts (L_b,) with their tiles (T_b, 3, S, S) together; greedily, each as if it were alone.

        Yields once a step the B new token ids, None for a row that has met a token of `stop` (which is not yielded).
        temperature 0 is greedy; otherwise sampling from the smallest set of words that holds top_p of the probability.
        """
        device = self.llm.embed_tokens.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        tokens = pad_sequence(list(prompts), batch_first=True).to(device)         # (B, L), padded on the right
        x = self.embed(tokens, torch.cat(pixels).to(device, self.llm.embed_tokens.weight.dtype))
        B, L, _ = x.shape
        cache = KVCache(self.config.llm, B, L + max_new_tokens, device, x.dtype)
        positions = torch.arange(L, device=device).expand(B, L)
        h = self.llm.hidden(x, None, cache, positions)                            # (B, L, D)
        h, position = h[torch.arange(B), lengths - 1], lengths[:, None]           # (B, D): each row's last token
        done = [False] * B
        for step in range(max_new_tokens):
            if step > 0:    # a padded row's stale keys lie beyond its position: unseen until the row overwrites them
                h = self.llm.hidden(self.llm.embed_tokens(ids[:, None]), None, cache, position)[:, 0]
                position = position + 1
            ids = choose(nnf.linear(h, self.llm.head), temperature, top_p, generator)      # (B,)
            done = [d or i in stop for d, i in zip(done, ids.tolist())]
            if all(done):
                return
            yield [None if d else i for d, i in zip(done, ids.tolist())]


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """logits (B, V) -> one token id a row (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = nnf.softmax(logits.float() / temperature, dim=-1).sort(descending=True)        # (B, V)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)                                       # the first always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]
