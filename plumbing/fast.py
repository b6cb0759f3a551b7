"""What is fast on some machine, applied to a model from outside: `use(model)`.

The method (vision.py, connector.py, model.py) is plain PyTorch. `use` exchanges the classes of its
nn.Linear and nn.RMSNorm, whose parameters, hooks and state-dict keys stay, and the functions that
modules hold for it to exchange: `attend`, `gate`, `linear` and `multiply`. A decoder's `new_cache`
makes its cache in fp32 on a CPU; on a GPU, to answer, `next_hidden` becomes a CUDA graph. Results
are the same up to rounding, at best that of fp32.

- fp32 products on an AMD processor are done by oneDNN, which PyTorch takes for bf16 and for
  convolutions only. Its own choice in fp32, Intel's MKL, leaves half of such a processor's
  arithmetic unused, and a product with one vector to one of its cores. On Intel's CPUs MKL is as
  fast or faster and stays.
- The LLM's attention on a CPU is in fp32: PyTorch's in bf16 takes longer, for a token up to four
  times. It is in bf16 for a prompt without a prefix where a CPU has AMX (half the time), and to
  learn from samples of 1,000 tokens and more where it has AVX-512's products of bf16 (a fifth
  less).
- To answer, weights in bf16 on a CPU are laid out as oneDNN reads them. What is fast on a GPU is in
  plumbing/cuda.py.
"""
import functools
import platform
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    CPU = Path("/proc/cpuinfo").read_text()     # whose it is and what it can do
except OSError:                                 # not on Linux, or not to be read
    CPU = platform.processor()
AMD, AMX, AVX512_BF16 = "AuthenticAMD" in CPU, "amx_bf16" in CPU, "avx512_bf16" in CPU
LONG = 1000     # tokens of a sample from which on attention learns faster in bf16
CELL = 2048     # `multiply` makes so many rows and columns at a time: they stay in a CPU's cache


def use(model: nn.Module, inference: bool = False) -> None:
    """Let a model use what is fast on this machine. Call it before the model is sharded. For the
    whole process it turns cuDNN's attention off.

    inference: nothing but answers will follow. The decoder can then no longer be trained, moved,
    copied, saved or loaded into. In bf16 on a CPU its matrices, all but E_text, cannot even be
    looked at, and a head that is tied to E_text becomes a copy of it.
    """
    # cuDNN plans its attention anew for each length, for up to a second; training meets many.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is nn.RMSNorm:
            module.__class__ = RMSNorm
        for function in (attend, gate, linear, multiply):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)
    for module in model.modules():              # a decoder's own layers are exchanged by now
        if hasattr(module, "new_cache"):
            module.new_cache = functools.partial(suitable_cache, type(module).new_cache, module)
            if inference:
                prepare_to_answer(module)


# ------------------------------------------------------------------------------------------------
# Products


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN's products are faster than PyTorch's own for x: in fp32, on an AMD CPU."""
    return (AMD and x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available())


def onednn(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D), W (V, D), bias (V,) -> x W^T + bias (..., V), without autograd.

    It is an operator of PyTorch's compiler, not a public function.
    """
    bias = bias if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, W, bias, "none", [], "")


class Product(torch.autograd.Function):
    """y = x W^T + bias. With da for dL/da, over rows x:

    dx = dy W,   dW = dy^T x,   dbias = sum(dy)
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., D), W (V, D), bias (V,) -> y (..., V)."""
        need_x, need_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_W else None, W if need_x else None)
        return onednn(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        need_x, need_W, need_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])                                     # (n, V)
        dx = onednn(dy, W.T) if need_x else None                                # (..., D)
        dW = onednn(rows.T, x.reshape(len(rows), -1).T) if need_W else None     # (V, D)
        dbias = rows.sum(0) if need_bias else None                              # (V,)
        return dx, dW, dbias


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D), W (V, D), bias (V,) -> x W^T + bias (..., V)."""
    if W.is_mkldnn:         # laid out for answering
        return onednn(x, W, bias)
    if x.numel() == 0 or not by_onednn(x):
        return nnf.linear(x, W, bias)
    if torch.is_grad_enabled():
        return Product.apply(x, W, bias)
    if x.numel() == x.shape[-1] and bias is None:
        # MKL with the vector twice, a product that all cores share, is faster still.
        row = x.reshape(1, -1)
        return torch.mm(W, torch.cat((row, row)).T)[:, 0].view(*x.shape[:-1], -1)
    return onednn(x, W, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def multiply(a: Tensor, B: Tensor, out: Tensor, add: float = 0.0) -> None:
    """connector.multiply: out (n, m) becomes a B + add * out, of a (n, k) and B (k, m).

    oneDNN's product needs memory of its own: here for a cell of out at a time.
    """
    if len(B) == 0 or not by_onednn(a):
        torch.addmm(out, a, B, beta=add, out=out)
        return
    # Some columns of a B that lies row by row would be read number by number: 1,000 times as long.
    width = CELL if B.stride(0) == 1 else B.shape[1]
    for a_rows, out_rows in zip(a.split(CELL), out.split(CELL)):
        for columns, cell in zip(B.split(width, dim=1), out_rows.split(width, dim=1)):
            product = onednn(a_rows, columns.T)                             # (2048, width) at most
            if add:
                product.add_(cell, alpha=add)
            cell.copy_(product)


# ------------------------------------------------------------------------------------------------
# Norms, gates and attention


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm: x (..., D) -> x w / sqrt(mean(x^2) + eps) (..., D).

    To answer, it makes less than half as many calls to PyTorch, which is most of what it costs a
    single token on a CPU.
    """
    # To answer: w' = w sqrt(D) (D,) and b = sqrt(D eps), fp32. With |x| for the length of x,
    #     x w / sqrt(mean(x^2) + eps) = x w' / sqrt(|x|^2 + b^2)
    laid_out = None

    def forward(self, x: Tensor) -> Tensor:
        if self.laid_out is None:
            return super().forward(x)
        w, b = self.laid_out
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=w.dtype)   # (..., 1)
        return (x * w / torch.hypot(length, b)).to(x.dtype)


