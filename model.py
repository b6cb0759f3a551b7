"""F' and text -> answer: AlignVLM, which joins the three parts, and Llama (paper section 3.1).

    E_text(x) = [E_text(x_1), ..., E_text(x_M)]         equation 3
    H_input = concat(F'_align, E_text(x))               just above equation 3, without a number

    model = AlignVLM.from_backbones("google/siglip-so400m-patch14-384",
                                    "meta-llama/Llama-3.2-1B-Instruct")
    loss = model(*pack_row(samples, model.config.vision))   # data.py: one packed row of samples
    for ids in model.generate([tokens], [pixels], stop=tokenizer.stop):
        ...         # one more token of each prompt; tokens and pixels: data.prepare_question
    model.save_pretrained("folder", tokenizer_file)     # AlignVLM.from_pretrained reads it

Llama's parameters are named as in the released checkpoints in hub format, without the "model."
prefix. q and k are in the hub's order too: rotary embeddings turn the pairs (i, i + head_dim / 2).
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as nnf      # F is the paper's name for the features
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from connector import CONNECTORS, ConnectorConfig, new_connector
from plumbing import released
from plumbing.devices import send
from plumbing.examples import IMAGE        # -1: marks the place of a visual token among token ids
from plumbing.settings import InputError, Settings, saved_config
from plumbing.weights import Weights, load, model_folder, read_safetensors
from vision import SIGLIP_PRESETS, SigLIP, SigLIPConfig, read_siglip

IGNORE = -100           # marks a label that is not supervised, as in torch's cross_entropy
CIRCLES = 256           # an answer is ended whose last 256 tokens are one piece, repeated
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
    rope_factor: float = 32.0               # Llama 3.1's scaling of long wavelengths; 1: plain RoPE
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    tie_embeddings: bool = True             # the LM head is the input embedding


LLAMA_PRESETS = {
    "llama-3.2-1b": LlamaConfig(),
    "llama-3.2-3b": LlamaConfig(hidden_size=3072, n_layers=28, n_heads=24, head_dim=128),
    "llama-3.1-8b": LlamaConfig(hidden_size=4096, n_layers=32, head_dim=128,
                                intermediate_size=14_336, rope_factor=8.0, tie_embeddings=False),
    # Untied: a shared head would push the 500 tokens that are never an answer all the same way.
    # All embeddings would come to point nearly the same way, and the connector's means could hardly
    # be told apart.
    "toy": LlamaConfig(vocab_size=542, hidden_size=128, n_layers=4, n_heads=4, n_kv_heads=4,
                       head_dim=64, intermediate_size=128, rope_factor=1.0, tie_embeddings=False),
}


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
ALIGNVLM_PRESETS["toy"] = AlignVLMConfig(
    SIGLIP_PRESETS["toy"], LLAMA_PRESETS["toy"],
    ConnectorConfig(table_size=1024, n_heads=4, n_kv_heads=2, head_dim=32))


# ------------------------------------------------------------------------------------------------
# The three parts together


class AlignVLM(nn.Module):
    """Vision encoder -> connector (Align, unless the configuration says another) -> Llama.

    Figure 2 of the paper.
    """

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        d, D, V = config.vision.hidden_size, config.llm.hidden_size, config.llm.vocab_size
        self.config = config
        self.vision = SigLIP(config.vision)
        self.connector = new_connector(config.connector, d, D, V)
        self.llm = Llama(config.llm)

    def embed(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """tokens (B, L) int64 with IMAGE at T * n places, pixels (T, 3, S, S) -> H (B, L, D).

        H is H_input of the paper. Both may be on the CPU, tokens also an array: a GPU is not waited
        for then. Raises ValueError where places and visual tokens differ in number.
        """
        E_text = self.llm.embed_tokens.weight                       # (V, D)
        tokens = torch.as_tensor(tokens)                            # (B, L)
        is_image = tokens == IMAGE                                  # (B, L)
        n_visual = len(pixels) * self.config.tile_tokens            # T * n
        if is_image.sum() != n_visual:
            raise ValueError(f"{int(is_image.sum())} image positions for {n_visual} visual tokens")
        text = send(tokens.masked_fill(is_image, 0), E_text.device)
        H = nnf.embedding(text, E_text)                             # (B, L, D), equation 3
        if n_visual == 0:       # every rank must come here, or none: else FSDP waits for ever
            return H
        F = self.vision(send(pixels, E_text.device))                # (T, N, d)
        F_align = self.connector(F, E_text)                         # (T, n, D), equations 1 and 2
        F_align = F_align.flatten(0, 1).to(H.dtype)                 # (T * n, D)
        # H_input = concat(F'_align, E_text(x)): each visual token stands where its image does.
        places = is_image.flatten().nonzero()[:, 0]                 # (T * n,), of B * L
        places = send(places, E_text.device)
        return H.flatten(0, 1).index_copy(0, places, F_align).view_as(H)

    def forward(self, tokens: Tensor, labels: Tensor, pixels: Tensor,
                lengths: list[int]) -> Tensor:
        """One packed row of samples -> the sum of its supervised tokens' cross-entropies, fp32.

        In nats. tokens (1, L) int64: samples of `lengths`, one after another. labels (1, L): at
        each position the token that should come next there, or IGNORE; data.encode_chat has
        shifted them. pixels (T, 3, S, S): all samples' tiles. tokens and labels may be on the CPU,
        and arrays.
        """
        labels = torch.as_tensor(labels)
        h = self.llm.hidden(self.embed(tokens, pixels), lengths)[0]         # (L, D)
        supervised = (labels[0] != IGNORE).nonzero()[:, 0]                  # (n_supervised,) places
        gold = send(labels[0, supervised], h.device)                        # (n_supervised,)
        h = h[send(supervised, h.device)]                                   # (n_supervised, D)
        most = max(1, LOGITS // self.config.llm.vocab_size)
        if len(gold) <= most:
            return self.token_loss(h, gold)
        # Too many logits for one block. The backward pass makes each block's again: so only one
        # block's are there at a time.
        losses = [checkpoint(self.token_loss, h_block, gold_block, use_reentrant=False,
                             preserve_rng_state=False)
                  for h_block, gold_block in zip(h.split(most), gold.split(most))]
        return sum(losses)

    def token_loss(self, h: Tensor, gold: Tensor) -> Tensor:
        """h (n, D), gold (n,) -> the sum of n cross-entropies, fp32."""
        logits = self.llm.logits(h).float()                                 # (n, V)
        return nnf.cross_entropy(logits, gold, reduction="sum")

    @torch.inference_mode()
    def generate(self, prompts: list[Tensor], pixels: list[Tensor], stop: set[int],
                 max_new_tokens: int = 256, **generation) -> Iterator[list[int | None]]:
        """Continue B prompts (L_b,) with their tiles (T_b, 3, S, S), as Llama.generate does."""
        tokens = pad_sequence(list(prompts), batch_first=True)              # (B, L)
        H = self.embed(tokens, torch.cat(pixels))                           # (B, L, D)
        lengths = [len(prompt) for prompt in prompts]
        yield from self.llm.generate(H, lengths, stop, max_new_tokens, **generation)

    def init_weights(self) -> None:
        """Weights for training from scratch; W2 starts as a copy of this LLM's head."""
        self.vision.init_weights()
        self.llm.init_weights()
        self.connector.init_weights(self.llm.head)

    @classmethod
    def from_backbones(cls, vision_folder: str | Path, llm_folder: str | Path,
                       dtype: torch.dtype | None = None, device="cpu",
                       shard: Callable[[nn.Module], None] | None = None,
                       connector: ConnectorConfig | None = None) -> "AlignVLM":
        """A released SigLIP and a released Llama, joined by a new connector, by default Align.

        dtype None keeps the stored one (the wider of two). shard, and what is raised: see
        SigLIP.from_pretrained.
        """
        vision_config, vision = read_siglip(model_folder(vision_folder))
        llm_config, llm = read_llama(model_folder(llm_folder))
        config = AlignVLMConfig(vision_config, llm_config, connector or ConnectorConfig())
        weights = {"vision": vision, "llm": llm}
        model = load(lambda: cls(config), weights, dtype, device, shard)
        model.connector.init_weights(model.llm.head)
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, device="cpu",
                        shard: Callable[[nn.Module], None] | None = None,
                        connector: ConnectorConfig | None = None) -> "AlignVLM":
        """The model of a folder that save_pretrained wrote; with a new connector, if one is given.

        dtype, shard, and what is raised: see SigLIP.from_pretrained.
        """
        folder = model_folder(folder)
        config, weights = read_config(folder), read_safetensors(folder)
        if connector is None:
            return load(lambda: cls(config), {"": weights}, dtype, device, shard)
        config.connector = connector
        parts = {part: weights.part(part) for part in ("vision", "llm")}
        model = load(lambda: cls(config), parts, dtype, device, shard)
        model.connector.init_weights(model.llm.head)
        return model

    def save_pretrained(self, folder: str | Path, tokenizer_file: str | Path,
                        dtype: torch.dtype = torch.bfloat16,
                        shard_bytes: int = 5 * 10 ** 9) -> None:
        """Write config.json, safetensors and the tokenizer's file: all of them or none.

        Over shard_bytes the tensors go to several files. Of a model that is sharded among ranks
        (FSDP2) every rank calls this. What may be replaced: see plumbing/saving.py.
        """
        from plumbing.saving import save
        config = {"model_type": "alignvlm", **asdict(self.config)}
        save(self, config, Path(folder), Path(tokenizer_file), dtype, shard_bytes)


