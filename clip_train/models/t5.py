"""A T5-style text tower (Raffel et al. 2020, section 2.1): the encoder of T5 and T5 v1.1.

The arithmetic is that of transformers' `T5EncoderModel`: RMSNorm before each sublayer and behind the last, no biases,
no scaling of attention scores (the initialisation does it), and for positions one bias for each head and bucket of
distances, shared by all blocks.

Parameters: `token_embedding.weight (V, W)`, `relative_bias.weight (buckets, heads)`; in each of `blocks`:
`attention_norm.weight`, `attention.qkv.weight` (q, k, v one below the other), `attention.out.weight`,
`mlp_norm.weight`, `mlp.up.weight` (v1.1: `wi_1`; v1.0: `wi`), `mlp.gate.weight` (v1.1: `wi_0`), `mlp.down.weight`
(`wo`); `final_norm.weight`; with `pool = "map"` `attention_pool`.

Shapes: `B` batch, `L` longest text of the batch, `W` width, `H` heads.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from clip_train.models.attention import Layout, SelfAttention
from clip_train.models.layers import GatedMlp, Mlp, PreNormBlock, RMSNorm, gated_hidden
from clip_train.models.pooling import Pool
from clip_train.models.text_tower import TextTower


class T5Text(TextTower):
    """Token embeddings, blocks whose attention adds a bias by distance, a final norm, one vector a text.

    Args:
        head_dim: size of a head; default `width / heads`. Published models have 64 whatever the width.
        hidden: inner size of the MLPs; default 4 width, or 8/3 width where they are gated (as many parameters).
        mlp: `gated_gelu` (v1.1, mT5) or `relu` (v1.0).
        buckets: number of buckets of distances, half of them for either side.
        max_distance: from here on, distances share a bucket.
        pool, eot_id, packed: see `TextTower`.

    Raises:
        ValueError: sizes that do not divide, an unknown choice, or buckets that cannot be halved twice.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        *,
        pool: Pool = "mean",
        head_dim: int | None = None,
        hidden: int | None = None,
        mlp: Literal["gated_gelu", "relu"] = "gated_gelu",
        buckets: int = 32,
        max_distance: int = 128,
        norm_eps: float = 1e-6,
        eot_id: int | None = None,
        packed: bool = True,
    ) -> None:
        super().__init__(vocab_size, context_length, width, causal=False, pool=pool, eot_id=eot_id, packed=packed)
        if mlp not in ("gated_gelu", "relu"):
            raise ValueError(f"mlp={mlp!r} is unknown: choose 'gated_gelu' or 'relu'")
        if buckets % 4 or max_distance <= buckets // 4:
            raise ValueError(
                f"buckets={buckets} must be a multiple of 4, and max_distance={max_distance} above a quarter of it"
            )
        hidden = hidden or (gated_hidden(width, 8 / 3) if mlp == "gated_gelu" else 4 * width)
        self.buckets, self.max_distance = buckets, max_distance
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.relative_bias = nn.Embedding(buckets, heads)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                RMSNorm(width, eps=norm_eps),
                SelfAttention(width, heads, head_dim=head_dim, bias=False, scale=1.0),
                RMSNorm(width, eps=norm_eps),
                GatedMlp(width, hidden, "gelu_tanh") if mlp == "gated_gelu" else Mlp(width, hidden, "relu", bias=False),
            )
            for _ in range(layers)
        )
        self.final_norm = RMSNorm(width, eps=norm_eps)
        self.init_parameters()
        self.attention_pool = self.make_attention_pool(heads)

    def init_parameters(self) -> None:
        """As the released code (mesh-tensorflow, transformers): queries smaller by the scores' missing scale."""
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        nn.init.normal_(self.relative_bias.weight, std=self.width**-0.5)
        for block in self.blocks:
            assert isinstance(block, PreNormBlock)
            inner = block.attention.out.in_features
            q, k, v = block.attention.qkv.weight.chunk(3)
            nn.init.normal_(q, std=(self.width * inner // block.attention.heads) ** -0.5)
            for part in (k, v):
                nn.init.normal_(part, std=self.width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=inner**-0.5)
            for name, linear in block.mlp.named_children():
                if isinstance(linear, nn.Linear):
                    nn.init.normal_(linear.weight, std=(linear.in_features if name == "down" else self.width) ** -0.5)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The token's vector; the attention knows positions."""
        return self.token_embedding(ids)

    def attention_terms(self, layout: Layout, length: int, device: torch.device) -> Layout:
        """The bias `(H, L, L)` of every query and key."""
        positions = torch.arange(length, device=device)
        bucket = relative_buckets(positions - positions[:, None], self.buckets, self.max_distance)
        return replace(layout, bias=self.relative_bias(bucket).permute(2, 0, 1))

    def finish(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.final_norm(x)


def relative_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each signed distance (key minus query), int64: the upper half for later keys.

    Near distances have a bucket each, farther ones share them on a logarithmic scale up to `max_distance`.
    """
    side = buckets // 2
    exact = side // 2
    far = distance.abs().float().clamp(min=1)
    shared = exact + (torch.log(far / exact) / math.log(max_distance / exact) * (side - exact)).long()
    return (distance > 0) * side + torch.where(distance.abs() < exact, distance.abs(), shared.clamp(max=side - 1))
