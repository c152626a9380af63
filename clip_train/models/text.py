"""CLIP's text transformer (Radford et al. 2021, section 2.4) and its bidirectional twin.

Shapes: `B` batch, `L` longest caption of the batch, `T` tokens of the batch without padding, `W` width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.base import Tower, TowerOutput
from clip_train.models.layers import Activation, Block, LayerNorm, Layout, init_blocks_, to_compute_dtype
from clip_train.models.packing import Packing
from clip_train.models.pooling import AttentionPool, Pool, mean_of_valid


class TextTransformer(Tower):
    """Token and position embeddings, pre-norm blocks, a final norm, one vector a caption.

    A caption is SOT, its tokens, EOT; what follows EOT is padding. No work is done for padding: all but the
    attention runs on the valid tokens laid end to end (`packing.py`).

    Args:
        attention: `causal` (CLIP) or `bidirectional` (padding is masked).
        pool: `eot` takes the last valid token (CLIP); `cls` takes token 0, where SOT stands; `mean` averages
            the valid tokens; `map` attends to them with a learned query.
        eot_id: the id of EOT, needed only to find lengths when `forward` is not given them.
        packed: `False` computes on the padded grid instead: the same result, in shapes that do not depend on
            the lengths, as graph export wants. Lengths are then not checked.

    Raises:
        ValueError: sizes that do not divide, an unknown choice, or `causal` with `cls`: a first token that
            sees nothing but itself is the same for every caption.
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
        super().__init__()
        if attention not in ("causal", "bidirectional"):
            raise ValueError(f"attention={attention!r} is unknown: choose 'causal' or 'bidirectional'")
        if pool not in ("eot", "cls", "mean", "map"):
            raise ValueError(f"pool={pool!r} is unknown for text: choose 'eot', 'cls', 'mean' or 'map'")
        if attention == "causal" and pool == "cls":
            raise ValueError(
                "attention='causal' contradicts pool='cls': the first token sees only itself and is the same "
                "for every caption. Use pool='eot', 'mean' or 'map', or attention='bidirectional'."
            )
        self.vocab_size, self.context_length = vocab_size, context_length
        self.width, self.attention, self.pool = width, attention, pool
        self.eot_id, self.packed = eot_id, packed
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, activation) for _ in range(layers))
        self.final_norm = LayerNorm(width)
        self.attention_pool = AttentionPool(width, heads, mlp_ratio, activation) if pool == "map" else None
        self.init_parameters()

    def init_parameters(self) -> None:
        """The paper's initialisation."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        init_blocks_(self.blocks)

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
        """Encode captions.

        With `pooled_only`, and a pool that takes one token, the last block computes that token alone.

        Args:
            ids: `(B, L)` integers below `vocab_size`, `L` at most `context_length`; what lies beyond a
                caption's length is never read.
            lengths: `(B,)` integers in `1..L`. Best kept on the CPU, where they cost an accelerator no
                synchronisation. Default: up to the first `eot_id`.

        Raises:
            ValueError: captions longer than `context_length`, or lengths out of range.
        """
        batch, length = ids.shape
        if length > self.context_length:
            raise ValueError(f"captions of {length} tokens, this tower takes {self.context_length} at most")
        if lengths is None:
            lengths = self.lengths_of(ids)
        if lengths.shape != (batch,):
            raise ValueError(f"lengths are {tuple(lengths.shape)} for a batch of {batch} captions")
        valid = torch.arange(length, device=ids.device) < lengths.to(ids.device, non_blocking=True)[:, None]
        causal = self.attention == "causal"
        packing = Packing.of(lengths, length, ids.device) if self.packed else None
        # Under a causal mask padding comes after every query that is read: nothing else need hide it.
        layout = Layout(causal, None if causal else valid, packing)

        position = self.positional_embedding[:length]
        if packing is None:
            x = self.token_embedding(ids) + position
        else:
            positions = torch.arange(length, device=ids.device).expand(batch, length)
            x = self.token_embedding(packing.pack(ids)) + F.embedding(packing.pack(positions), position)
        x = to_compute_dtype(x)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, layout)
        if pooled_only and self.pool in ("eot", "cls"):
            # A token at the end sees every valid one, and so does every token without a causal mask.
            read = self._row_read(lengths.to(ids.device, torch.int64, non_blocking=True), length, packing)
            tokens = self.final_norm(last(x, Layout(valid=valid, packing=packing, read=read)))
            return TowerOutput(tokens, valid[:, :1], tokens[:, 0])
        x = self.final_norm(last(x, layout))
        tokens = x if packing is None else packing.unpack(x)
        return TowerOutput(tokens, valid, self._pool(tokens, valid, lengths))

    def _row_read(self, lengths: Tensor, length: int, packing: Packing | None) -> Tensor:
        """`(B,)` the row of each caption's pooled token among all rows of the batch, in a grid or packed."""
        if packing is None or packing.rows is None:
            first = torch.arange(len(lengths), device=lengths.device) * length
        else:
            first = lengths.cumsum(0) - lengths
        return first if self.pool == "cls" else first + lengths - 1

    def _pool(self, tokens: Tensor, valid: Tensor, lengths: Tensor) -> Tensor:
        if self.attention_pool is not None:
            return self.attention_pool(tokens, valid)
        if self.pool == "mean":
            return mean_of_valid(tokens, valid)
        if self.pool == "cls":
            return tokens[:, 0]
        last = lengths.to(tokens.device, torch.int64, non_blocking=True) - 1
        return tokens[torch.arange(len(tokens), device=tokens.device), last]
