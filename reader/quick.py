"""Attention for short sequences on a CPU in bf16, written out: half the time of PyTorch's own.
On a GPU only cuDNN's attention is switched off: by its documentation it plans anew for each
length."""
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import model
import vision

SHORT = 800         # tokens of the LLM, above which PyTorch's attention is faster


class ShortAttention(vision.Attention):
    """The encoder's attention among 256 patches."""

    def forward(self, x: Tensor) -> Tensor:
        """x (T, N, d) -> (T, N, d)."""
        heads = self.n_heads, -1
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)     # (T, heads, N, d / heads)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)     # (T, heads, N, d / heads)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)     # (T, heads, N, d / heads)
        P = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1)       # (T, heads, N, N)
        return self.out_proj((P @ v).transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
           is_causal: bool = False, enable_gqa: bool = False) -> Tensor:
    """The decoder's scaled_dot_product_attention, of q, k, v (B, heads, L, head_dim)."""
    L = q.shape[2]
    if attn_mask is not None or not is_causal or enable_gqa or L > SHORT:
        return nnf.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal,
                                                enable_gqa=enable_gqa)
    later = torch.full((L, L), float("-inf"), dtype=q.dtype).triu(1)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)            # (B, heads, L, L)
    return (scores + later).softmax(-1) @ v


def quicken(module: nn.Module) -> None:
    """For a training in bf16; in value all is the same."""
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)
        return
    for part in module.modules():
        if type(part) is vision.Attention:
            part.__class__ = ShortAttention
        elif isinstance(part, model.Attention):
            part.attend = attend
