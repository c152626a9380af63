"""What an objective is given and gives. There are two kinds:

- *coupled*: its loss is a function of the features of the whole batch, as contrastive losses are (`Coupled`). The
  update gives it everybody's features and cuts a batch that does not fit by gradient caching;
- *per sample*: its loss is a sum over samples, as those of masked modelling and captioning are (`PerSample`). It may
  change its inputs first, and calls the model itself; a batch that does not fit is cut into parts that add up.

Shapes: `b` rows of this process, `B` rows of all processes, `D` size of the joint space, `L` longest text of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn


def _itself(rows: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True)
class Inputs:
    """This process's samples. What an objective adds (`targets`) is cut into micro-batches with the rest."""

    images: Tensor | None
    """(b, 3, H, W) normalised; None in a run without pictures."""
    ids: Tensor
    """(b, L) padded to the longest."""
    lengths: Tensor
    """(b,) on the host."""
    groups: Tensor
    """(b,) equal where captions are equal."""
    rows: Tensor | None = None
    """(b,) int64 on the host, the row of each sample in the global batch: what random choices are drawn by."""
    targets: Tensor | None = None
    """(b, L) int64 on the host, the id to be told at each token, -1 where none is."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def target_count(self) -> int:
        """Tokens that are to be told."""
        return 0 if self.targets is None else int((self.targets >= 0).sum())

    def split(self, size: int) -> list[Inputs]:
        """Micro-batches, each trimmed to its own longest caption."""

        def part(rows: slice) -> Inputs:
            longest = int(self.lengths[rows].max())
            return Inputs(
                images=None if self.images is None else self.images[rows],
                ids=self.ids[rows, :longest],
                lengths=self.lengths[rows],
                groups=self.groups[rows],
                rows=None if self.rows is None else self.rows[rows],
                targets=None if self.targets is None else self.targets[rows, :longest],
            )

        return [part(slice(start, start + size)) for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Inputs:
        """With what towers compute on on a device; what decides shapes stays on the host."""
        move = {"images": self.images, "ids": self.ids, "groups": self.groups}
        moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in move.items() if t is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class Features:
    """Unit features of this process's pairs, and the ways to everybody's. An objective sees no rank or world size.

    The rows of this process are rows `first_row .. first_row + b` of the `all_` tensors, which carry gradients and
    are gathered when they are first asked for: what an objective does not read is not sent. All processes must
    therefore ask for the same, in the same order.
    """

    image: Tensor
    """`(b, D)` fp32 (fp64 stays)."""
    text: Tensor
    """`(b, D)` fp32 (fp64 stays)."""
    groups: Tensor | None = None
    """`(b,)` int64, equal where the captions are equal; only for objectives that ask for it."""
    first_row: int = 0
    gather: Callable[[Tensor], Tensor] = _itself
    """`(b, ...)` of each process to `(B, ...)`, differentiable."""
    sum_over_processes: Callable[[Tensor], Tensor] = _itself
    """Elementwise; not differentiable."""
    max_over_processes: Callable[[Tensor], Tensor] = _itself
    """Elementwise; not differentiable."""

    @cached_property
    def all_image(self) -> Tensor:
        """`(B, D)`."""
        return self.gather(self.image)

    @cached_property
    def all_text(self) -> Tensor:
        """`(B, D)`."""
        return self.gather(self.text)

    @cached_property
    def all_groups(self) -> Tensor | None:
        """`(B,)` int64."""
        return None if self.groups is None else self.gather(self.groups)

    @staticmethod
    def local(image: Tensor, text: Tensor, groups: Tensor | None = None) -> Features:
        """The features of a single process, which is all of them."""
        return Features(image, text, groups)


@dataclass(frozen=True)
class Loss:
    """What is minimised, and figures to log."""

    total: Tensor
    """Scalar, fp32: this process's share. The mean over equal-sized processes is the loss of the global batch."""
    terms: dict[str, Tensor]
    """The parts that make up `total`, detached."""
    stats: dict[str, Tensor]
    """Other figures, detached; the mean over processes is logged."""
    rows: Tensor | None = None
    """`(b,)` fp32, detached: the loss of each of this process's samples. None where an objective cannot say."""


class Coupled(Protocol):
    """An objective over the features of the whole batch."""

    @property
    def loss(self) -> Callable[..., Loss]:
        """Of `Features` and what the model gives beside them: the logit scale, and the bias where it has one."""
        ...


class PerSample(ABC):
    """An objective that is a sum over samples, divided by a number that is known before the model runs."""

    @abstractmethod
    def prepare(self, inputs: Inputs, *, seed: int, step: int) -> Inputs:
        """The inputs as this objective wants them: masked, with targets. On the host.

        What is random is a function of the seed, the step and the sample's row in the global batch, so that neither
        the number of processes nor that of micro-batches changes it.
        """

    @abstractmethod
    def count(self, inputs: Inputs) -> int:
        """What these samples add to the number that the loss is divided by: their targets."""

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Inputs, count: Tensor) -> Loss:
        """The sum over these samples, divided by `count`, the mean of the processes' counts. One call of the model.

        `total` and `stats` of the parts of a batch are added up; `rows` stand one behind another.
        """


def at_least_fp32(values: Tensor) -> Tensor:
    """fp32, or fp64 where it is that already: logits in bf16 lose what the loss is made of."""
    return values if values.dtype == torch.float64 else values.float()
