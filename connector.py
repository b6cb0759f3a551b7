"""Features F -> embeddings that the LLM can read: the connector (paper section 3.1, part 2).

    P_vocab  = softmax(LayerNorm(W2 LayerNorm(W1 F)))     equation 1
    F'_align = P_vocab^T E_text                           equation 2

Every visual token that the LLM receives is a convex combination of its own token embeddings: the
weights P_vocab are never negative and sum to one, so F' lies inside the convex hull of the rows
of E_text.

P_vocab of a page of 10 tiles is 7,290 x 128,256 numbers. `Align.p_vocab` makes them, to be read
and looked at. The model runs `Mixture`, which gives the same F' and gradients up to rounding. It
makes P_vocab for a block of visual tokens at a time, and keeps none of it for the backward pass.

Below Align stand `AlignTopK`, which is Align with k of the tokens, and the three connectors that
the paper compares Align with (Table 2): MLP, Perceiver and Ovis.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf      # F is the paper's name for the features
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from plumbing.weights import local_rows

# Mixture works on blocks of R visual tokens. A block's (R, V) matrices, one forward and two
# backward, take so many bytes at most. A GPU's blocks are larger, thus fewer: in bf16 dW2 and
# dE_text are rounded once a block.
BLOCK_BYTES = 256 * 2 ** 20
GPU_BLOCK_BYTES = 512 * 2 ** 20
# A few rows of a block are in fp32 at the same time. One matrix of them takes so many bytes at
# most: the one to four that are there fit a CPU's cache. A GPU likes large kernels.
CACHE_BYTES = 2 * 2 ** 20
GPU_CHUNK_BYTES = 64 * 2 ** 20


class Align(nn.Module):
    """The Align connector of equations 1 and 2.

    d: size of a visual feature, D: size of a token embedding, V: number of tokens. The paper
    leaves open the biases (none here, as in the LM head that W2 starts from), the LayerNorms'
    affine parameters (kept) and eps (1e-5).
    """

    def __init__(self, d: int, D: int, V: int):
        super().__init__()
        self.W1 = nn.Linear(d, D, bias=False)      # weight (D, d)
        self.norm_D = nn.LayerNorm(D)
        self.W2 = nn.Linear(D, V, bias=False)      # weight (V, D)
        self.norm_V = nn.LayerNorm(V)
        self.multiply = multiply                   # held here for plumbing/fast.py to exchange

    def p_vocab(self, F: Tensor) -> Tensor:
        """F (..., d) -> P_vocab (..., V), equation 1: a distribution over the LLM's tokens."""
        h = self.norm_D(self.W1(F))                # (..., D)
        logits = self.norm_V(self.W2(h))           # (..., V)
        return nnf.softmax(logits, dim=-1)         # (..., V)

    def forward(self, F: Tensor, E_text: Tensor) -> Tensor:
        """F (..., d), E_text (V, D) -> F' (..., D), equation 2:

            F_align = self.p_vocab(F) @ E_text

        E_text is the LLM's own embedding matrix, not a copy: gradients reach it from here too.

        The paper's P_vocab has a column for each feature, ours a row: so nothing is transposed.
        Mixture calculates this line, and all of its gradients, block by block.
        """
        h = self.norm_D(self.W1(F))                # (..., D)
        norm = self.norm_V
        return Mixture.apply(h, self.W2.weight, norm.weight, norm.bias, E_text, norm.eps,
                             self.multiply)        # (..., D)

    @torch.no_grad()
    def init_weights(self, lm_head: Tensor) -> None:
        """W2 starts as a copy of the LLM's head (V, D), "recycling" its semantics (section 3.2)."""
        fill_normal(self.W1.weight, std=self.W1.in_features ** -0.5)
        self.W2.weight.copy_(lm_head)
        self.norm_D.reset_parameters()
        self.norm_V.reset_parameters()


def fill_normal(p: nn.Parameter, std: float) -> None:
    """Fill p from N(0, std^2).

    Each rank draws all of it and keeps its own rows, so that their number changes nothing.
    """
    numbers = torch.empty(p.shape).normal_(std=std)
    here, first = local_rows(p)
    here.copy_(numbers[first:first + len(here)])


# ------------------------------------------------------------------------------------------------
# Equations 1 and 2 block by block


