"""What the loader hands to the trainer: uint8 pictures, captions as ids without padding, their origin."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Tokenizer(Protocol):
    """What the stream needs of a tokenizer."""

    def encode_counting_cuts(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        """Texts -> the concatenated ids of all, SOT and EOT included, the number of ids of each, and how many texts
        were cut at the longest length.
        """
        ...


class BadSample(NamedTuple):
    """A sample that could not be used."""

    shard: str
    key: str
    cause: str


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch. `b` rows, `T` ids in all."""

    images: Tensor | None
    """(b, 3, S, S) uint8; None in a run without pictures."""
    ids: Tensor
    """(T,) int32, the captions' ids one after another."""
    lengths: Tensor
    """(b,) int32, ids of each caption."""
    groups: Tensor
    """(b,) int64, equal where the captions are equal but for case and white space."""
    rows: Tensor
    """(b,) int64, row of each sample in the global batch."""
    keys: list[str]
    sources: list[str]
    """Name of each sample's source."""
    skipped: list[BadSample]
    """Samples that could not be used and were replaced."""
    captions_cut: int = 0
    """Captions of these rows that were longer than the tokenizer's cap."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pictures(self) -> Tensor:
        """`images` of a run that has them."""
        assert self.images is not None
        return self.images

    def padded_ids(self, pad: int) -> Tensor:
        """(b, longest) int64, filled up with `pad`."""
        longest = int(self.lengths.max())
        padded = self.ids.new_full((len(self), longest), pad, dtype=torch.int64)
        valid = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        padded[valid] = self.ids.long()
        return padded

    def digest_part(self) -> int:
        """This rank's part of the global batch's digest: the ranks' parts add up (modulo 2**63) to the whole.

        A function of which key is in which row, so equal digests mean equal samples in equal order.
        """
        return digest(self.rows.tolist(), self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """This batch with its tensors on a device."""
        return replace(self, **{n: t.to(device, non_blocking=non_blocking) for n, t in self.tensors().items()})

    def pin_memory(self, device: Any = None) -> Batch:
        """This batch in page-locked memory (called by torch's DataLoader)."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def digest(rows: Iterable[int], keys: Iterable[str]) -> int:
    """Sum over samples of blake2b-64(row, 0 byte, key), modulo 2**63."""
    total = 0
    for row, key in zip(rows, keys, strict=True):
        line = f"{row}\0{key}".encode("utf-8", "surrogateescape")
        total += int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
    return total % 2**63
