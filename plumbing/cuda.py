"""What is fast on a GPU alone: plumbing/fast.py comes here where a model is on one."""
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn


def attend_in_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of grouped queries under a mask: PyTorch's fast kernels take one of the two alone.

    The heads of a group become rows of one head. q (B, heads, L, head_dim), k and v
    (B, kv_heads, reach, head_dim), mask (B, 1, L, reach) -> like q.
    """
    B, heads, L, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    rows = q.reshape(B, kv_heads, group * L, head_dim)
    mask = mask.repeat(1, 1, group, 1)                              # (B, 1, group * L, reach)
    return nnf.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)


def prepare_to_answer(llm: nn.Module) -> None:
    """Let a decoder's steps be CUDA graphs."""
    if not isinstance(llm.next_hidden, NextHidden):
        llm.next_hidden = NextHidden(llm.next_hidden)


class NextHidden:
    """Llama.next_hidden, whose hundreds of small kernels are started together, as a CUDA graph.

    Each cache has a graph of its own. It is recorded at the cache's second step: the first one
    makes what may not be made in a recording, like cuBLAS' workspace. The shapes of a graph stay,
    so that attention reads all of the cache at every step. Where nothing can be recorded, every
    step is taken as it is.
    """

    def __init__(self, step: Callable[..., Tensor]):
        self.step = step
        self.records = True

    def __call__(self, ids: Tensor, cache, position: Tensor) -> Tensor:
        """ids (B,) at position (B, 1) -> final hidden states (B, D), until the next call."""
        cache.reach = cache.length
        if not self.records:
            return self.step(ids, cache, position)
        if not hasattr(cache, "graph"):
            cache.graph = None
            return self.step(ids, cache, position)
        if cache.graph is None:
            try:
                cache.graph = Recording(self.step, ids, cache, position)
            except RuntimeError as error:
                self.records = False
                warnings.warn(f"each token takes longer, without a CUDA graph: {error}")
                return self.step(ids, cache, position)
        return cache.graph.replay(ids, position)


class Recording:
    """The kernels of a step with one cache, and the memory that they read and write."""

    def __init__(self, step: Callable[..., Tensor], ids: Tensor, cache, position: Tensor):
        self.ids, self.position = ids.clone(), position.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.h = step(self.ids, cache, self.position)           # (B, D)

    def replay(self, ids: Tensor, position: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.position.copy_(position)
        self.graph.replay()
        return self.h
