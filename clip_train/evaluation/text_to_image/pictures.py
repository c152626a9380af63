"""Pictures with captions for the generator, and which of them it learns from.

Concepts, not pictures, are dealt out: all pictures that share a first caption are on the same side, so that neither the
generator nor anything that is fitted to it has seen the names of the `held` fold.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clip_train.data.collections.shards import Shards
from clip_train.data.samples import read_samples
from clip_train.data.shards import index, resolve
from clip_train.data.transforms import Preprocess
from clip_train.errors import DataError

Fold = Literal["train", "dev", "held"]
HELD, DEV = 0.10, 0.06
"""Shares of the concepts."""


@dataclass(frozen=True)
class Pictures:
    """`N` pictures of `S` x `S`."""

    images: Tensor
    """(N, 3, S, S) uint8."""
    captions: list[list[str]]
    """At least one each: the first is the name, the last says most."""
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, rows: list[int]) -> Pictures:
        """Some of them."""
        return Pictures(self.images[rows], [self.captions[row] for row in rows], [self.keys[row] for row in rows])

    def split(self) -> dict[Fold, Pictures]:
        """By the fold of their names."""
        rows: dict[Fold, list[int]] = {"train": [], "dev": [], "held": []}
        for row, captions in enumerate(self.captions):
            rows[fold(captions[0])].append(row)
        return {name: self.where(chosen) for name, chosen in rows.items()}


def read_pictures(
    shards: str | list[str],
    size: int,
    *,
    image: str = "jpg;jpeg;png;webp",
    caption: str = "json.captions",
    relative_to: Path | None = None,
) -> Pictures:
    """All pictures of some shards, in order, the whole picture squeezed into `size` x `size`.

    Raises:
        DataError: no shards, a column that is not there, a sample that cannot be read, or one without captions.
    """
    indexes = [index(shard) for shard in resolve(shards, relative_to)]
    view = Preprocess(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), interpolation="bilinear", resize="squash")
    images: list[Tensor] = []
    captions: list[list[str]] = []
    keys: list[str] = []
    for batch in read_samples(Shards(indexes, image=image, caption=caption), view, captions=True):
        images.append(batch.images)
        captions += batch.captions
        keys += batch.keys
    if not keys:
        raise DataError(f"{shards}: no pictures with captions")
    return Pictures(torch.cat(images), captions, keys)


def fold(name: str) -> Fold:
    """A function of the name alone (case and outer space aside), whatever the data around it."""
    part = share(name)
    return "held" if part < HELD else "dev" if part < HELD + DEV else "train"


def share(text: str) -> float:
    """A number in [0, 1) that a hash of the text gives."""
    digest = hashlib.sha256(text.strip().lower().encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def shifted(images: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to `by` pixels in both directions, its border repeated; the same shape, uint8."""
    padded = torch.nn.functional.pad(images.float(), (by,) * 4, mode="replicate").to(torch.uint8)
    size = images.shape[-1]
    moves = torch.randint(0, 2 * by + 1, (len(images), 2), generator=generator).tolist()
    parts = [one[:, top : top + size, left : left + size] for one, (top, left) in zip(padded, moves, strict=True)]
    return torch.stack(parts)
