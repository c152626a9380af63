"""Decoded pictures kept in memory, up to a number of bytes."""

from __future__ import annotations

from clip_train.data.decode import Pixels

Place = tuple[int, int, int]
"""Source, shard, sample."""


class DecodedPictures:
    """What is in stays in; once it is full, other pictures are decoded each time.

    So a set twice as large as the memory still spares half of the decoding. With eviction it would spare nothing: an
    epoch comes back to a picture only after all the others.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._kept: dict[Place, Pixels] = {}

    def get(self, place: Place) -> Pixels | None:
        return self._kept.get(place)

    def add(self, place: Place, pixels: Pixels) -> None:
        """Keep a picture, `(H, W, 3)` uint8, if there is room for it."""
        if place not in self._kept and self.bytes + pixels.nbytes <= self.max_bytes:
            self.bytes += pixels.nbytes
            self._kept[place] = pixels
