"""F' and text -> answer: the Llama decoder, and AlignVLM, which puts the three parts together (paper section 3.1).

    E_text(x) = [E_text(x_1), ..., E_text(x_M)]         equation 3
    H_input = concat(F'_align, E_text(x))               without a number in the paper, just above equation 3

    model = AlignVLM.from_backbones("siglip-so400m-patch14-384", "Llama-3.2-1B")    # two downloaded folders
    loss = model(tokens, labels, pixels, lengths)                   # one packed row of samples
    for ids in model.generate([tokens], [pixels], stop={eot}): ...  # one new token of every prompt at a time
    model.save_pretrained("folder", tokenizer_file)                 # AlignVLM.from_pretrained("folder") reads it

Llama's parameter names are those of the released checkpoints in hub format, without the "model." prefix; so is the
order of q and k: rotary embeddings turn the pairs (i, i + head_dim / 2).
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from connector import CONNECTORS, ConnectorConfig, SwiGLU, new_connector
from plumbing import released
from plumbing.examples import IMAGE        # -1, at the place of a visual token
from plumbing.fast import AMX, Linear, RMSNorm, can_pack, linear, pack
from plumbing.settings import Settings, saved_config
from plumbing.weights import Weights, load, read_safetensors, save
from vision import SIGLIP_PRESETS, SigLIP, SigLIPConfig, read_siglip

IGNORE = -100   # marks a label that is not supervised, as in torch's cross_entropy
LOGITS = 2 ** 26        # numbers that the LM head makes at a time in training: 256 MB in fp32


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
    # Untied: a shared head would push the 500 words that are never an answer all the same way, E_text would become one
    # long vector and a direction around it, and in the connector's mean every word would drown.
    "toy": LlamaConfig(vocab_size=542, hidden_size=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=64,
                       intermediate_size=128, rope_factor=1.0, tie_embeddings=False),
}


def rope(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Positions (B, L) -> cos and sin (B, 1, L, head_dim), fp32, of rotary embeddings with Llama 3.1's scaling.

    For both halves of a head, as `rotate` needs them: [cos, cos] and [-sin, sin].

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
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim / 2}) of x (B, heads, L, head_dim) by its position's angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class KVCache:
    """Preallocated keys and values of every layer, (B, kv_heads, length, head_dim) each, written by position.

    dtype: what the model computes in. On a CPU the cache is in fp32 all the same, as `attend` is: else it would have to
    be converted for every token.
    """

    def __init__(self, config: LlamaConfig, batch: int, length: int, device, dtype, prefix: "KVCache | None" = None):
        self.start = prefix.reach if prefix else 0      # every row begins with the one row that the prefix holds
        self.reach = self.start + length    # attention reads this many places: all, or on a CPU only the filled ones
        shape = batch, config.n_kv_heads, self.reach, config.head_dim
        dtype = torch.float32 if torch.device(device).type == "cpu" else dtype
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
                          for _ in range(2))
        self.rows = torch.arange(batch, device=device)[:, None]                    # (B, 1)
        if torch.device(device).type == "cuda":     # a CUDA graph may then write to them
            for x in (*self.k, *self.v):
                torch._dynamo.mark_static_address(x, guard=False)
        for own, read in zip((*self.k, *self.v), (*prefix.k, *prefix.v) if prefix else ()):
            own[:, :, :self.start] = read

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, kv_heads, L, head_dim) at positions (B, L) of a layer; returns what is within reach.

        With L > 1 the positions are the same in every row.
        """
        for cached, new in (self.k[layer], k), (self.v[layer], v):
            new = new.to(cached.dtype)
            if new.shape[2] > 1 or len(positions) == 1:     # one index for all rows takes less time
                cached.index_copy_(2, positions[0], new)
            else:
                cached[self.rows, :, positions] = new.transpose(1, 2)              # (B, 1, kv_heads, head_dim)
        return self.k[layer][:, :, :self.reach], self.v[layer][:, :, :self.reach]

    def mask(self, positions: Tensor) -> Tensor:
        """What attention adds to the scores at positions (B, L): -inf for what is later. (B, 1, L, reach)"""
        later = torch.arange(self.reach, device=positions.device) > positions[:, None, :, None]
        return torch.zeros_like(later, dtype=self.k[0].dtype).masked_fill_(later, -math.inf)


