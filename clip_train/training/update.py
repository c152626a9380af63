"""One step: loss of the global batch -> gradients -> clip -> check -> update.

Shape legend: `b` samples of this process, `B` of all processes, `D` joint width, `m` samples of a micro-batch.

A batch whose activations do not fit is cut into micro-batches. For a coupled objective that is *gradient caching* (Gao
et al. 2021): features of all micro-batches without activations, the loss over all of them, then each micro-batch again
with activations and its cached feature gradient. The loss sees every negative and the gradients are those of the whole
batch. The parts of a per-sample objective add up by themselves.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clip_train.objectives.base import Coupled, Features, Inputs, Loss, PerSample, at_least_fp32
from clip_train.runtime.collectives import first_row, gather_rows, max_of, sum_of
from clip_train.runtime.parallel import average_whole_gradients, clip_gradients, without_gradient_sync
from clip_train.runtime.process import Process
from clip_train.runtime.recompute import frozen_running_statistics
from clip_train.training.faults import running_statistics

Objective = Coupled | PerSample


@dataclass(frozen=True)
class StepResult:
    loss: Tensor
    """() this process's share of the loss; the mean over processes is the loss."""
    stats: dict[str, Tensor]
    """Figures whose mean over processes is logged; reading one waits for the device."""
    grad_norm: float
    """Norm of the averaged gradient before clipping."""
    rows: Tensor | None
    """(b,) loss of each sample, where the objective tells."""
    applied: bool = True
    """Whether there was an update: not where the gradient is not finite, on all processes alike."""


def train_step(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    process: Process,
    *,
    step: int,
    seed: int,
    lr: float,
    micro_batch: int | None,
    gradient_clip: float | None,
) -> StepResult:
    """Update the model once, unless the gradient is not finite: then model and optimizer stay as they were."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    optimizer.zero_grad(set_to_none=True)
    moving = running_statistics(model)
    before = [buffer.clone() for buffer in moving]
    loss = backward(model, objective, inputs, process, step=step, seed=seed, micro_batch=micro_batch)

    scaler = process.scaler
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = clip_gradients(model, gradient_clip)
    applied = math.isfinite(norm)
    if scaler is not None:  # leaves non-finite updates out by itself and lowers its scale
        scaler.step(optimizer)
        scaler.update()
    elif applied:
        optimizer.step()
    if not applied:
        for buffer, value in zip(moving, before, strict=True):
            buffer.copy_(value)
    return StepResult(loss.total.detach(), loss.stats, norm, loss.rows, applied)


def backward(
    model: nn.Module,
    objective: Objective,
    inputs: Inputs,
    process: Process,
    *,
    step: int,
    seed: int,
    micro_batch: int | None,
) -> Loss:
    """Accumulate the gradient of the global batch's loss; `inputs` are what the objective's `prepare` gave."""
    parts = inputs.split(micro_batch or len(inputs))
    if isinstance(objective, PerSample):
        loss = _sum_over_samples(model, objective, parts, process, step=step, seed=seed)
    elif len(parts) == 1:
        seed_everything(seed, step, process.rank, 0)
        with process.autocast():
            image, text, *scalars = model(inputs.images, inputs.ids, inputs.lengths)
        loss = with_scale(objective.loss(_features(image, text, inputs.groups), *scalars), scalars)
        scaled(telling(loss.total), process).backward()
    else:
        loss = _with_cached_gradients(model, objective, inputs, parts, process, step=step, seed=seed)
    average_whole_gradients(model)
    return loss


def _sum_over_samples(
    model: nn.Module, objective: PerSample, parts: list[Inputs], process: Process, *, step: int, seed: int
) -> Loss:
    """Each part's share of the loss, and its gradient, are what they are in the whole batch."""
    device = parts[0].ids.device
    counts = torch.tensor(float(sum(objective.count(part) for part in parts)), device=device)
    mean_count = (sum_of(counts) / process.world).clamp(min=1 / process.world)
    losses: list[Loss] = []
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        seed_everything(seed, step, process.rank, index)
        with nullcontext() if last else without_gradient_sync(model):
            with process.autocast():
                loss = objective.loss(model, part, mean_count)
            scaled(telling(loss.total), process).backward()
        losses.append(replace(loss, total=loss.total.detach()))
    rows = [loss.rows for loss in losses if loss.rows is not None]
    return Loss(
        total=torch.stack([loss.total for loss in losses]).sum(),
        terms={name: torch.stack([loss.terms[name] for loss in losses]).sum() for name in losses[0].terms},
        stats={name: torch.stack([loss.stats[name] for loss in losses]).sum() for name in losses[0].stats},
        rows=torch.cat(rows) if len(rows) == len(losses) else None,
    )


def _with_cached_gradients(
    model: nn.Module,
    objective: Coupled,
    inputs: Inputs,
    parts: list[Inputs],
    process: Process,
    *,
    step: int,
    seed: int,
) -> Loss:
    images: list[Tensor] = []
    texts: list[Tensor] = []
    scalars: list[Tensor] = []
    with torch.no_grad(), frozen_running_statistics(model):
        for index, part in enumerate(parts):
            seed_everything(seed, step, process.rank, index)
            with process.autocast():
                image, text, *scalars = model(part.images, part.ids, part.lengths)
            images.append(image)
            texts.append(text)

    leaves = [leaf.detach().requires_grad_() for leaf in (torch.cat(images), torch.cat(texts), *scalars)]
    loss = objective.loss(_features(leaves[0], leaves[1], inputs.groups), *leaves[2:])
    image_grad, text_grad, *scalar_grads = torch.autograd.grad(telling(loss.total), leaves)

    start = 0
    for index, part in enumerate(parts):
        rows, last = slice(start, start + len(part)), index == len(parts) - 1
        start += len(part)
        seed_everything(seed, step, process.rank, index)
        with nullcontext() if last else without_gradient_sync(model):
            with process.autocast():
                image, text, *scalars = model(part.images, part.ids, part.lengths)
            # Its gradient is the chain rule's: feature gradient times feature. The scalars enter the loss once.
            surrogate = (image * image_grad[rows]).sum() + (text * text_grad[rows]).sum()
            if last:
                surrogate = surrogate + sum(s * g for s, g in zip(scalars, scalar_grads, strict=True))
            scaled(surrogate, process).backward()
    return with_scale(loss, scalars)


def with_scale(loss: Loss, scalars: list[Tensor]) -> Loss:
    """With the logit scale that it used among the figures."""
    return replace(loss, stats=loss.stats | {"logit_scale": scalars[0].detach()})


def _features(image: Tensor, text: Tensor, groups: Tensor) -> Features:
    """Ours, with the ways to everybody's."""
    return Features(
        image=at_least_fp32(image),
        text=at_least_fp32(text),
        groups=groups,
        first_row=first_row(image),
        gather=gather_rows,
        sum_over_processes=sum_of,
        max_over_processes=max_of,
    )


def telling(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, neither is any of its gradient, so that every process learns of it there."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def scaled(loss: Tensor, process: Process) -> Tensor:
    """The loss times the fp16 scale, itself otherwise."""
    return loss if process.scaler is None else process.scaler.scale(loss)


def seed_everything(*parts: int) -> None:
    """Seed torch's generators by a function of `parts` alone, so that a replayed forward draws the same numbers."""
    seed = 0
    for part in parts:
        # splitmix64's finalizer: neighbouring steps and ranks get unrelated streams.
        seed = ((seed ^ part) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        seed ^= seed >> 31
    torch.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
