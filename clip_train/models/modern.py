"""A text tower of today: rotary positions, gated MLPs, RMSNorm and no biases, causal or bidirectional.

The arithmetic is that of transformers' `LlamaModel` (Touvron et al. 2023) with as many key heads as query heads; with
`attention = "bidirectional"` only the mask differs.

Parameters: `token_embedding.weight (V, W)`; in each of `blocks`: `attention_norm.weight`, `attention.qkv.weight` (q, k,
v one below the other), `attention.out.weight`, `mlp_norm.weight`, `mlp.gate.weight`, `mlp.up.weight`,
`mlp.down.weight`; `final_norm.weight`; with `pool = "map"` `attention_pool`.

Shapes: `B` batch, `L` longest text of the batch, `W` width, `D` size of a head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from clip_train.models.attention import Layout, SelfAttention, rotary_angles
from clip_train.models.layers import GatedMlp, PreNormBlock, RMSNorm, gated_hidden, init_blocks_
from clip_train.models.pooling import Pool
from clip_train.models.text_tower import TextTower


class ModernText(TextTower):
    """Token embeddings, blocks whose attention turns queries and keys, a final norm, one vector a text.

    Args:
        attention: `causal` or `bidirectional` (padding is masked).
        mlp_ratio: inner size of the gated MLPs in widths, to the next multiple of 8; with 8/3 they have as many
            parameters as plain ones of 4.
        rope_base: the slowest pair of dimensions turns by about `1 / rope_base` a position.
        pool, eot_id, packed: see `TextTower`.

    Raises:
        ValueError: sizes that do not divide, heads of an odd size, an unknown choice, or `causal` with `cls`.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        *,
        attention: Literal["causal", "bidirectional"] = "causal",
        pool: Pool = "eot",
        mlp_ratio: float = 8 / 3,
        rope_base: float = 10_000.0,
        norm_eps: float = 1e-6,
        eot_id: int | None = None,
        packed: bool = True,
    ) -> None:
        if attention not in ("causal", "bidirectional"):
            raise ValueError(f"attention={attention!r} is unknown: choose 'causal' or 'bidirectional'")
        causal = attention == "causal"
        super().__init__(vocab_size, context_length, width, causal=causal, pool=pool, eot_id=eot_id, packed=packed)
        if width % heads == 0 and width // heads % 2:
            raise ValueError(f"width={width} / heads={heads} is odd: rotary positions turn pairs of dimensions")
        self.attention, self.head_dim, self.rope_base = attention, width // heads, rope_base
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                RMSNorm(width, eps=norm_eps),
                SelfAttention(width, heads, bias=False),
                RMSNorm(width, eps=norm_eps),
                GatedMlp(width, gated_hidden(width, mlp_ratio), "silu"),
            )
            for _ in range(layers)
        )
        self.final_norm = RMSNorm(width, eps=norm_eps)
        self.attention_pool = self.make_attention_pool(heads)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        init_blocks_(self.blocks)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The token's vector; the attention knows positions."""
        return self.token_embedding(ids)

    def attention_terms(self, layout: Layout, length: int, device: torch.device) -> Layout:
        """The angles of every position."""
        return replace(layout, rotary=rotary_angles(length, self.head_dim, self.rope_base, device))

    def finish(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.final_norm(x)
