"""The exponential moving average of the weights (Polyak & Juditsky 1992), kept beside them and evaluated for them.

After update t it moves by `1 - min(decay, (1 + t) / (10 + t))` towards the weights: the share of early, bad weights
vanishes whatever the decay. It is a function of the weights and the step, so that a resumed run has the same one to
the bit. Buffers (BatchNorm's statistics) are not averaged: they are averages themselves, and the average is evaluated
with those of the model.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clip_train.training import foreach

PREFIX = "ema/"
"""Of its tensors in a checkpoint, where they lie beside the optimizer's: `ema/image.blocks.0...`."""


class WeightAverage:
    """An average of all parameters of `model`, in their dtype; of a sharded one, this process's part.

    Costs one copy of the weights. `model` may not be wrapped or sharded again afterwards.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        with torch.no_grad():
            self.tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the update that makes `step` of them."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = self._aligned()
        foreach.lerp_(averages, weights, 1 - decay)

    @contextmanager
    def in_place_of_weights(self) -> Generator[None]:
        """Inside, the model computes with the average; afterwards its weights are what they were, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def named_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        return {PREFIX + name: tensor for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `named_state`. Raises KeyError for a parameter whose average is not there."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[PREFIX + name])

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._aligned(), strict=True):  # one by one: memory for one tensor, not the model
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _aligned(self) -> tuple[list[Tensor], list[Tensor]]:
        named = dict(self.model.named_parameters())
        return foreach.local(list(self.tensors.values())), foreach.local([named[name] for name in self.tensors])
