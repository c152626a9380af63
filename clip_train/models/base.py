"""What every tower is and gives.

Shapes: `B` batch, `L` tokens, `W` width of the tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

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
    """Whether CLIP's projection behind this tower has a bias (behind the ModifiedResNet and SigLIP's text tower)."""
    projection: bool = True
    """Whether there is a projection behind this tower; without one its width is the joint space's."""

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone.

        As in the paper (section 2.5) decay acts on "all weights that are not gains or biases": these are
        the one-dimensional parameters, a class embedding among them. Token and position embeddings decay.
        """
        return {name for name, parameter in self.named_parameters() if parameter.ndim < 2}


class Model(nn.Module):
    """Base of what is trained: towers, and what joins them or stands on them.

    All that wrapping, optimizers and the loop read; none of them knows which model it is.
    """

    reads_every_token: bool = False
    """Whether training reads all tokens of a tower, not its pooled vector alone."""

    @property
    def towers(self) -> Mapping[str, Tower]:
        """By the name of the attribute that holds each."""
        raise NotImplementedError

    @property
    def target_flops(self) -> float:
        """FLOPs, forward, of what stands on a tower, for each token that is to be told."""
        return 0.0

    def after_update_(self) -> None:
        """What must hold of the weights after every update."""

    def train(self, mode: bool = True) -> Self:
        """As torch's, but a BatchNorm whose gains are locked keeps normalising by its running statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and _is_locked(module):  # pyright: ignore[reportPrivateUsage]
                module.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: what the towers say, and vectors everywhere."""
        names = {f"{prefix}.{name}" for prefix, tower in self.towers.items() for name in tower.no_weight_decay()}
        return names | {name for name, parameter in self.named_parameters() if parameter.ndim < 2}

    def lookup_tables(self) -> set[str]:
        """Names of the tables whose rows are looked up or added: of tokens, positions and distances."""
        looked_up = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        return looked_up | {name for name, _ in self.named_parameters() if name.endswith("positional_embedding")}


def _is_locked(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
