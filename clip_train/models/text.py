"""CLIP's text transformer (Radford et al. 2021, section 2.4) and its bidirectional twin.

Shapes: `B` batch, `L` longest text of the batch, `T` tokens of the batch without padding, `W` width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.layers import Activation, Block, LayerNorm, init_blocks_
from clip_train.models.pooling import Pool
from clip_train.models.text_tower import TextTower


class TextTransformer(TextTower):
    """Token and position embeddings, pre-norm blocks, a final norm, one vector a caption.

    Args:
        attention: `causal` (CLIP) or `bidirectional` (padding is masked).
        pool, eot_id, packed: see `TextTower`.

    Raises:
        ValueError: sizes that do not divide, an unknown choice, or `causal` with `cls`.
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
        mlp_ratio: float = 4.0,
        activation: Activation = "gelu",
        eot_id: int | None = None,
        packed: bool = True,
    ) -> None:
        if attention not in ("causal", "bidirectional"):
            raise ValueError(f"attention={attention!r} is unknown: choose 'causal' or 'bidirectional'")
        causal = attention == "causal"
        super().__init__(vocab_size, context_length, width, causal=causal, pool=pool, eot_id=eot_id, packed=packed)
        self.attention = attention
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, activation) for _ in range(layers))
        self.final_norm = LayerNorm(width)
        self.attention_pool = self.make_attention_pool(heads, mlp_ratio, activation)
        self.init_parameters()

    def init_parameters(self) -> None:
        """The paper's initialisation."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        init_blocks_(self.blocks)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token and position added."""
        return self.token_embedding(ids) + F.embedding(positions, self.positional_embedding)

    def finish(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.final_norm(x)