class Attention(nn.Module):
    """Causal grouped-query attention: n_heads queries share n_kv_heads keys and values."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.n_heads, self.head_dim = layer, config.n_heads, config.head_dim
        D, q_size, kv_size = config.hidden_size, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(D, q_size, bias=False)
        self.k_proj, self.v_proj = (Linear(D, kv_size, bias=False) for _ in range(2))
        self.o_proj = Linear(q_size, D, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """x (B, L, D) -> q (B, heads, L, head_dim), k and v (B, kv_heads, L, head_dim); q and k are turned together."""
        qk = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1)
        qk, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (qk, self.v_proj(x)))
        return [*rotate(qk, cos, sin).split([self.n_heads, v.shape[1]], dim=1), v]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths, cache, positions, mask) -> Tensor:
        """x (B, L, D) -> (B, L, D); cos and sin from rope(); the rest as in Llama.hidden, which makes the mask."""
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:
            past_k, past_v = cache.write(self.layer, positions, k, v)
        if mask is not None:    # decoding, or reading on after a prefix: every row sees its own past
            y = attend(q, past_k, past_v, mask)
        elif lengths is None:   # a prefill starts at position 0 and is causal among itself
            y = attend(q, k, v, is_causal=True)
        else:
            y = attend_packed(q, k, v, lengths)
        return self.o_proj(y.transpose(1, 2).flatten(2))                           # (B, L, D)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **kind) -> Tensor:
    """Scaled dot-product attention of q (B, heads, L, head_dim) over k and v (B, kv_heads, M, head_dim)."""
    # On a CPU in fp32: in bf16 PyTorch's attention takes longer there, for a token up to four times. But with AMX and
    # nothing to learn it takes half the time, for a prompt without a prefix.
    wide = q.is_cpu and not (AMX and q.dtype == torch.bfloat16 and mask is None and not torch.is_grad_enabled())
    inputs = (x.float() if wide and x is not None else x for x in (q, k, v, mask))
    return nnf.scaled_dot_product_attention(*inputs, enable_gqa=q.shape[1] != k.shape[1], **kind).to(q.dtype)


@torch.compiler.disable         # each number of samples would be a graph of its own
def attend_packed(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """A row that holds several samples, none of which may see another: each attends by itself."""
    samples = zip(*(x.split(lengths.tolist(), dim=2) for x in (q, k, v)))
    return torch.cat([attend(*qkv, is_causal=True) for qkv in samples], dim=2)


class Layer(nn.Module):
    """One pre-RMSNorm transformer block."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, *context) -> Tensor:
        """x (B, L, D) -> (B, L, D); context: what Attention.forward takes besides."""
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder. Training, prefill and decoding share `hidden`; the head is applied where logits are needed."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)    # E_text (V, D)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The LM head's weight (V, D)."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def hidden(self, x: Tensor, lengths: list[int] | None = None, cache: KVCache | None = None,
               positions: Tensor | None = None, last: Tensor | None = None) -> Tensor:
        """Embeddings x (B, L, D) -> final hidden states (B, L, D), or (B, 1, D) of the positions `last` (B, 1) alone.

        lengths: the row (B = 1) holds samples of these lengths, packed; each is read by itself, from position 0.
        cache, positions (B, L): keep keys and values there; L = 1 continues, a longer x starts at position cache.start.
        last: only with a cache, when it is first filled; positions are then the same in every row.
        """
        if positions is None:
            positions = torch.cat([torch.arange(n, device=x.device) for n in lengths or [x.shape[1]]])[None]
        cos, sin = (angle.to(x.dtype) for angle in rope(positions, self.config))
        mask = cache.mask(positions) if cache is not None and (cache.start or x.shape[1] == 1) else None
        lengths = None if lengths is None else torch.tensor(lengths)       # a list would be compiled for its length
        *layers, top = self.layers
        for layer in layers:
            x = layer(x, cos, sin, lengths, cache, positions, mask)
        if last is not None:    # of the other tokens the top layer's keys and values are all that is ever needed
            _, k, v = top.self_attn.qkv(top.input_layernorm(x), cos, sin)
            cache.write(top.self_attn.layer, positions, k, v)
            x, positions, mask = x[cache.rows, last - cache.start], last, cache.mask(last)      # (B, 1, D)
            cos, sin = (angle[0, 0, last - cache.start][:, None] for angle in (cos, sin))       # (B, 1, 1, head_dim)
        return self.norm(top(x, cos, sin, lengths, cache, positions, mask))

    def forward(self, tokens: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """tokens (B, L) int64, or embeddings (B, L, D) -> all logits (B, L, V), which the model itself never needs."""
        x = self.embed_tokens(tokens) if embeddings is None else embeddings
        return linear(self.hidden(x), self.head)

    @torch.inference_mode()
    def generate(self, x: Tensor, lengths: list[int], stop: set[int], max_new_tokens: int = 256,
                 temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
                 prefix: KVCache | None = None) -> Iterator[list[int | None]]:
        """Continue B prompts together, greedily each as if alone: embeddings x (B, L, D), padded on the right to L.

        Yields once a step the B new token ids, None for a row that has met a token of `stop` (which is not yielded).
        temperature 0 is greedy; otherwise sampling from the smallest set of words that holds top_p of the probability.
        prefix: keys and values of what stands before every prompt, as `hidden` left them in a cache of that length.
        """
        B, L, _ = x.shape
        generator = torch.Generator(x.device).manual_seed(seed)
        places, continue_hidden = L + max_new_tokens, self.hidden
        if x.is_cuda:       # a step is one CUDA graph; rounded up, so that prompts of about this length share it
            places, continue_hidden = 256 * math.ceil(places / 256), torch.compile(self.hidden, mode="reduce-overhead")
        cache = KVCache(self.config, B, places, x.device, x.dtype, prefix)
        position = cache.start + torch.tensor(lengths, device=x.device)[:, None]  # (B, 1)
        h = self.hidden(x, None, cache, cache.start + torch.arange(L, device=x.device).expand(B, L), position - 1)
        done = [False] * B
        for step in range(max_new_tokens):
            if step > 0:
                if x.is_cpu:        # elsewhere a shape that changes costs more than places that are empty
                    cache.reach = cache.start + max(lengths) + step
                # a padded row's stale keys lie beyond its position: unseen until the row overwrites them
                h = continue_hidden(self.embed_tokens(ids[:, None]), None, cache, position)      # (B, 1, D)
                position = position + 1
            ids = choose(linear(h[:, 0], self.head), temperature, top_p, generator)  # (B,)
            done = [d or i in stop for d, i in zip(done, ids.tolist())]
            if all(done):
                return
            yield [None if d else i for d, i in zip(done, ids.tolist())]

    def pack(self) -> None:
        """To be called on a CPU before nothing but answers follow, which take less time then, in bf16 up to half.

        Elsewhere it does nothing. The decoder can no longer be trained, moved or loaded into then; in bf16 its matrices
        cannot even be looked at, but for E_text, no gradients pass, and a head that is tied to it becomes a copy.
        """
        E_text = self.embed_tokens.weight
        if can_pack(E_text) and self.config.tie_embeddings:
            self.config = replace(self.config, tie_embeddings=False)
            self.lm_head = Linear(*reversed(E_text.shape), bias=False, device="meta")
            self.lm_head.weight = E_text
        if E_text.is_cpu:
            pack(self)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, device="cpu",
                        shard: Callable[[nn.Module], None] | None = None) -> "Llama":
        """The decoder of a folder in hub format or in Meta's own; the rest is as in SigLIP.from_pretrained."""
        config, weights = read_llama(Path(folder))
        return load(lambda: cls(config), {"": weights}, dtype, device, shard)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights for training from scratch: projections keep their input's variance, branches start small."""
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            else:
                branch = (2 * self.config.n_layers) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
                p.normal_(std=branch * p.shape[-1] ** -0.5)


