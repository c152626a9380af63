"""From many tokens to one vector.

Shapes: `B` batch, `L` tokens, `W` width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clip_train.models.attention import attention
from clip_train.models.layers import Activation, LayerNorm, Mlp

TokenPool = Literal["eot", "last", "cls"]
"""One token stands for the text: the first EOT (CLIP), the last valid token, or token 0, where SOT stands."""
FreePool = Literal[TokenPool, "mean", "max"]
"""Pools without parameters: a frozen encoder may be read with any of them."""
Pool = Literal[FreePool, "map"]
"""`map` attends to the valid tokens with a learned query (`AttentionPool`)."""
TOKEN_POOLS: tuple[str, ...] = get_args(TokenPool)
FREE_POOLS: tuple[str, ...] = (*TOKEN_POOLS, "mean", "max")
POOLS: tuple[str, ...] = (*FREE_POOLS, "map")


class AttentionPool(nn.Module):
    """Multi-head attention pooling: one learned query attends to all tokens, then a residual MLP
    ("MAP head", Zhai et al. 2022, *Scaling Vision Transformers*, and SigLIP)."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"pool = 'map' needs heads that divide the width: {heads} do not divide {width}")
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = LayerNorm(width, eps=norm_eps)
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


def max_of_valid(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Maximum over the valid tokens, dimension by dimension: `(B, L, W)`, `(B, L)` -> `(B, W)`."""
    if valid is not None:
        tokens = tokens.masked_fill(~valid[..., None], -torch.inf)
    return tokens.amax(dim=1)


def pooled_position(valid: Tensor, ids: Tensor, eot_id: int | None, pool: TokenPool) -> Tensor:
    """Which token stands for each text: `valid` `(B, L)` bool, `ids` `(B, L)` -> `(B,)` int64.

    `eot` is the first EOT among the valid tokens, as CLIP's argmax over the ids. A text without one, and every text
    where `eot_id` is `None`, is read at its last valid token, where EOT stands in a text that has just one.
    """
    if pool == "cls":
        return ids.new_zeros(len(ids), dtype=torch.int64)
    last = valid.sum(dim=1) - 1
    if pool == "last" or eot_id is None:
        return last
    found = (ids == eot_id) & valid
    return torch.where(found.any(dim=1), found.int().argmax(dim=1), last)


def pool_tokens(tokens: Tensor, valid: Tensor, ids: Tensor, eot_id: int | None, pool: FreePool) -> Tensor:
    """One vector a text, by a pool without parameters.

    Args:
        tokens: `(B, L, W)` floating, encoded tokens.
        valid: `(B, L)` bool, the first tokens of each row; at least one.
        ids: `(B, L)` integers, what was encoded; `eot` alone reads them.
        eot_id: see `pooled_position`.

    Returns:
        `(B, W)` in the dtype of `tokens`.

    Raises:
        ValueError: another pool.
    """
    if pool == "mean":
        return mean_of_valid(tokens, valid)
    if pool == "max":
        return max_of_valid(tokens, valid)
    if pool not in TOKEN_POOLS:
        raise ValueError(f"pool={pool!r} is unknown without parameters: choose one of {', '.join(FREE_POOLS)}")
    return tokens[torch.arange(len(tokens), device=tokens.device), pooled_position(valid, ids, eot_id, pool)]
