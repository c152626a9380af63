"""LAMB (You et al. 2020, "Large batch optimization for deep learning", algorithm 2): Adam's step at a tensor's scale.

The step of a tensor is as long as `lr` times the tensor, however large its gradients: what lets batches and learning
rates grow together. Gains, biases and other tensors without weight decay take Adam's step as it is, as in the
authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clip_train.training import foreach


class Lamb(torch.optim.Optimizer):
    """`u = m^ / (sqrt(v^) + eps) + weight_decay x`, then `x <- x - lr |x| / |u| u`; ratio 1 where a norm is 0."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            updates = self._adam(group, parameters)
            if group["weight_decay"]:
                foreach.add_(updates, parameters, alpha=group["weight_decay"])
                lengths, moves = (torch.stack(foreach.norm(tensors)) for tensors in (parameters, updates))
                ratios = torch.where((lengths > 0) & (moves > 0), lengths / moves, 1.0)
                foreach.mul_(updates, ratios.unbind())
            foreach.add_(parameters, updates, alpha=-group["lr"])

    def _adam(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """Adam's step for each parameter, bias corrected."""
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["step"] = torch.zeros((), dtype=torch.float32)  # on the host, where the corrections are computed
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        foreach.lerp_(means, gradients, 1 - beta1)
        foreach.mul_(squares, beta2)
        foreach.addcmul_(squares, gradients, gradients, 1 - beta2)
        for state in states:
            state["step"] += 1
        steps = [int(state["step"]) for state in states]
        roots = foreach.div(squares, [1 - beta2**step for step in steps])
        foreach.sqrt_(roots)
        foreach.add_(roots, group["eps"])
        updates = foreach.div(means, [1 - beta1**step for step in steps])
        foreach.div_(updates, roots)
        return updates