def gate(g: Tensor, u: Tensor) -> Tensor:
    """g, u (..., width) -> silu(g) * u, in g's memory where no gradient needs it.

    Fresh memory takes a CPU 4 % of the time in which it reads a prompt.
    """
    if torch.is_grad_enabled():
        return nnf.silu(g) * u
    return nnf.silu(g, inplace=True).mul_(u)


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
           is_causal: bool = False, enable_gqa: bool = False) -> Tensor:
    """q (B, heads, L, head_dim), k and v (B, kv_heads, reach, head_dim) -> like q: scaled
    dot-product attention; on a CPU in fp32, unless attends_faster_in_bf16."""
    if q.is_cuda and enable_gqa and attn_mask is not None:
        from plumbing.cuda import attend_in_groups
        return attend_in_groups(q, k, v, attn_mask)
    if q.is_cpu and not attends_faster_in_bf16(q, attn_mask):
        mask = attn_mask if attn_mask is None else attn_mask.float()
        y = nnf.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask,
                                             is_causal=is_causal, enable_gqa=enable_gqa)
        return y.to(q.dtype)
    return nnf.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal,
                                            enable_gqa=enable_gqa)


def attends_faster_in_bf16(q: Tensor, mask: Tensor | None) -> bool:
    """Whether attention on this CPU is faster in q's bf16 than in fp32."""
    if q.dtype != torch.bfloat16 or mask is not None:
        return False
    if torch.is_grad_enabled():
        return AVX512_BF16 and q.requires_grad and q.shape[-2] >= LONG
    return AMX


def suitable_cache(new_cache, llm: nn.Module, batch: int, length: int, prefix=None,
                   dtype: torch.dtype | None = None):
    """Llama.new_cache, on a CPU in fp32 unless dtype says another: attention would convert all of
    it for every token."""
    if dtype is None and llm.embed_tokens.weight.is_cpu:
        dtype = torch.float32
    return new_cache(llm, batch, length, prefix, dtype)


# ------------------------------------------------------------------------------------------------
# To answer


def prepare_to_answer(llm: nn.Module) -> None:
    """Lay a decoder's weights on a CPU out anew: those of every norm as it needs them, and matrices
    in bf16 as oneDNN reads them, which is up to twice as fast. On a GPU a step becomes a graph."""
    E_text = llm.embed_tokens.weight
    if E_text.is_cuda:
        from plumbing import cuda
        cuda.prepare_to_answer(llm)
    if not E_text.is_cpu:
        return
    if reads_laid_out(E_text) and llm.config.tie_embeddings:
        llm.config = replace(llm.config, tie_embeddings=False)
        llm.lm_head = Linear(*reversed(E_text.shape), bias=False, device="meta")
        llm.lm_head.weight = E_text
    for module in llm.modules():
        if isinstance(module, RMSNorm):
            w = module.weight.detach()
            w = w.to(torch.promote_types(w.dtype, torch.float32))
            module.laid_out = w * len(w) ** 0.5, w.new_tensor((len(w) * module.eps) ** 0.5)
        elif isinstance(module, Linear) and reads_laid_out(module.weight):
            W = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
            module.weight = nn.Parameter(W, requires_grad=False)


def reads_laid_out(W: Tensor) -> bool:
    """Whether W is in bf16 on a CPU that can calculate with it, and not laid out yet."""
    return (W.is_cpu and W.dtype == torch.bfloat16 and not W.is_mkldnn
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())
