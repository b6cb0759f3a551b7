"""Matrix products in fp32 on an AMD processor by oneDNN, which PyTorch takes for bf16 and convolutions only.

Its own choice in fp32, Intel's MKL, leaves half of such a processor's arithmetic unused, and a product with a single
vector to one of its cores. On Intel's CPUs, where MKL is as fast or faster, on any other, on a GPU, in other dtypes and
inside of torch.compile, all of this is what PyTorch does.
"""
import platform
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    CPU = Path("/proc/cpuinfo").read_text()     # whose it is and what it can do
except OSError:                                 # not on Linux, or not to be read
    CPU = platform.processor()
AMD, AMX = "AuthenticAMD" in CPU, "amx_bf16" in CPU
CELL = 2048     # `into` makes so many rows and columns at a time: fp32 numbers that stay in a CPU's cache


def by_onednn(x: Tensor) -> bool:
    return (AMD and not torch.compiler.is_compiling() and x.is_cpu and x.dtype == torch.float32
            and torch.backends.mkldnn.is_available())


def onednn(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D), W (V, D), bias (V,) -> x W^T + bias (..., V), without autograd; an operator of PyTorch's compiler."""
    bias = bias if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, W, bias, "none", [], "")


class Product(torch.autograd.Function):
    """y = x W^T + bias. With da for dL/da, over rows x:   dx = dy W,   dW = dy^T x,   dbias = sum(dy)"""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        need_x, need_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_W else None, W if need_x else None)
        return onednn(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        need_x, need_W, need_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])                                     # (n, V)
        dx = onednn(dy, W.T) if need_x else None
        dW = onednn(rows.T, x.reshape(len(rows), -1).T) if need_W else None
        return dx, dW, rows.sum(0) if need_bias else None


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D), W (V, D), bias (V,) -> x W^T + bias (..., V)."""
    if W.is_mkldnn:         # packed
        return onednn(x, W, bias)
    if x.numel() == 0 or not by_onednn(x):
        return nnf.linear(x, W, bias)
    if torch.is_grad_enabled():
        return Product.apply(x, W, bias)
    if x.numel() == x.shape[-1] and bias is None:   # MKL with the vector twice, which all cores share, is faster still
        row = x.reshape(1, -1)
        return torch.mm(W, torch.cat((row, row)).T)[:, 0].view(*x.shape[:-1], -1)
    return onednn(x, W, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm: x (..., D) -> x w / sqrt(mean(x^2) + eps) (..., D).

    Packed, it makes less than half as many calls to PyTorch, which is most of what it costs a single token on a CPU.
    """
    packed = None       # w sqrt(D) (D,) and sqrt(D eps), with which the length of x is enough; fp32 or wider

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return super().forward(x)
        w, b = self.packed
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=w.dtype)       # (..., 1): sqrt(sum(x^2))
        return (x * w / torch.hypot(length, b)).to(x.dtype)


def can_pack(W: Tensor) -> bool:
    """Whether W is in bf16 on a CPU that can calculate with it."""
    return (W.is_cpu and W.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(model: nn.Module) -> None:
    """Lay the weights of a model on a CPU out anew, for nothing but answers.

    Those of every RMSNorm as it needs them, and those of every Linear in bf16 as oneDNN reads them: up to twice as
    fast. The latter are opaque then.
    """
    for layer in model.modules():
        if isinstance(layer, RMSNorm):
            w = layer.weight.detach()
            w = w.to(torch.promote_types(w.dtype, torch.float32))
            layer.packed = w * len(w) ** 0.5, w.new_tensor((len(w) * layer.eps) ** 0.5)
        elif isinstance(layer, Linear) and can_pack(layer.weight) and not layer.weight.is_mkldnn:
            W = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.weight = nn.Parameter(W, requires_grad=False)


def into(out: Tensor, a: Tensor, B: Tensor, beta: float = 0.0) -> Tensor:
    """out (n, m) becomes a B + beta * out, of a (n, k) and B (k, m), and is returned; without autograd.

    With beta 0 what out held does not matter. oneDNN's product needs memory of its own: for a cell of out at a time.
    """
    if len(B) == 0 or not by_onednn(a):
        return torch.addmm(out, a, B, beta=beta, out=out)
    for rows, out_rows in zip(a.split(CELL), out.split(CELL)):
        for columns, cell in zip(B.split(CELL, dim=1), out_rows.split(CELL, dim=1)):
            product = onednn(rows, columns.T)                                   # (2048, 2048) at most
            cell.copy_(product.add_(cell, alpha=beta) if beta else product)
    return out
