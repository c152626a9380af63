"""What an objective is given and gives.

Shapes: `b` rows of this process, `B` rows of all processes, `D` size of the joint space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def _itself(rows: Tensor) -> Tensor:
    return rows


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
    """Scalar, fp32: the mean over this process's rows. The mean over equal-sized processes is the loss of
    the global batch."""
    terms: dict[str, Tensor]
    """The parts that make up `total`, detached."""
    stats: dict[str, Tensor]
    """Other figures, detached."""
    rows: Tensor | None = None
    """`(b,)` fp32, detached: what each of this process's pairs adds to `total`, which is their mean. None where an
    objective cannot say."""


def at_least_fp32(values: Tensor) -> Tensor:
    """fp32, or fp64 where it is that already: logits in bf16 lose what the loss is made of."""
    return values if values.dtype == torch.float64 else values.float()