class Mixture(torch.autograd.Function):
    """h (..., D) -> F' = softmax(LayerNorm(h W2^T)) E_text (..., D), in blocks of R visual tokens.

    For each visual token a row:

        z = h W2^T,   u = LayerNorm(z),   P = softmax(u),   F' = P E_text

    For Ovis h is F (..., d), W2 is (K, d) and E_text is a table (K, D) of its own.

    Nothing that is V wide is kept: the backward pass makes z and P again. In all that is seven
    products with a (V, D) matrix, two forward and five backward; autograd does six, but keeps z
    and P. LayerNorm and softmax are calculated in fp32 at least; in bf16 dW2 and dE_text are
    rounded once a block.
    """

    @staticmethod
    def forward(ctx, h: Tensor, W2: Tensor, weight: Tensor, bias: Tensor, E_text: Tensor,
                eps: float, multiply) -> Tensor:
        """h (..., D), W2 (V, D), the LayerNorm's weight and bias (V,), E_text (V, D) -> F'.

        multiply: what does the products, see `multiply`.
        """
        ctx.save_for_backward(h, W2, weight, bias, E_text)
        ctx.eps, ctx.multiply = eps, multiply
        F_align = h.new_empty(*h.shape[:-1], E_text.shape[1])           # (..., D)
        h = h.reshape(-1, h.shape[-1])                                  # (n_tokens, D)
        out = F_align.view(-1, E_text.shape[1])                         # (n_tokens, D)
        blocks = token_blocks(len(h), len(W2) * h.element_size(), block_bytes(h))
        buffer = h.new_empty(blocks[0].stop, len(W2))                   # (R, V)
        for block in blocks:
            z = buffer[:block.stop - block.start]                       # (R, V)
            P = z                                                       # in the same memory
            multiply(h[block], W2.T, out=z)                             # z = h W2^T
            softmax_layer_norm(z, weight, bias, eps, out=P)             # equation 1
            multiply(P, E_text, out=out[block])                         # equation 2
        return F_align

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        """g = dL/dF' (..., D) -> dL/d of each input. With da for dL/da:

            dE_text = P^T g,   dP = g E_text^T      from F' = P E_text, equation 2
            dz, dweight, dbias                      see softmax_layer_norm_backward, equation 1
            dW2 = dz^T h,   dh = dz W2              from z = h W2^T, equation 1
        """
        h, W2, weight, bias, E_text = ctx.saved_tensors
        need_h, need_W2, need_weight, need_bias, need_E_text, *_ = ctx.needs_input_grad
        need_dz = need_h or need_W2 or need_weight or need_bias
        multiply, shape = ctx.multiply, h.shape
        h = h.reshape(-1, h.shape[-1])                                  # (n_tokens, D)
        g = g.reshape(-1, g.shape[-1])                                  # (n_tokens, D)
        dh = torch.empty_like(h) if need_h else None
        dW2 = torch.empty_like(W2) if need_W2 else None
        dE_text = torch.empty_like(E_text) if need_E_text else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=wide)                  # (V,)
        dbias = torch.zeros_like(bias, dtype=wide)                      # (V,)
        blocks = token_blocks(len(h), 2 * len(W2) * h.element_size(), block_bytes(h))
        buffers = h.new_empty(2, blocks[0].stop, len(W2))               # 2 x (R, V)
        for block in blocks:
            z, P = buffers[:, :block.stop - block.start]                # (R, V) each
            add = float(block.start > 0)        # the first block's product replaces what is there
            multiply(h[block], W2.T, out=z)
            if need_E_text:
                softmax_layer_norm(z, weight, bias, ctx.eps, out=P)
                multiply(P.T, g[block], out=dE_text, add=add)
            if need_dz:
                dP = P                                                  # in its memory
                multiply(g[block], E_text.T, out=dP)
                dz = softmax_layer_norm_backward(z, dP, weight, bias, ctx.eps, dweight, dbias)
            if need_W2:
                multiply(dz.T, h[block], out=dW2, add=add)
            if need_h:
                multiply(dz, W2, out=dh[block])
        return (dh.view(shape) if need_h else None, dW2, dweight.to(weight.dtype),
                dbias.to(bias.dtype), dE_text, None, None)


def multiply(a: Tensor, B: Tensor, out: Tensor, add: float = 0.0) -> None:
    """out (n, m) becomes a B + add * out, of a (n, k) and B (k, m).

    With add 0 it does not matter what out held. Outside of autograd.
    """
    torch.addmm(out, a, B, beta=add, out=out)


def softmax_layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """Write P = softmax(LayerNorm(z)) (R, V) to out, which may be z. In fp32, in chunks of rows."""
    wide = torch.promote_types(z.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)                       # (V,)
    for rows in row_chunks(z):
        u = nnf.layer_norm(z[rows].to(wide), weight.shape, weight, bias, eps)   # (few, V)
        out[rows] = u.softmax(-1)