def read_llama(folder: Path) -> tuple[LlamaConfig, Weights]:
    """A downloaded folder, in hub format or in Meta's own -> its architecture and where its weights are."""
    config, weights = released.llama(folder)
    return LlamaConfig(**config), weights


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """logits (B, V) -> one token id a row (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = nnf.softmax(logits.float() / temperature, dim=-1).sort(descending=True)        # (B, V)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)                                       # the first always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The three together


@dataclass
class AlignVLMConfig:
    """The architecture of the three parts."""
    vision: SigLIPConfig = field(default_factory=SigLIPConfig)
    llm: LlamaConfig = field(default_factory=LlamaConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)

    @property
    def tile_tokens(self) -> int:
        """n, the visual tokens of a tile: with Align its N patches."""
        return self.connector.tile_tokens(self.vision.n_patches)


ALIGNVLM_PRESETS = {name: AlignVLMConfig(llm=llm) for name, llm in LLAMA_PRESETS.items()}
ALIGNVLM_PRESETS["toy"] = AlignVLMConfig(SIGLIP_PRESETS["toy"], LLAMA_PRESETS["toy"], ConnectorConfig(
    table_size=1024, n_heads=4, n_kv_heads=2, head_dim=32))


class AlignVLM(nn.Module):
    """Vision encoder -> connector, Align unless the configuration asks for another -> Llama (Figure 2)."""

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        self.config = config
        self.vision = SigLIP(config.vision)
        self.connector = new_connector(config.connector, config.vision.hidden_size, config.llm.hidden_size,
                                       config.llm.vocab_size)
        self.llm = Llama(config.llm)

    def init_weights(self) -> None:
        """Weights for training from scratch; W2 starts as a copy of this LLM's head."""
        self.vision.init_weights()
        self.llm.init_weights()
        self.connector.init_weights(self.llm.head)

    def embed(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """tokens (B, L) int64 with IMAGE at T * n places, pixels (T, 3, S, S) -> H_input (B, L, D).

        tokens may be on the CPU: a GPU is not waited for then. Raises ValueError when places and visual tokens differ.
        """
        E_text = self.llm.embed_tokens.weight                                      # (V, D)
        image = tokens == IMAGE                                                    # (B, L)
        n_visual = len(pixels) * self.config.tile_tokens                           # T * n
        if image.sum() != n_visual:
            raise ValueError(f"{int(image.sum())} image positions for {n_visual} visual tokens")
        words = tokens.masked_fill(image, 0).to(E_text.device, non_blocking=True)
        H = nnf.embedding(words, E_text)                                           # (B, L, D), equation 3: E_text(x)
        if n_visual == 0:       # on all ranks or on none, else FSDP waits
            return H
        F = self.vision(pixels)                                                    # (T, N, d)
        F_align = self.connector(F, E_text).flatten(0, 1)                          # (T * n, D), equations 1 and 2
        # H_input = concat(F'_align, E_text(x)), not end to end: each visual token goes where its image stands
        places = image.flatten().nonzero()[:, 0].to(E_text.device, non_blocking=True)       # (T * n,), of B * L
        return H.flatten(0, 1).index_copy(0, places, F_align.to(H.dtype)).view_as(H)

    def forward(self, tokens: Tensor, labels: Tensor, pixels: Tensor, lengths: list[int]) -> Tensor:
        """One packed row of samples -> the sum of its supervised tokens' cross-entropies (nats), fp32.

        tokens (1, L) int64, samples of `lengths` one after another; labels (1, L): at each position the token that
        should come next there, or IGNORE; pixels (T, 3, S, S): all samples' tiles. tokens and labels may be on the CPU.
        """
        h = self.llm.hidden(self.embed(tokens, pixels), lengths)[0]                # (L, D)
        supervised = (labels[0] != IGNORE).nonzero()[:, 0]                         # the LM head runs only there
        gold = labels[0, supervised].to(h.device, non_blocking=True)               # (supervised,)
        h = h[supervised.to(h.device, non_blocking=True)]                          # (supervised, D)
        n = max(1, LOGITS // self.config.llm.vocab_size)
        if len(gold) <= n:
            return self.word_loss(h, gold)
        # Several blocks make their logits again in the backward pass, so that never more than one has them.
        return sum(checkpoint(self.word_loss, *block, use_reentrant=False, preserve_rng_state=False)
                   for block in zip(h.split(n), gold.split(n)))

    def word_loss(self, h: Tensor, gold: Tensor) -> Tensor:
        """h (n, D), gold (n,) -> the sum of n cross-entropies, fp32."""
        return nnf.cross_entropy(linear(h, self.llm.head).float(), gold, reduction="sum")

    @classmethod
    def from_backbones(cls, vision_folder: str | Path, llm_folder: str | Path, dtype: torch.dtype | None = None,
                       device="cpu", shard: Callable[[nn.Module], None] | None = None,
                       connector: ConnectorConfig | None = None) -> "AlignVLM":
        """A released SigLIP and a released Llama, joined by a new connector, by default Align with the LM head as W2.

        dtype None keeps the stored one (the wider of two); shard and what is raised: see SigLIP.from_pretrained.
        """
        vision_config, vision = read_siglip(Path(vision_folder))
        llm_config, llm = read_llama(Path(llm_folder))
        config = AlignVLMConfig(vision_config, llm_config, connector or ConnectorConfig())
        model = load(lambda: cls(config), {"vision": vision, "llm": llm}, dtype, device, shard)
        model.connector.init_weights(model.llm.head)
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, device="cpu",
                        shard: Callable[[nn.Module], None] | None = None,
                        connector: ConnectorConfig | None = None) -> "AlignVLM":
        """The model of a folder that save_pretrained wrote, or with a new connector.

        dtype, shard and what is raised: see SigLIP.from_pretrained.
        """
        config, weights = read_config(Path(folder)), read_safetensors(Path(folder))
        if connector is None:
            return load(lambda: cls(config), {"": weights}, dtype, device, shard)
        config.connector = connector
        parts = {part: weights.part(part) for part in ("vision", "llm")}
        model = load(lambda: cls(config), parts, dtype, device, shard)
        model.connector.init_weights(model.llm.head)
        return model

    def save_pretrained(self, folder: str | Path, tokenizer_file: str | Path,
                        dtype: torch.dtype = torch.bfloat16, shard_bytes: int = 5 * 10 ** 9) -> None:
        """Write config.json, safetensors and the tokenizer's file beside `folder`, then rename: complete or not there.

        Over shard_bytes the tensors go to several files. Of a sharded model (FSDP2) every rank calls this.
        """
        save(self, {"model_type": "alignvlm", **asdict(self.config)}, Path(folder), Path(tokenizer_file), dtype,
             shard_bytes)

    @torch.inference_mode()
    def generate(self, prompts: list[Tensor], pixels: list[Tensor], stop: set[int], max_new_tokens: int = 256,
                 **generation) -> Iterator[list[int | None]]:
        """Continue B prompts (L_b,) with their tiles (T_b, 3, S, S): Llama.generate on the embeddings of both."""
        tokens = pad_sequence(list(prompts), batch_first=True)                              # (B, L)
        x = self.embed(tokens, torch.cat(pixels).to(self.llm.embed_tokens.weight))          # (B, L, D)
        yield from self.llm.generate(x, [len(p) for p in prompts], stop, max_new_tokens, **generation)


def read_config(folder: Path) -> AlignVLMConfig:
    """config.json of a folder that save_pretrained wrote. Raises CheckpointError."""
    settings = Settings(folder / "config.json")
    settings.only("model_type", "alignvlm")
    config = AlignVLMConfig(saved_config(SigLIPConfig, settings.section("vision")),
                            saved_config(LlamaConfig, settings.section("llm"), tie_embeddings=(False, True)))
    for name, part, of, parts in [("vision", config.vision, "hidden_size", "n_heads"),
                                  ("llm", config.llm, "n_heads", "n_kv_heads")]:
        whole, n = getattr(part, of), getattr(part, parts)
        if whole % n:
            raise settings.section(name).error(parts, f"{n} does not divide {of} {whole}")
    if "connector" in settings.values:      # else from before there was a choice: Align
        config.connector = saved_config(ConnectorConfig, settings.section("connector"), kind=CONNECTORS)
    return config
