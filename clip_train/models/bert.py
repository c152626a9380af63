"""A BERT-style text tower (Devlin et al. 2018): post-norm blocks that see both ways.

The arithmetic is that of transformers' `BertModel` without its pooler, for texts of one segment: BERT's vector of
segment 0 is part of the positions here (add `token_type_embeddings[0]` to each position to bring weights in).

Parameters: `token_embedding.weight (V, W)`, `positional_embedding (context_length, W)`, `embedding_norm`; in each of
`blocks`: `attention.qkv` (query, key, value one below the other), `attention.out`, `attention_norm` (behind the
attention), `mlp.up`, `mlp.down`, `mlp_norm` (behind the MLP); with `pool = "map"` `attention_pool`.

Shapes: `B` batch, `L` longest text of the batch, `T` tokens of the batch without padding, `W` width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.attention import Layout, SelfAttention
from clip_train.models.layers import Activation, LayerNorm, Mlp
from clip_train.models.packing import take_rows
from clip_train.models.pooling import Pool
from clip_train.models.text_tower import TextTower


class PostNormBlock(nn.Module):
    """`norm(x + attention(x))`, then `norm(x + mlp(x))` (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation, norm_eps: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.attention_norm = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), activation)
        self.mlp_norm = LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        mixed = self.attention(x, layout)
        x = (x if layout.read is None else take_rows(x, layout.read)[:, None]) + mixed
        x = self.attention_norm(x)
        return self.mlp_norm(x + self.mlp(x))


class BertText(TextTower):
    """Token and position embeddings, a norm, post-norm blocks, one vector a text.

    Args:
        pool, eot_id, packed: see `TextTower`. BERT's own pool is `cls`.

    Raises:
        ValueError: sizes that do not divide, or an unknown choice.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        *,
        pool: Pool = "cls",
        mlp_ratio: float = 4.0,
        activation: Activation = "gelu",
        norm_eps: float = 1e-12,
        eot_id: int | None = None,
        packed: bool = True,
    ) -> None:
        super().__init__(vocab_size, context_length, width, causal=False, pool=pool, eot_id=eot_id, packed=packed)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.embedding_norm = LayerNorm(width, eps=norm_eps)
        self.blocks = nn.ModuleList(PostNormBlock(width, heads, mlp_ratio, activation, norm_eps) for _ in range(layers))
        self.init_parameters()
        self.attention_pool = self.make_attention_pool(heads, mlp_ratio, activation)

    def init_parameters(self) -> None:
        """BERT's: every matrix normal with a standard deviation of 0.02, biases zero."""
        nn.init.normal_(self.positional_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token and position added, normalised."""
        return self.embedding_norm(self.token_embedding(ids) + F.embedding(positions, self.positional_embedding))

    def finish(self, x: Tensor) -> Tensor:
        """Nothing: the last block ends in a norm."""
        return x
