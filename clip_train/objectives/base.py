"""What an objective is given and gives.

Shapes: `b` rows of this process, `B` rows of all processes, `D` size of the joint space.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Unit features of this process's pairs and of everybody's. An objective sees no rank or world size.

    The rows of this process are rows `first_row .. first_row + b` of the `all_` tensors, which carry
    gradients.
    """

    image: Tensor
    """`(b, D)` fp32."""
    text: Tensor
    """`(b, D)` fp32."""
    all_image: Tensor
    """`(B, D)` fp32."""
    all_text: Tensor
    """`(B, D)` fp32."""
    first_row: int = 0
    groups: Tensor | None = None
    """`(b,)` int64, equal where the captions are equal; only for objectives that ask for it."""
    all_groups: Tensor | None = None
    """`(B,)` int64."""

    @staticmethod
    def local(image: Tensor, text: Tensor, groups: Tensor | None = None) -> Features:
        """The features of a single process, which is all of them."""
        return Features(image, text, image, text, 0, groups, groups)


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