def read_config(folder: Path) -> AlignVLMConfig:
    """config.json of a folder that save_pretrained wrote. Raises CheckpointError."""
    settings = Settings(folder / "config.json")
    settings.only("model_type", "alignvlm")
    vision, llm = settings.section("vision"), settings.section("llm")
    config = AlignVLMConfig(
        saved_config(SigLIPConfig, vision),
        saved_config(LlamaConfig, llm, tie_embeddings=(False, True)),
        saved_config(ConnectorConfig, settings.section("connector"), kind=CONNECTORS))
    if config.vision.hidden_size % config.vision.n_heads:
        raise vision.error("n_heads", f"{config.vision.n_heads} does not divide hidden_size "
                                      f"{config.vision.hidden_size}")
    if config.llm.n_heads % config.llm.n_kv_heads:
        raise llm.error("n_kv_heads", f"{config.llm.n_kv_heads} does not divide n_heads "
                                      f"{config.llm.n_heads}")
    return config


# ------------------------------------------------------------------------------------------------
# Llama


class Llama(nn.Module):
    """The decoder. Training, prefill and decoding share `hidden`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, V = config.hidden_size, config.vocab_size
        self.config = config
        self.embed_tokens = nn.Embedding(V, D)                              # E_text (V, D)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(D, config.rms_norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(D, V, bias=False)
        self.linear = nnf.linear        # held here for plumbing/fast.py to exchange

    @property
    def head(self) -> Tensor:
        """The LM head's weight (V, D)."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def hidden(self, x: Tensor, lengths: list[int] | None = None, cache: "KVCache | None" = None,
               positions: Tensor | None = None) -> Tensor:
        """Embeddings x (B, L, D) -> final hidden states (B, L, D).

        lengths: the row (B = 1) holds samples of these lengths, packed. Each is read by itself,
        from position 0.
        cache: keys and values are written to it, at `positions` (B or 1, L). If L > 1 every row
        starts at cache.start. If L = 1 each row has a position of its own. By default positions
        are 0, 1, ...: right only where nothing stands before x.
        """
        if positions is None:
            each = [torch.arange(n, device=x.device) for n in lengths or [x.shape[1]]]
            positions = torch.cat(each)[None]                               # (1, L)
        cos, sin = rope(positions, self.config)                     # (B or 1, 1, L, head_dim)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        mask = None     # a prompt that starts at position 0 is causal among itself: it needs none
        if cache is not None and (cache.start or x.shape[1] == 1):
            mask = cache.mask(positions)                            # (B or 1, 1, L, reach)
        if lengths is not None:
            lengths = torch.tensor(lengths)     # a list would be compiled for its length
        for layer in self.layers:
            x = layer(x, cos, sin, lengths, cache, positions, mask)         # (B, L, D)
        return self.norm(x)

    def logits(self, h: Tensor) -> Tensor:
        """Final hidden states h (..., D) -> logits (..., V)."""
        return self.linear(h, self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) int64 -> all logits (B, L, V): to be held against another implementation.

        AlignVLM makes those that it needs.
        """
        return self.logits(self.hidden(self.embed_tokens(tokens)))

    @torch.inference_mode()
    def generate(self, x: Tensor, lengths: list[int], stop: set[int], max_new_tokens: int = 256,
                 temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
                 prefix: "KVCache | None" = None) -> Iterator[list[int | None]]:
        """Continue B prompts together: embeddings x (B, L, D), padded on the right to L.

        lengths: of each prompt, without its padding. Each step yields B new token ids, None for a
        row that has ended. A token of `stop` ends a row and is not yielded. A row also ends when
        its last tokens go in circles; these are yielded. No prompt sees another: they change each
        other's logits by rounding alone.

        temperature 0 is greedy. Otherwise a token is drawn from the smallest set that holds top_p
        of the probability. prefix: a cache that `hidden` has filled to its end with what stands
        before every prompt. Raises InputError where a prompt's first logits are not finite.
        """
        B, L, _ = x.shape
        generator = torch.Generator(x.device).manual_seed(seed)
        cache = self.new_cache(B, L + max_new_tokens, prefix)
        lengths = torch.tensor(lengths, device=x.device)                    # (B,)
        cache.reach = cache.start + L                               # the rest is still to be filled
        of_prompts = cache.start + torch.arange(L, device=x.device).expand(B, L)    # (B, L)
        h = self.hidden(x, None, cache, of_prompts)                         # (B, L, D)
        h = h[torch.arange(B, device=x.device), lengths - 1]                # (B, D)
        position = cache.start + lengths[:, None]                           # (B, 1), the next one
        done = [False] * B
        written: list[list[int]] = [[] for _ in range(B)]
        for step in range(max_new_tokens):
            if step > 0:
                # A padded row's stale keys lie beyond its position: they are unseen until the row
                # writes over them.
                cache.grow()
                h = self.next_hidden(ids, cache, position)                  # (B, D)
                position = position + 1
            logits = self.logits(h)                                             # (B, V)
            if step == 0 and not torch.stack(logits.aminmax()).isfinite().all():
                raise InputError("the logits are not finite: weights that are too large for "
                                 f"{logits.dtype}, or damaged")
            ids = sample_token(logits, temperature, top_p, generator)           # (B,)
            row_ids = ids.tolist()
            done = [was_done or i in stop or goes_in_circles(row)
                    for was_done, i, row in zip(done, row_ids, written)]
            if all(done):
                return
            for row, i in zip(written, row_ids):
                row.append(i)
            yield [None if over else i for over, i in zip(done, row_ids)]

    def next_hidden(self, ids: Tensor, cache: "KVCache", position: Tensor) -> Tensor:
        """One step of decoding: ids (B,) at position (B, 1) -> final hidden states (B, D)."""
        x = self.embed_tokens(ids[:, None])                                 # (B, 1, D)
        return self.hidden(x, None, cache, position)[:, 0]

    def new_cache(self, batch: int, length: int, prefix: "KVCache | None" = None,
                  dtype: torch.dtype | None = None) -> "KVCache":
        """A cache for `length` positions of `batch` rows, after those of the prefix.

        dtype: of keys and values, by default the model's.
        """
        E_text = self.embed_tokens.weight
        return KVCache(self.config, batch, length, E_text.device, dtype or E_text.dtype, prefix)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, device="cpu",
                        shard: Callable[[nn.Module], None] | None = None) -> "Llama":
        """The decoder of a folder in hub format or in Meta's own.

        The rest is as in SigLIP.from_pretrained.
        """
        config, weights = read_llama(model_folder(folder))
        return load(lambda: cls(config), {"": weights}, dtype, device, shard)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights for training from scratch: projections keep their input's variance, and E_text is
        N(0, 1 / D).

        o_proj and down_proj, whose outputs are added to x, start smaller by sqrt(2 n_layers), so
        that x keeps its size in a deep decoder.
        """
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            elif "o_proj" in name or "down_proj" in name:
                p.normal_(std=(2 * self.config.n_layers) ** -0.5 * p.shape[-1] ** -0.5)
            else:
                p.normal_(std=p.shape[-1] ** -0.5)


