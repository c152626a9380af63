"""Samples of shards, in the order of the shards and of their tars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clip_train.data import columns
from clip_train.data.cache import Cache
from clip_train.data.decode import Pixels, decode
from clip_train.data.files import ShardFiles
from clip_train.data.shards import ShardIndex, index, resolve

PICTURE = "jpg;jpeg;png;webp"


class Shards:
    """A `Collection`.

    Args:
        indexes: `[index(shard) for shard in resolve(patterns)]`.
        image, label, caption: columns (see `clip_train.data.columns`).
        patterns: what the shards were asked for by.
    """

    classes = None

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        *,
        image: str = PICTURE,
        label: str | None = None,
        caption: str | None = None,
        patterns: Sequence[str] = (),
    ) -> None:
        self.indexes, self.patterns, self.column = indexes, patterns, image
        self.parts = [one.shard for one in indexes]
        self._ends = np.cumsum([len(one) for one in indexes])
        self._names = {"label": label, "caption": caption}
        self._image = columns.parse(image)
        self._label = columns.parse(label) if label else ()
        self._caption = columns.parse(caption) if caption else ()
        self._files = ShardFiles()

    @classmethod
    def of(
        cls,
        shards: str | Sequence[str],
        *,
        image: str = PICTURE,
        label: str | None = None,
        caption: str | None = None,
        relative_to: Path | None = None,
        cache: Cache | None = None,
    ) -> Shards:
        """Resolve and index shards. Raises DataError where there are none."""
        patterns = [shards] if isinstance(shards, str) else list(shards)
        indexes = [index(shard, cache) for shard in resolve(patterns, relative_to)]
        return cls(indexes, image=image, label=label, caption=caption, patterns=patterns)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def part(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number, side="right"))

    def key(self, number: int) -> str:
        one, sample = self._place(number)
        return one.key(sample)

    def pixels(self, number: int) -> Pixels:
        return decode(columns.read(self._files, *self._place(number), self._image)[1])

    def label(self, number: int) -> int | str:
        return columns.read_label(*columns.read(self._files, *self._place(number), self._label))

    def captions(self, number: int) -> list[str]:
        return columns.read_captions(*columns.read(self._files, *self._place(number), self._caption))

    def check(self, *, label: bool, captions: bool) -> None:
        for one in self.indexes:
            columns.check_columns(
                one,
                image=self.column,
                caption=self._names["caption"] if captions else None,
                label=self._names["label"] if label else None,
            )

    def _place(self, number: int) -> tuple[ShardIndex, int]:
        part = self.part(number)
        one = self.indexes[part]
        return one, number - (int(self._ends[part]) - len(one))
