"""The product of a few rows with a large matrix, which decoding makes, on all cores of a CPU."""
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

FEW = 16        # rows; of more PyTorch makes as good a product
BLOCK = 32      # rows of W that a core takes at a time


def linear(x: Tensor, W: Tensor) -> Tensor:
    """x (..., D), W (V, D) -> x W^T (..., V).

    Generating reads every weight for a few rows of x. In fp32 PyTorch's library leaves that to a single core on some
    CPUs. A second row, the first again, makes it a product of matrices, which all cores share; of more rows the blocks
    of W are shared out as a batch.
    """
    n = x.shape[:-1].numel()
    whole = not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled()
    if whole or not 0 < n <= FEW or n > 1 and len(W) % BLOCK:
        return nnf.linear(x, W)
    rows = x.reshape(n, -1)                                                 # (n, D)
    if n == 1:
        y = (W @ rows.repeat(2, 1).T)[:, 0]                                 # (V,)
    else:
        blocks = W.view(-1, BLOCK, W.shape[1])                              # (V / BLOCK, BLOCK, D)
        y = torch.bmm(rows.expand(len(blocks), -1, -1), blocks.mT)          # (V / BLOCK, n, BLOCK)
        y = y.transpose(0, 1)
    return y.reshape(*x.shape[:-1], len(W))


class Linear(nn.Linear):
    """nn.Linear without a bias, by `linear`."""

    def __init__(self, size_in: int, size_out: int):
        super().__init__(size_in, size_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