class Layer(nn.Module):
    """One pre-RMSNorm transformer block."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        """x (B, L, D) -> (B, L, D); context: what Attention.forward takes besides."""
        x = x + self.self_attn(self.input_layernorm(x), *context)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class MLP(nn.Module):
    """The gated layer of each block (SwiGLU)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)
        self.gate = gate                # for plumbing/fast.py, as Llama.linear

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.down_proj(self.gate(self.gate_proj(x), self.up_proj(x)))


def gate(g: Tensor, u: Tensor) -> Tensor:
    """g, u (..., width) -> silu(g) * u (..., width)."""
    return nnf.silu(g) * u


class Attention(nn.Module):
    """Causal grouped-query attention: n_heads queries share n_kv_heads keys and values."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        D, head_dim = config.hidden_size, config.head_dim
        self.index, self.head_dim = index, head_dim
        self.grouped = config.n_heads != config.n_kv_heads
        self.q_proj = nn.Linear(D, config.n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(D, config.n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(D, config.n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * head_dim, D, bias=False)
        self.attend = nnf.scaled_dot_product_attention      # for plumbing/fast.py, as Llama.linear

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor | None,
                cache: "KVCache | None", positions: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, L, D) -> (B, L, D). cos and sin: rope's. lengths: Llama.hidden's, as a tensor.

        cache and positions: as in Llama.hidden. mask: the cache's, or None where it is not read.
        """
        by_head = -1, self.head_dim
        q = self.q_proj(x).unflatten(-1, by_head).transpose(1, 2)   # (B, heads, L, head_dim)
        k = self.k_proj(x).unflatten(-1, by_head).transpose(1, 2)   # (B, kv_heads, L, head_dim)
        v = self.v_proj(x).unflatten(-1, by_head).transpose(1, 2)   # (B, kv_heads, L, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)             # of the same shapes
        if cache is not None:
            # (B, kv_heads, reach, head_dim) each
            cached_k, cached_v = cache.write(self.index, positions, k, v)
        # y (B, heads, L, head_dim)
        if mask is not None:        # decoding, or a prompt after a prefix: the cache is read
            y = self.attend(q, cached_k, cached_v, attn_mask=mask, enable_gqa=self.grouped)
        elif lengths is None:       # from position 0: one sample a row, padding only behind it
            y = self.attend(q, k, v, is_causal=True, enable_gqa=self.grouped)
        else:
            y = self.attend_packed(q, k, v, lengths)
        return self.o_proj(y.transpose(1, 2).flatten(2))            # (B, L, D)

    @torch.compiler.disable         # each number of samples would be a graph of its own
    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        """A row that holds several samples: each attends by itself and sees none of the others."""
        lengths = lengths.tolist()
        samples = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2))
        y = [self.attend(*qkv, is_causal=True, enable_gqa=self.grouped) for qkv in samples]
        return torch.cat(y, dim=2)                                  # (B, heads, L, head_dim)


