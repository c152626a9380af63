"""CLIP's text transformer (Radford et al. 2021, section 2.4), its bidirectional twin, and SigLIP's.

SigLIP's (Zhai et al. 2023; open_clip's and transformers' SigLIP models) is `attention="bidirectional"`,
`padding="attended"`, `pool="last"`, `activation="gelu_tanh"`, `norm_eps=1e-6`, `projection_bias=True`.

Parameters: `token_embedding.weight (V, W)`, `positional_embedding (context_length, W)`; in each of `blocks`:
`attention_norm`, `attention.qkv` (q, k, v one below the other), `attention.out`, `mlp_norm`, `mlp.up`, `mlp.down`;
`final_norm`; with `pool = "map"` `attention_pool`.

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
        attention: `causal` (CLIP) or `bidirectional`.
        projection_bias: whether the projection behind the tower has a bias.
        padding: `masked`, or `attended` as in SigLIP: every text is filled up to `context_length` with `pad_id`, and
            the padding takes part as any token does. `last` is then token `context_length - 1`.
        pool, eot_id, packed: see `TextTower`.

    Raises:
        ValueError: sizes that do not divide, an unknown choice, `causal` with `cls` or with attended padding, or
            attended padding without `pad_id`.
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
        norm_eps: float = 1e-5,
        projection_bias: bool = False,
        padding: Literal["masked", "attended"] = "masked",
        pad_id: int | None = None,
        eot_id: int | None = None,
        packed: bool = True,
    ) -> None:
        if attention not in ("causal", "bidirectional"):
            raise ValueError(f"attention={attention!r} is unknown: choose 'causal' or 'bidirectional'")
        causal = attention == "causal"
        super().__init__(vocab_size, context_length, width, causal=causal, pool=pool, eot_id=eot_id, packed=packed)
        if padding not in ("masked", "attended"):
            raise ValueError(f"padding={padding!r} is unknown: choose 'masked' or 'attended'")
        if padding == "attended" and causal:
            raise ValueError(
                "padding='attended' contradicts attention='causal': no token sees the padding behind it. "
                "Use attention='bidirectional', as SigLIP does, or padding='masked'."
            )
        if padding == "attended" and pad_id is None:
            raise ValueError("padding='attended' fills texts up: give pad_id, the id to fill with")
        self.attention, self.padding, self.pad_id = attention, padding, pad_id
        self.projection_bias = projection_bias
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, activation, norm_eps=norm_eps) for _ in range(layers)
        )
        self.final_norm = LayerNorm(width, eps=norm_eps)
        self.attention_pool = self.make_attention_pool(heads, mlp_ratio, activation)
        self.init_parameters()

    def init_parameters(self) -> None:
        """The paper's initialisation."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        init_blocks_(self.blocks)

    def prepare(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """With attended padding, texts as long as they can be."""
        if self.padding == "masked":
            return ids, lengths
        assert self.pad_id is not None
        inside = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device, non_blocking=True)[:, None]
        ids = torch.where(inside, ids, self.pad_id)
        ids = F.pad(ids, (0, self.context_length - ids.shape[1]), value=self.pad_id)
        return ids, torch.full_like(lengths, self.context_length)

    def tokens_encoded(self, length: float) -> float:
        """With attended padding, always all."""
        return length if self.padding == "masked" else self.context_length

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token and position added."""
        return self.token_embedding(ids) + F.embedding(positions, self.positional_embedding)

    def finish(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.final_norm(x)
