"""What all text towers share: lengths, no work for padding, pools.

Shapes: `B` batch, `L` longest text of the batch, `T` tokens of the batch without padding, `W` width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from clip_train.models.attention import Layout
from clip_train.models.base import Tower, TowerOutput
from clip_train.models.layers import Activation, to_compute_dtype
from clip_train.models.packing import Packing
from clip_train.models.pooling import POOLS, AttentionPool, Pool, pool_tokens, pooled_position


def refuse_first_of_causal(causal: bool, pool: Pool) -> None:
    """Raises ValueError for a causal tower that pools the first token."""
    if causal and pool == "cls":
        raise ValueError(
            "attention='causal' contradicts pool='cls': the first token sees only itself and is the same for every "
            "caption. Use pool='eot', 'last', 'mean', 'max' or 'map', or attention='bidirectional'."
        )


class TextTower(Tower):
    """Embeddings, blocks, a last norm, one vector a text.

    A text is SOT, its tokens, EOT; what follows its length is padding. No work is done for padding: all but the
    attention runs on the valid tokens laid end to end (`packing.py`).

    A subclass registers what lies before its blocks, its `blocks`, what lies behind them, and last `attention_pool`
    (`make_attention_pool`), in this order, which learning rates by layer go by; and gives `embed`, `finish` and, where
    attention knows positions, `attention_terms`. Its blocks are called as `block(x, layout)` and heed `layout.read`.

    Args:
        causal: each token sees itself and earlier ones only.
        pool: `eot` takes the first EOT (CLIP); `last` the last valid token, which is another only in texts with
            several EOTs; `cls` token 0, where SOT stands; `mean` and `max` go over the valid tokens; `map` attends to
            them with a learned query.
        eot_id: the id of EOT: where `eot` reads, and how `forward` finds lengths when it is given none. Without it
            each text must end with its only EOT.
        packed: `False` computes on the padded grid instead: the same result, in shapes that do not depend on
            the lengths, as graph export wants. Lengths are then not checked.

    Raises:
        ValueError: an unknown pool, or `causal` with `cls`: a first token that sees nothing but itself is the same
            for every text.
    """

    token_embedding: nn.Embedding
    """`(vocab_size, W)`; a language model's head is tied to its weight."""
    attention_pool: AttentionPool | None
    pool: Pool

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        *,
        causal: bool,
        pool: Pool,
        eot_id: int | None,
        packed: bool = True,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r} is unknown for text: choose one of {', '.join(POOLS)}")
        refuse_first_of_causal(causal, pool)
        self.vocab_size, self.context_length, self.width = vocab_size, context_length, width
        self.causal, self.pool, self.eot_id, self.packed = causal, pool, eot_id, packed

    def make_attention_pool(
        self, heads: int, mlp_ratio: float = 4.0, activation: Activation = "gelu"
    ) -> AttentionPool | None:
        """The module behind `map`, where that is the pool."""
        return AttentionPool(self.width, heads, mlp_ratio, activation) if self.pool == "map" else None

    def prepare(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What is encoded instead of `ids` `(B, L)` and `lengths` `(B,)`."""
        return ids, lengths

    def tokens_encoded(self, length: float) -> float:
        """Tokens that a text of `length` tokens costs."""
        return length

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids and their positions, both `(T,)`, or `(B, L)` and `(L,)` -> `(T, W)` or `(B, L, W)`."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """What lies behind the blocks; any shape `(..., W)`."""
        raise NotImplementedError

    def attention_terms(self, layout: Layout, length: int, device: torch.device) -> Layout:
        """`layout` with what attention adds for positions, over a grid `length` wide."""
        return layout

    def lengths_of(self, ids: Tensor) -> Tensor:
        """`(B,)` int64: tokens up to and with the first EOT of each row of `ids` `(B, L)`."""
        if self.eot_id is None:
            raise ValueError("give lengths, or construct the tower with eot_id so that it can find them")
        found = ids == self.eot_id
        if self.packed:  # an exported graph cannot branch on values
            missing = (~found.any(dim=1)).nonzero()
            if len(missing):
                raise ValueError(f"caption {int(missing[0])} has no EOT (id {self.eot_id})")
        return found.int().argmax(dim=1) + 1

    def forward(self, ids: Tensor, lengths: Tensor | None = None, *, pooled_only: bool = False) -> TowerOutput:
        """Encode texts.

        With `pooled_only`, and a pool that takes one token, the last block computes that token alone.

        Args:
            ids: `(B, L)` integers below `vocab_size`, `L` at most `context_length`; what lies beyond a
                text's length is never read.
            lengths: `(B,)` integers in `1..L`. Best kept on the CPU, where they cost an accelerator no
                synchronisation. Default: up to the first `eot_id`.

        Raises:
            ValueError: texts longer than `context_length`, or lengths out of range.
        """
        ids, lengths = self.prepare(ids, self.checked_lengths(ids, lengths))
        batch, length = ids.shape
        valid = torch.arange(length, device=ids.device) < lengths.to(ids.device, non_blocking=True)[:, None]
        packing = Packing.of(lengths, length, ids.device) if self.packed else None
        # Under a causal mask padding comes after every query that is read: nothing else need hide it.
        layout = Layout(self.causal, None if self.causal else valid, packing)
        layout = self.attention_terms(layout, length, ids.device)

        positions = torch.arange(length, device=ids.device)
        if packing is None:
            x = self.embed(ids, positions)
        else:
            x = self.embed(packing.pack(ids), packing.pack(positions.expand(batch, length)))
        x = to_compute_dtype(x)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, layout)
        if pooled_only and (self.pool == "eot" or self.pool == "last" or self.pool == "cls"):
            place = pooled_position(valid, ids, self.eot_id, self.pool)
            seen = valid & (positions <= place[:, None]) if self.causal else valid
            rows = _first_rows(lengths.to(ids.device, torch.int64, non_blocking=True), length, packing) + place
            layout = replace(layout, causal=False, valid=seen, read=rows, read_position=place)
            tokens = self.finish(last(x, layout))
            return TowerOutput(tokens, valid[:, :1], tokens[:, 0])
        x = self.finish(last(x, layout))
        tokens = x if packing is None else packing.unpack(x)
        return TowerOutput(tokens, valid, self.pooled(tokens, valid, ids))

    def checked_lengths(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        """The lengths `(B,)` of `ids` `(B, L)`, found where they are not given. Raises ValueError as `forward`."""
        batch, length = ids.shape
        if length > self.context_length:
            raise ValueError(f"captions of {length} tokens, this tower takes {self.context_length} at most")
        if lengths is None:
            lengths = self.lengths_of(ids)
        if lengths.shape != (batch,):
            raise ValueError(f"lengths are {tuple(lengths.shape)} for a batch of {batch} captions")
        return lengths

    def pooled(self, tokens: Tensor, valid: Tensor, ids: Tensor) -> Tensor:
        """`(B, L, W)`, `(B, L)`, `(B, L)` -> `(B, W)`, by the tower's own pool."""
        if self.attention_pool is not None:
            return self.attention_pool(tokens, valid)
        assert self.pool != "map"
        return pool_tokens(tokens, valid, ids, self.eot_id, self.pool)


def _first_rows(lengths: Tensor, length: int, packing: Packing | None) -> Tensor:
    """`(B,)` the row of each text's token 0 among all rows of the batch, in a grid or packed."""
    if packing is None or packing.rows is None:
        return torch.arange(len(lengths), device=lengths.device) * length
    return lengths.cumsum(0) - lengths
