"""Muon for hidden matrices, AdamW for the rest, as one optimizer with one learning rate.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest semi-orthogonal matrix, found by a few
Newton-Schulz iterations: all its directions move by the same amount. Scaled by `0.2 sqrt(max(rows, columns))` (Liu
et al. 2025, "Muon is scalable for LLM training", equation 4) an update has the root mean square of AdamW's, so that the
learning rate and weight decay mean the same for both.

Shape legend: `r` the shorter side of a matrix, `k` the longer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from clip_train.runtime.process import has_bf16_products
from clip_train.training import foreach

# Quintics a x + b x^3 + c x^5, one an iteration, each the best for the interval its predecessor leaves: the greedy
# minimax choice of Polar Express (Amsel et al. 2025, "The Polar Express", algorithm 1) for singular values in
# [0.005, 1], with its cushion (0.05) and its safety factor (1.01), without which rounding pushes values over the edge
# where a quintic soars. They take the interval to [0.887, 1.096]; five of Jordan's one quintic to [0.68, 1.15].
POLAR_EXPRESS = (
    (7.872586, -20.973798, 14.860238),
    (3.786438, -2.625242, 0.484057),
    (3.194363, -2.348327, 0.477864),
    (2.226468, -1.601510, 0.411554),
)


@dataclass(frozen=True)
class Share:
    """Each of `world` processes orthogonalises its part of the matrices, and all learn of all.

    For processes that hold the same gradients: without it every one repeats the work of the others.
    """

    rank: int
    world: int
    add_up: Callable[[Tensor], Any]
    """Replace a tensor by its sum over processes, in place."""


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `orthogonalize=True` are updated by Muon, the others by fused AdamW. Uses gradients up.

    Args:
        groups: parameter groups, each with `params`, `weight_decay` and `orthogonalize`. A tensor of more than two
            dimensions (a convolution) is orthogonalised as the matrix (first dimension, all others).
        momentum: of Muon, in Nesterov's form.
        share: how to divide the work among processes that hold the same gradients.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
        share: Share | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum})
        self.share = share

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            if with_gradient:
                (self._muon if group["orthogonalize"] else self._adamw)(group, with_gradient)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        averages = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        foreach.lerp_(averages, gradients, 1 - group["momentum"])
        foreach.lerp_(gradients, averages, group["momentum"])  # Nesterov's look ahead
        updates = [as_matrix(parameter, gradient) for parameter, gradient in zip(parameters, gradients, strict=True)]
        foreach.mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for parameter, update in zip(parameters, orthogonalize_all(updates, self.share), strict=True):
            scale = 0.2 * max(update.shape) ** 0.5
            as_matrix(parameter, parameter).add_(update, alpha=-group["lr"] * scale)

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


def as_matrix(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, shaped like `parameter`, as (first dimension, all others); a view where it lies as `parameter` does.

    Columns come in the order in which the parameter is stored: another order would only permute the update's.
    """
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    else:
        assert parameter.is_contiguous()
    return tensor.flatten(1)


def orthogonalize_all(matrices: Sequence[Tensor], share: Share | None = None) -> list[Tensor]:
    """`orthogonalize` for each of many matrices, divided among processes where `share` says how."""
    mine = range(len(matrices)) if share is None else deal(matrices, share.world)[share.rank]
    found = dict(zip(mine, _orthogonalize_here([matrices[index] for index in mine]), strict=True))
    if share is None:
        return [found[index] for index in range(len(matrices))]
    # A sum in which all but one process have zeros: exact, and one call whatever the sizes.
    everything = matrices[0].new_zeros(
        sum(matrix.numel() for matrix in matrices), dtype=product_dtype(matrices[0].device)
    )
    parts = everything.split([matrix.numel() for matrix in matrices])
    for index, matrix in found.items():
        parts[index].copy_(matrix.flatten())
    share.add_up(everything)
    return [part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]


