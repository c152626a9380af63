"""From many tokens to one vector.

Shapes: `B` batch, `L` tokens, `W` width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from clip_train.models.layers import Activation, LayerNorm, Mlp, attention

Pool = Literal["cls", "eot", "mean", "map"]


class AttentionPool(nn.Module):
    """Multi-head attention pooling: one learned query attends to all tokens, then a residual MLP
    ("MAP head", Zhai et al. 2022, *Scaling Vision Transformers*, and SigLIP)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, activation: Activation = "gelu") -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), activation)
        for linear in (self.query, self.key_value, self.out, self.mlp.up, self.mlp.down):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.probe, std=width**-0.5)

    def forward(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """`tokens` `(B, L, W)`, `valid` `(B, L)` bool or `None` for all -> `(B, W)`."""
        q: Tensor = self.query(self.probe).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv: Tensor = self.key_value(tokens)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attention(q.expand(len(tokens), -1, -1, -1), k, v, valid=valid)
        pooled: Tensor = self.out(mixed.transpose(1, 2).flatten(1))
        return pooled + self.mlp(self.mlp_norm(pooled))


def mean_of_valid(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid tokens: `(B, L, W)`, `(B, L)` -> `(B, W)`, summed in fp32."""
    if valid is None:
        return tokens.mean(dim=1, dtype=torch.float32).to(tokens.dtype)
    total = tokens.masked_fill(~valid[..., None], 0.0).sum(dim=1, dtype=torch.float32)
    return (total / valid.sum(dim=1, keepdim=True)).to(tokens.dtype)
