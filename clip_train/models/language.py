"""A text tower that is trained to tell tokens: its tokens times its own embeddings.

Shapes: `B` batch, `L` longest text of the batch, `N` tokens that are asked for, `W` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.base import Model, Tower, TowerOutput
from clip_train.models.layers import LayerNorm
from clip_train.models.packing import take_rows


class Embeds(Protocol):
    """What a language model reads of a text tower beside what all towers have."""

    token_embedding: nn.Embedding


class TiedHead(nn.Module):
    """Logits from tokens that the tower has normalised: `scale * tokens @ embeddings.T + bias` (Press & Wolf 2017).

    Args:
        scale: T5's `width ** -0.5`, for embeddings of unit variance; 1 for those that begin small.
    """

    def __init__(self, vocab_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """`tokens` `(N, W)`, `embeddings` `(V, W)` -> `(N, V)`."""
        return F.linear(tokens * self.scale, embeddings, self.bias)


class BertHead(nn.Module):
    """BERT's: dense, GELU, norm, then the embeddings and a bias (Devlin et al. 2019; BertLMPredictionHead)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """`tokens` `(N, W)`, `embeddings` `(V, W)` -> `(N, V)`."""
        return F.linear(self.norm(F.gelu(self.dense(tokens))), embeddings, self.bias)


class LanguageModel(Model):
    """A text tower and a head whose matrix is the tower's token embedding.

    The tower must have no weights of its own behind its tokens (`pool="map"`): no gradient would reach them.
    """

    reads_every_token = True

    def __init__(self, text: Tower, head: TiedHead | BertHead) -> None:
        super().__init__()
        self.text, self.head = text, head

    @property
    def towers(self) -> Mapping[str, Tower]:
        """The one."""
        return {"text": self.text}

    def forward(self, ids: Tensor, lengths: Tensor, at: Tensor) -> Tensor:
        """Logits of the tokens that are asked for, in the dtype of the head's product.

        Args:
            ids, lengths: `(B, L)` and `(B,)`, as the tower takes them.
            at: `(N,)` int64, distinct cells of the grid counted row by row, `row * L + place`.

        Returns:
            `(N, V)`.
        """
        output: TowerOutput = self.text(ids, lengths)
        return self.head(take_rows(output.tokens, at), self.embeddings)

    @property
    def embeddings(self) -> Tensor:
        """`(V, W)`: the tower's, and the head's."""
        tower: Embeds = self.text  # pyright: ignore[reportAssignmentType]
        return tower.token_embedding.weight

    @property
    def target_flops(self) -> float:
        """FLOPs of the head for a token, forward."""
        return 2.0 * (self.embeddings.numel() + sum(p.numel() for p in self.head.parameters() if p.ndim == 2))