def rope(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Positions (B or 1, L) -> cos and sin (B or 1, 1, L, head_dim), fp32.

    With Llama 3.1's scaling, and for both halves of a head, as `rotate` needs them: [cos, cos] and
    [-sin, sin].

    Wavelengths over the original length are stretched by the factor, those under a quarter of it
    are kept, and in between the two are interpolated. All is computed, nothing is stored: no
    buffer can be lost on the meta device or in a cast to bf16.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    freq = 1.0 / config.rope_theta ** (even / config.head_dim)              # (head_dim / 2,)
    wavelength = 2 * math.pi / freq                                         # (head_dim / 2,)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    keep = (config.rope_original_length / wavelength - low) / (high - low)
    keep = keep.clamp(0, 1)                                                 # (head_dim / 2,)
    freq = (1 - keep) * freq / config.rope_factor + keep * freq             # (head_dim / 2,)
    angle = positions[:, None, :, None].float() * freq      # (B or 1, 1, L, head_dim / 2)
    cos, sin = angle.cos(), angle.sin()                     # likewise
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim / 2}) of x (B, heads, L, head_dim) by its angle."""
    other_half = x.roll(x.shape[-1] // 2, dims=-1)                          # like x
    return torch.addcmul(x * cos, other_half, sin)                          # x cos + other_half sin


class KVCache:
    """Preallocated keys and values of every layer, (B, kv_heads, length, head_dim) each.

    They are written by position. start: how many positions the prefix fills, in every row. length:
    the prefix's positions and those that are asked for. reach: how many of them attention reads,
    all of them unless it is set. The prefix has a row for each of the batch, or one for all.
    """

    def __init__(self, config: LlamaConfig, batch: int, length: int, device, dtype: torch.dtype,
                 prefix: "KVCache | None" = None):
        self.start = prefix.reach if prefix else 0
        self.length = self.reach = self.start + length
        shape = batch, config.n_kv_heads, self.length, config.head_dim
        layers = range(config.n_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.rows = torch.arange(batch, device=device)[:, None]             # (B, 1)
        if prefix:
            for layer in layers:
                self.k[layer][:, :, :self.start] = prefix.k[layer][:, :, :self.start]
                self.v[layer][:, :, :self.start] = prefix.v[layer][:, :, :self.start]

    def grow(self) -> None:
        """Attention reads one position more from now on."""
        self.reach += 1

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, kv_heads, L, head_dim) at positions (B or 1, L).

        With L > 1 the positions are the same in every row. Returns the layer's keys and values
        that are in reach, (B, kv_heads, reach, head_dim) each.
        """
        for cached, new in (self.k[layer], k), (self.v[layer], v):
            new = new.to(cached.dtype)
            if new.shape[2] > 1 or len(positions) == 1:
                cached.index_copy_(2, positions[0], new)
            else:
                cached[self.rows, :, positions] = new.transpose(1, 2)   # (B, 1, kv_heads, head_dim)
        return self.k[layer][:, :, :self.reach], self.v[layer][:, :, :self.reach]

    def mask(self, positions: Tensor) -> Tensor:
        """What attention adds to the scores at positions (B or 1, L): -inf for what comes later.

        Returns (B or 1, 1, L, reach).
        """
        place = torch.arange(self.reach, device=positions.device)           # (reach,)
        later = place > positions[:, None, :, None]                 # (B or 1, 1, L, reach)
        return torch.zeros_like(later, dtype=self.k[0].dtype).masked_fill_(later, -math.inf)


