"""Smaller pictures and shorter captions first: which size a step is trained at, a pure function of its number.

Most of a model's accuracy can be had at a fraction of the pixels and tokens, the rest in a short last stage at full
size: RECLIP (Li, Kim et al. 2023) for pictures, CLIPA (Li, Wang and Xie 2023) for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clip_train.data.batch import Tokenizer


@dataclass(frozen=True)
class Stage:
    """The sizes of the steps before `until_step`."""

    until_step: int
    image_size: int | None
    """Pixels of a side; None in a run without pictures."""
    context_length: int
    """Longest caption in tokens, SOT and EOT included."""


def stage_at(stages: Sequence[Stage], step: int) -> Stage | None:
    """The stage of the update after `step` updates; None when all have passed, at full size."""
    return next((stage for stage in stages if step < stage.until_step), None)


@dataclass(frozen=True)
class Shortened:
    """A tokenizer with a smaller cap: what is longer keeps its first tokens and its last, EOT."""

    tokenizer: Tokenizer
    context_length: int

    def encode_counting_cuts(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        """Texts -> the concatenated ids of all, the number of ids of each, and how many were cut."""
        ids, lengths, cut = self.tokenizer.encode_counting_cuts(texts)
        if self.context_length < int(lengths.max()):  # else both caps are the same
            cut = int((lengths > self.context_length).sum())
        counts = lengths.astype(np.int64)
        place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        last = place == np.repeat(counts - 1, counts)
        kept = (place < self.context_length - 1) | last
        return ids[kept], np.minimum(lengths, np.int32(self.context_length)), cut