def softmax_layer_norm_backward(z: Tensor, dP: Tensor, weight: Tensor, bias: Tensor, eps: float,
                                dweight: Tensor, dbias: Tensor) -> Tensor:
    """The gradient of P = softmax(LayerNorm(z)): z, dP (R, V) -> dz (R, V), in z's memory.

    With * for products number by number, and sums and means over a row:

        du = P * (dP - sum(P * dP))                                 the softmax's
        rstd = 1 / sqrt(variance(z) + eps)
        z_hat = (z - mean(z)) rstd,   a = du * weight
        dz = rstd (a - mean(a) - z_hat * mean(a * z_hat))           the LayerNorm's
        dweight = du * z_hat,   dbias = du                          summed over the rows

    dweight and dbias (V,), fp32 or wider, grow by this block's share. P is made again from z: a
    few rows of it fit a CPU's cache, all of it would be a third (R, V) matrix.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)                       # (V,)
    for rows in row_chunks(z):
        z_wide, dP_wide = z[rows].to(wide), dP[rows].to(wide)           # (few, V)
        # u (few, V), mean and rstd (few, 1)
        u, mean, rstd = torch.native_layer_norm(z_wide, weight.shape, weight, bias, eps)
        P = u.softmax(-1)                                               # (few, V)
        del u                                                           # as large as P
        total = (P * dP_wide).sum(-1, keepdim=True)                     # (few, 1)
        du = dP_wide.sub_(total).mul_(P)                                # (few, V)
        # dz (few, V), dweight_rows and dbias_rows (V,)
        dz, dweight_rows, dbias_rows = torch.ops.aten.native_layer_norm_backward(
            du, z_wide, weight.shape, mean, rstd, weight, bias, [True, True, True])
        dweight += dweight_rows
        dbias += dbias_rows
        z[rows] = dz
    return z


def block_bytes(h: Tensor) -> int:
    """The most bytes that a block's V-wide matrices take on h's device."""
    return BLOCK_BYTES if h.device.type == "cpu" else GPU_BLOCK_BYTES


def token_blocks(n_tokens: int, bytes_per_token: int, most_bytes: int | None = None) -> list[slice]:
    """n_tokens in equal blocks (the last may be shorter) of at most most_bytes; at least one.

    By default of BLOCK_BYTES. Their length is a multiple of 16: products are a tenth faster then
    than with an odd number.
    """
    most = max((most_bytes or BLOCK_BYTES) // bytes_per_token // 16, 1)     # in sixteens
    count = max(math.ceil(n_tokens / (16 * most)), 1)
    R = 16 * math.ceil(n_tokens / count / 16)
    return [slice(i * R, min((i + 1) * R, n_tokens)) for i in range(count)]


def row_chunks(matrix: Tensor) -> list[slice]:
    """A block's matrix (R, V) in slices of its rows: those that are in fp32 at the same time."""
    most = CACHE_BYTES if matrix.device.type == "cpu" else GPU_CHUNK_BYTES
    few = max(most // (4 * matrix.shape[1]), 1)
    return [slice(i, i + few) for i in range(0, len(matrix), few)]


# ------------------------------------------------------------------------------------------------
# Align with k of the tokens, for inference (the paper's second version). paper/align_vocab.py
# chooses them.


class AlignTopK(nn.Module):
    """Align for inference, with k of the V tokens, the same for every patch: the softmax of
    equation 1 runs over these alone.

    F' stays a convex combination of embeddings. The paper's second version keeps the 3.4 K of 128 K
    tokens that carry nearly all probability: 58.69 on average against 58.81.

    The paper does not say whether the second LayerNorm then takes its mean and variance over k
    logits or over V. Here they are those of all V logits z = W2 h, without making them. With the
    mean m of W2's rows and their covariance C (see `spread`):

        mean(z) = h . m,   variance(z) = h^T C h
    """

    def __init__(self, align: Align, token_ids: Tensor, m: Tensor, C: Tensor):
        """token_ids (k,): distinct, int64; m (D,) and C (D, D): spread(align.W2.weight)."""
        super().__init__()
        self.W1, self.norm_D, self.eps = align.W1, align.norm_D, align.norm_V.eps
        self.linear = nnf.linear
        self.register_buffer("token_ids", token_ids, persistent=False)              # (k,)
        self.register_buffer("W2", align.W2.weight.detach()[token_ids], persistent=False)   # (k, D)
        weight, bias = align.norm_V.weight.detach(), align.norm_V.bias.detach()     # (V,) each
        self.register_buffer("weight", weight[token_ids], persistent=False)         # (k,)
        self.register_buffer("bias", bias[token_ids], persistent=False)             # (k,)
        self.register_buffer("m", m, persistent=False)                              # (D,)
        self.register_buffer("C", C, persistent=False)                              # (D, D)

    def p_vocab(self, F: Tensor) -> Tensor:
        """F (..., d) -> (..., k), equation 1: the probabilities of the k tokens sum to one."""
        h = self.norm_D(self.W1(F))                                     # (..., D)
        wide = h.to(self.m.dtype)
        mean = (wide @ self.m)[..., None]                               # (..., 1)
        variance = (wide @ self.C * wide).sum(-1, keepdim=True)         # (..., 1)
        variance = variance.clamp(min=0)                                # rounding may go below
        z = self.linear(h, self.W2)                                     # (..., k)
        u = (z - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias    # (..., k)
        return nnf.softmax(u, dim=-1).to(h.dtype)                       # (..., k)

    def forward(self, F: Tensor, E_text: Tensor) -> Tensor:
        """F (..., d), E_text (V, D) -> F' (..., D), equation 2 with k of the rows of E_text."""
        return self.p_vocab(F) @ E_text[self.token_ids]                 # (..., D)


def spread(W2: Tensor) -> tuple[Tensor, Tensor]:
    """W2 (V, D) -> the mean m (D,) and the covariance C (D, D) of its rows, fp32 or wider.

    m is subtracted from the rows before they are multiplied. To subtract m m^T from the mean of
    their products would leave few digits where m is long beside the spread.
    """
    W2 = W2.detach()
    wide = torch.promote_types(W2.dtype, torch.float32)
    m = W2.mean(0, dtype=wide)                                          # (D,)
    C = m.new_zeros(len(m), len(m))                                     # (D, D)
    for rows in W2.split(4096):
        rows = rows - m                                                 # (4096, D), wide
        C.addmm_(rows.T, rows, alpha=1 / len(W2))
    return m, C


# ------------------------------------------------------------------------------------------------
# The paper's other connectors. They too read F and write embeddings of size D, but take nothing
# from the LLM.


@dataclass
class ConnectorConfig:
    """Which connector stands between F and the LLM, and the sizes that some have of their own."""
    kind: str = "align"                 # one of CONNECTORS
    table_size: int = 65_536            # K, rows of Ovis' table; Ovis 1.6's
    n_latents: int = 64                 # from here on the Perceiver's, as in Idefics2
    depth: int = 3
    n_heads: int = 16
    n_kv_heads: int = 4
    head_dim: int = 96

    def tile_tokens(self, n_patches: int) -> int:
        """n, the visual tokens that a tile of N patches becomes: N, but for the Perceiver."""
        return self.n_latents if self.kind == "perceiver" else n_patches


CONNECTORS = ("align", "mlp", "perceiver", "ovis")


def new_connector(config: ConnectorConfig, d: int, D: int, V: int) -> nn.Module:
    """A connector: F (T, N, d), E_text (V, D) -> F' (T, n, D), still to be filled by
    init_weights(lm_head), or with stored weights. Raises ValueError for an unknown kind."""
    match config.kind:
        case "align":
            return Align(d, D, V)
        case "mlp":
            return MLPConnector(d, D)
        case "perceiver":
            return Perceiver(d, D, config)
        case "ovis":
            return Ovis(d, D, config.table_size)
    raise ValueError(f"no connector {config.kind!r}: there are {', '.join(CONNECTORS)}")


class FromScratch(nn.Module):
    """A connector that takes nothing from the LLM: neither its head to start with, nor E_text."""

    @torch.no_grad()
    def init_weights(self, lm_head: Tensor) -> None:
        """Matrices keep their input's variance; latents and table are N(0, 1), as Ovis' table."""
        for name, p in self.named_parameters():
            if name in ("latents", "table"):
                fill_normal(p, std=1.0)
            elif p.ndim > 1:
                fill_normal(p, std=p.shape[-1] ** -0.5)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)


class MLPConnector(FromScratch):
    """LLaVA 1.5's two layers (https://arxiv.org/abs/2310.03744).

    The formula in the paper's section 3.2 shows one.
    """

    def __init__(self, d: int, D: int):
        super().__init__()
        self.fc1 = nn.Linear(d, D)
        self.fc2 = nn.Linear(D, D)

    def forward(self, F: Tensor, E_text: Tensor) -> Tensor:
        """F (..., d) -> F' (..., D)."""
        return self.fc2(nnf.gelu(self.fc1(F)))


class Ovis(FromScratch):
    """Ovis' visual embedding table (https://arxiv.org/abs/2405.20797): a mixture of K own vectors.

    F' = softmax(LayerNorm(W_VET F))^T E_VET. The paper's section 3.2 leaves out the LayerNorm,
    which Ovis has. Its softmax is Ovis' default. Three options of Ovis are not here: a hard choice
    of one row, neighbours that are merged into one feature, and rows that mark where tiles begin.
    """

    def __init__(self, d: int, D: int, K: int):
        super().__init__()
        self.W_VET = nn.Linear(d, K, bias=False)            # weight (K, d)
        self.norm_K = nn.LayerNorm(K)
        self.table = nn.Parameter(torch.empty(K, D))        # E_VET (K, D)
        self.multiply = multiply

    def forward(self, F: Tensor, E_text: Tensor) -> Tensor:
        """F (..., d) -> F' (..., D)."""
        norm = self.norm_K
        return Mixture.apply(F, self.W_VET.weight, norm.weight, norm.bias, self.table, norm.eps,
                             self.multiply)                 # (..., D)


class Perceiver(FromScratch):
    """Idefics2's projection and Perceiver Resampler (https://arxiv.org/abs/2405.02246).

    N features become n tokens. The projection is 4 D wide inside, as the blocks are; in Idefics2
    it is as wide as the LLM's own MLP (3.5 D). There are no positions: the features have
    SigLIP's, and the latents are told apart by what they start as.
    """

    def __init__(self, d: int, D: int, config: ConnectorConfig):
        super().__init__()
        self.projection = PerceiverMLP(d, 4 * D, D)
        self.latents = nn.Parameter(torch.empty(config.n_latents, D))               # (n, D)
        self.layers = nn.ModuleList(PerceiverLayer(D, config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(D, eps=1e-6)

    def forward(self, F: Tensor, E_text: Tensor) -> Tensor:
        """F (T, N, d) -> F' (T, n, D), every tile by itself."""
        context = self.projection(F)                        # (T, N, D)
        latents = self.latents.expand(len(F), -1, -1)       # (T, n, D)
        for layer in self.layers:
            latents = layer(latents, context)               # (T, n, D)
        return self.norm(latents)                           # (T, n, D)


class PerceiverLayer(nn.Module):
    """The latents look at the features and at each other, by grouped-query attention; an MLP."""

    def __init__(self, D: int, config: ConnectorConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.latents_norm = nn.RMSNorm(D, eps=1e-6)
        self.context_norm = nn.RMSNorm(D, eps=1e-6)
        self.mlp_norm = nn.RMSNorm(D, eps=1e-6)
        self.q_proj = nn.Linear(D, q_size, bias=False)
        self.k_proj = nn.Linear(D, kv_size, bias=False)
        self.v_proj = nn.Linear(D, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, D, bias=False)
        self.mlp = PerceiverMLP(D, 4 * D, D)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """latents (T, n, D), context (T, N, D) -> latents (T, n, D)."""
        asking = self.latents_norm(latents)                                 # (T, n, D)
        seen = torch.cat([self.context_norm(context), asking], dim=1)       # (T, N + n, D)
        by_head = -1, self.head_dim
        q = self.q_proj(asking).unflatten(-1, by_head).transpose(1, 2)  # (T, heads, n, head_dim)
        k = self.k_proj(seen).unflatten(-1, by_head).transpose(1, 2)    # (T, kv_heads, N + n, ...)
        v = self.v_proj(seen).unflatten(-1, by_head).transpose(1, 2)    # (T, kv_heads, N + n, ...)
        grouped = q.shape[1] != k.shape[1]
        y = nnf.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)   # like q
        latents = latents + self.o_proj(y.transpose(1, 2).flatten(2))       # (T, n, D)
        return latents + self.mlp(self.mlp_norm(latents))                   # (T, n, D)


class PerceiverMLP(nn.Module):
    """x (..., size_in) -> (..., size_out) by a gated layer, SwiGLU."""

    def __init__(self, size_in: int, width: int, size_out: int):
        super().__init__()
        self.gate_proj = nn.Linear(size_in, width, bias=False)
        self.up_proj = nn.Linear(size_in, width, bias=False)
        self.down_proj = nn.Linear(width, size_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nnf.silu(self.gate_proj(x)) * self.up_proj(x))