def deal(matrices: Sequence[Tensor], world: int) -> list[list[int]]:
    """Indices for each process: the costliest first, each to the process that has least to do."""
    cost = [matrix.numel() * min(matrix.shape) for matrix in matrices]
    hands: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for index in sorted(range(len(matrices)), key=lambda index: -cost[index]):
        lightest = load.index(min(load))
        hands[lightest].append(index)
        load[lightest] += cost[index]
    return hands


def _orthogonalize_here(matrices: Sequence[Tensor]) -> list[Tensor]:
    """One by one on CPU, where bf16 products of stacks are slow; elsewhere those of one shape together."""
    if not matrices or matrices[0].device.type == "cpu":
        return [orthogonalize(matrix) for matrix in matrices]
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(index)
    found: dict[int, Tensor] = {}
    for indices in by_shape.values():
        found |= zip(indices, orthogonalize(torch.stack([matrices[index] for index in indices])), strict=True)
    return [found[index] for index in range(len(matrices))]


def orthogonalize(matrices: Tensor) -> Tensor:
    """([N,] rows, columns) -> of the same singular vectors, singular values near 1, in `product_dtype`.

    Newton-Schulz: X <- P X with P = a + b G + c G^2 and the Gram matrix G = X X' of the short side. An iteration may
    also stay in Gram space, G <- P G P and Q <- P Q, so that X <- Q X comes once for several of them (Zhang, Amsel,
    Chen and Dao, "Gram Newton-Schulz"): with k much larger than r that is a fraction of the work. But rounding makes
    small eigenvalues of a bf16 G negative, and Gram space multiplies them by a^2 an iteration. So the first, of by far
    the largest `a`, always acts on X at once; with three behind it a direction overshoots by half at worst (measured),
    and by 12 % otherwise.
    """
    add_product = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    tall = matrices.shape[-2] > matrices.shape[-1]
    r, k = sorted(matrices.shape[-2:])
    x = matrices.to(product_dtype(matrices.device))
    coefficients = iter(POLAR_EXPRESS)
    for number, together in enumerate((1, 3) if k > 4 * r else (1, 1, 2) if k >= 2 * r else (1, 1, 1, 1)):
        gram = gram_matrix(x.mT if tall else x)
        factor: Tensor | None = None
        if number == 0:
            # No singular value exceeds |G|^1/2, which is mostly half of |X|: small ones start twice as high.
            peak = gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1)[..., None, None].float().clamp_(min=1e-37)
            bound = 1.01 * peak * torch.linalg.matrix_norm(gram / peak, keepdim=True).clamp_(min=1.0)
            gram = (gram / bound).to(gram.dtype)
            factor = bound.rsqrt().to(gram.dtype)
        for left in reversed(range(together)):
            a, b, c = next(coefficients)
            p = add_product(gram, gram, gram, beta=b, alpha=c)
            p.diagonal(dim1=-2, dim2=-1).add_(a)
            if left:
                gram = (p @ gram) @ p
            factor = p if factor is None else p * factor if number == 0 else p @ factor
        assert factor is not None
        x = x @ factor.mT if tall else factor @ x
    return x


def product_dtype(device: torch.device) -> torch.dtype:
    """bf16, which is precise enough; fp32 on CPUs that have no bf16 products of their own."""
    return torch.float32 if device.type == "cpu" and not has_bf16_products() else torch.bfloat16


def gram_matrix(x: Tensor) -> Tensor:
    """(..., r, k) -> X X' (..., r, r). A large one on CPU by strips, for its lower half is its upper one."""
    rows, strip = x.shape[-2], 128
    if x.device.type != "cpu" or x.ndim > 2 or rows < 2 * strip:
        return x @ x.mT
    gram = x.new_empty(rows, rows)
    for start in range(0, rows, strip):
        end = start + strip
        torch.mm(x[start:end], x[start:].mT, out=gram[start:end, start:])
        gram[start:end, :start] = gram[:start, start:end].mT
    return gram