def sample_token(logits: Tensor, temperature: float, top_p: float,
                 generator: torch.Generator) -> Tensor:
    """logits (B, V) -> one token id a row (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = nnf.softmax(logits.float() / temperature, dim=-1).sort(descending=True)    # (B, V)
    before = p.cumsum(-1) - p                       # (B, V), that of the likelier ones: 0 at first
    p = p.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(p, 1, generator=generator)        # (B, 1)
    return ids.gather(1, drawn)[:, 0]


def goes_in_circles(tokens: list) -> bool:
    """Whether the last CIRCLES tokens repeat one piece, of at most a quarter of CIRCLES.

    tokens: ids, or the texts that they stand for. Over a page that it cannot read a model may never
    end by itself. Nougat ends such answers too, by how little its logits change
    (https://arxiv.org/abs/2308.13418). Rows of dots are seldom as long.
    """
    tail = tokens[-CIRCLES:]
    if len(tail) < CIRCLES:
        return False
    return any(tail[-1] == tail[-1 - n] and tail[n:] == tail[:-n]
               for n in range(1, CIRCLES // 4 + 1))


def read_llama(folder: Path) -> tuple[LlamaConfig, Weights]:
    """A folder in hub format or in Meta's own -> the architecture, and where its weights are."""
    settings, weights = released.llama(folder)
    return LlamaConfig(**settings), weights
