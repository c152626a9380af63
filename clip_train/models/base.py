"""What every tower is and gives.

Shapes: `B` batch, `L` tokens, `W` width of the tower.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class TowerOutput:
    """The encoding of a batch, before the projection into the joint space."""

    tokens: Tensor
    """`(B, L, W)` the encoded tokens; rows where `valid` is false hold no information. Where only `pooled` was asked
    for, those that it is made from: perhaps one."""
    valid: Tensor
    """`(B, L)` bool, which tokens are part of the input."""
    pooled: Tensor
    """`(B, W)` one vector a sample."""


class Tower(nn.Module):
    """Base of the towers. A subclass sets `width` and `blocks` and returns a `TowerOutput`.

    Its `forward` takes the inputs and `pooled_only`: the caller wants `pooled` alone, so that work which `pooled` does
    not depend on may be left out.
    """

    width: int
    """Size of `pooled`."""
    blocks: Iterable[nn.Module]
    """The residual blocks in order: all that parallel wrapping and compilation read."""
    projection_bias: bool = False
    """Whether CLIP's projection behind this tower has a bias (only behind the ModifiedResNet)."""

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone.

        As in the paper (section 2.5) decay acts on "all weights that are not gains or biases": these are
        the one-dimensional parameters, a class embedding among them. Token and position embeddings decay.
        """
        return {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
