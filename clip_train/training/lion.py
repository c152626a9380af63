"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2): the sign of a momentum.

One moment instead of AdamW's two. Every entry moves by the learning rate, so take 3-10 times less of it than with AdamW
and as much more weight decay (section 5 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clip_train.training import foreach


class Lion(torch.optim.Optimizer):
    """`x <- x - lr (sign(beta1 m + (1 - beta1) g) + weight_decay x)`, then `m <- beta2 m + (1 - beta2) g`."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            beta1, beta2 = group["betas"]
            weights = foreach.local(parameters)
            gradients = foreach.local([parameter.grad for parameter in parameters if parameter.grad is not None])
            averages = foreach.local([self.state[parameter]["exp_avg"] for parameter in parameters])
            directions = foreach.lerp(averages, gradients, 1 - beta1)
            foreach.sign_(directions)
            foreach.mul_(weights, 1 - group["lr"] * group["weight_decay"])
            foreach.add_(weights, directions, alpha=-group["lr"])
            foreach.lerp_(averages, gradients, 1 - beta2)
