"""Features F -> embeddings that the LLM can read: the connector (paper section 3.1, part 2).

    P_vocab  = softmax(LayerNorm(W2 LayerNorm(W1 F)))     equation 1
    F'_align = P_vocab^T E_text                           equation 2

Every visual token that the LLM receives is a convex combination of its own word embeddings: the weights P_vocab are
never negative and sum to one, so F' lies inside the convex hull of the rows of E_text.
"""
import torch
import torch.nn.functional as nnf      # F is the paper's name for the features
from torch import Tensor, nn

from vision import own_rows


class Align(nn.Module):
    """The Align connector of equations 1 and 2.

    d: size of a visual feature, D: size of a word embedding, V: number of words. The paper leaves open the biases
    (none here, as in the LM head that W2 starts from), the LayerNorms' affine parameters (kept) and eps (1e-5).
    """

    def __init__(self, d: int, D: int, V: int):
        super().__init__()
        self.W1 = nn.Linear(d, D, bias=False)      # weight (D, d)
        self.norm_D = nn.LayerNorm(D)
        self.W2 = nn.Linear(D, V, bias=False)      # weight (V, D)
        self.norm_V = nn.LayerNorm(V)

    @torch.no_grad()
    def init_weights(self, lm_head: Tensor) -> None:
        """W2 starts as a copy of the LLM's head (V, D), "recycling" its semantics (section 3.2), then is its own."""
        W1 = torch.empty(self.W1.weight.shape).normal_(std=self.W1.in_features ** -0.5)
        here, first = own_rows(self.W1.weight)          # each rank draws all of it and keeps its part
        here.copy_(W1[first:first + len(here)])
        self.W2.weight.copy_(lm_head)
        for norm in (self.norm_D, self.norm_V):
            norm.reset_parameters()

    def p_vocab(self, F: Tensor) -> Tensor:
        """F (..., d) -> P_vocab (..., V), equation 1: each feature as a distribution over the LLM's words."""
        h = self.norm_D(self.W1(F))                # (..., D)
        logits = self.norm_V(self.W2(h))           # (..., V)
        return nnf.softmax(logits, dim=-1)         # (..., V)

    def forward(self, F: Tensor, E_text: Tensor) -> Tensor:
        """F (..., d), E_text (V, D), the LLM's live input embedding -> F' (..., D), equation 2."""
        return self.p_vocab(F) @ E_text            # (..., D); a row of P_vocab per feature: no transpose
