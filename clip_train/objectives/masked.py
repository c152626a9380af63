"""Masked language modelling (Devlin et al. 2019, section 3.1): tell hidden tokens from all the others.

Shapes: `b` texts of this process, `L` longest of them, `T` tokens that may be hidden, `M` words of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from clip_train.data.hashing import MASK, MASK_COUNT, MASK_ID, MASK_KIND, mix, uniform
from clip_train.objectives.base import Inputs
from clip_train.objectives.language import TokenLoss

_TO_MASK, _TO_OTHER = 0.8, 0.1
"""Of the chosen tokens, the share that becomes MASK and the share that becomes any other; the rest stays."""


@dataclass(frozen=True, eq=False)
class MaskedLM(TokenLoss):
    """`rate` of a text's tokens are chosen, one at least; 80 % of them become MASK, 10 % a random token, 10 % stay.

    The number chosen is `rate` times the number of tokens, rounded up or down at random so that its mean is right.

    Args:
        vocab_size, mask_id: of the vocabulary.
        special_ids: are never chosen and never put in place of another.
        word_ends: `(vocab_size,)` bool, which tokens end a word: whole words are then chosen, until they hold as many
            tokens. None chooses single tokens.
    """

    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]
    rate: float = 0.15
    word_ends: NDArray[np.bool_] | None = None

    @cached_property
    def _ordinary(self) -> NDArray[np.int64]:
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids)

    def prepare(self, inputs: Inputs, *, seed: int, step: int) -> Inputs:
        """Hide tokens; what they were are the targets. A text of specials alone has none.

        Raises:
            ValueError: the rows of the samples are not known.
        """
        if inputs.rows is None:
            raise ValueError("masking is drawn by the rows of the global batch: give them")
        ids, lengths = inputs.ids.numpy().copy(), inputs.lengths.numpy()
        hidable = (np.arange(ids.shape[1]) < lengths[:, None]) & ~np.isin(ids, self.special_ids)
        text, place = hidable.nonzero()
        rows = inputs.rows.numpy()
        chosen = self._chosen(text, place, ids[text, place], rows, seed, step)
        text, place = text[chosen], place[chosen]
        targets = np.full_like(ids, -1)
        targets[text, place] = ids[text, place]
        drawn = (step, rows[text], place)
        kind = uniform(seed, MASK_KIND, *drawn)
        other = self._ordinary[(mix(seed, MASK_ID, *drawn) % np.uint64(len(self._ordinary))).astype(np.int64)]
        stays = np.where(kind < _TO_MASK + _TO_OTHER, other, ids[text, place])
        ids[text, place] = np.where(kind < _TO_MASK, self.mask_id, stays)
        return replace(inputs, ids=torch.from_numpy(ids), targets=torch.from_numpy(targets))

    def _chosen(
        self,
        text: NDArray[np.int64],
        place: NDArray[np.int64],
        token: NDArray[np.int64],
        rows: NDArray[np.int64],
        seed: int,
        step: int,
    ) -> NDArray[np.bool_]:
        """`(T,)` which tokens are chosen: words in the order of their draws, as long as those before hold too few."""
        begins = np.ones(len(text), dtype=bool)
        if self.word_ends is not None:
            goes_on = (text[1:] == text[:-1]) & (place[1:] == place[:-1] + 1) & ~self.word_ends[token[:-1]]
            begins[1:] = ~goes_on
        word = begins.cumsum() - 1  # (T,)
        word_text, word_place = text[begins], place[begins]  # (M,)
        order = np.lexsort((mix(seed, MASK, step, rows[word_text], word_place), word_text))
        sizes = np.bincount(word, minlength=len(word_text))[order]
        tokens = np.bincount(text, minlength=len(rows))
        before = sizes.cumsum() - sizes - (tokens.cumsum() - tokens)[word_text]  # words stay sorted by text
        wanted = np.maximum(1, np.floor(self.rate * tokens + uniform(seed, MASK_COUNT, step, rows))).astype(np.int64)
        taken = np.empty(len(word_text), dtype=bool)
        taken[order] = before < wanted[word_text]
        return taken[word]
