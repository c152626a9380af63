"""Muon for hidden matrices, AdamW for the rest, as one optimizer with one learning rate.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest semi-orthogonal matrix, found by a few
Newton-Schulz iterations: all its directions move by the same amount. Scaled by `0.2 sqrt(max(rows, columns))` (Liu
et al. 2025, "Muon is scalable for LLM training", equation 4) an update has the root mean square of AdamW's, so that the
learning rate and weight decay mean the same for both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Coefficients of the quintic iteration (Jordan et al. 2024): singular values go to 1 +- 0.3, fast rather than exact.
QUINTIC = (3.4445, -4.7750, 2.0315)


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `orthogonalize=True` are updated by Muon, the others by fused AdamW.

    Args:
        groups: parameter groups, each with `params`, `weight_decay` and `orthogonalize`. A tensor of more than two
            dimensions (a convolution) is orthogonalised as the matrix (first dimension, all others).
        momentum: of Muon, in Nesterov's form.
        iterations: Newton-Schulz steps.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
        iterations: int = 5,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "iterations": iterations}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._muon if group["orthogonalize"] else self._adamw)(group, with_gradient)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        momentum = group["momentum"]
        # Matrices of one shape are orthogonalised together: small products one by one leave a GPU idle.
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            average: Tensor = state["momentum"].lerp_(parameter.grad, 1 - momentum)
            update = parameter.grad.lerp(average, momentum).flatten(1)
            by_shape[update.shape].append((parameter, update))
        for shape, members in by_shape.items():
            updates = orthogonalize(torch.stack([update for _, update in members]), group["iterations"])
            scale = 0.2 * max(shape) ** 0.5
            for (parameter, _), update in zip(members, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape).to(parameter.dtype), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(N, rows, columns) -> matrices of the same singular vectors with singular values near 1, in bf16.

    Newton-Schulz: X <- a X + (b X X' + c (X X')^2) X, on the short side.
    """
    a, b, c = QUINTIC
    if matrices.device.type == "cpu" and len(matrices) > 1:  # one by one: bf16 products of stacks are slow there
        return torch.cat([orthogonalize(one, iterations) for one in matrices.split(1)])
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT.contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if len(x) == 1:
        x = x[0]
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).reshape(matrices.shape)
