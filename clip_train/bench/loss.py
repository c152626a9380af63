"""The tiled loss beside the dense one and open_clip's: forward and backward, time and peak memory.

Gradients are compared with open_clip's in float64 before anything is timed. Memory is what a process needs on top of
the features it was given, gradients of the features included: on a GPU what torch's allocator had out at most, on a CPU
how far the resident set of a fresh process grew at most.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from clip_train.bench.measure import Times, conclude, interleave, machine, median_ratio
from clip_train.errors import UserError
from clip_train.objectives.base import Features
from clip_train.objectives.contrastive import InfoNCE
from clip_train.objectives.sigmoid import Sigmoid
from clip_train.objectives.tiles import Impl
from clip_train.runtime.memory import keep_freed_memory

MiB = 2**20
Side = Literal["tiled", "dense", "open_clip"]
SCALE, BIAS = 1 / 0.07, -10.0
MOST_COMPARED = 8192
"""Pairs whose gradients are compared: float64 logits of more take long and much memory."""
TOLERANCE = 1e-5
"""Of a gradient, relative to its tensor's largest entry."""


def main(args: argparse.Namespace) -> int:
    """Compare gradients, time, weigh, print one table and the ratio."""
    console, device = Console(highlight=False), torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    case = Case(args.kind, args.batch, args.dim, str(device))
    sides: list[Side] = ["tiled", args.against] if args.alone else ["tiled", "dense", "open_clip"]
    with console.status("comparing gradients"):
        errors: dict[Side, float] = {side: gradient_error(case, side) for side in sides}
    if errors["tiled"] > TOLERANCE:
        raise UserError(f"the tiled loss's gradients are off by {errors['tiled']:.1e} of their largest entry")
    with console.status("measuring memory"):
        memory: dict[Side, float] = {side: peak_memory(case, side) for side in errors}
    fitting: list[Side] = [side for side in errors if math.isfinite(memory[side])]
    keep_freed_memory()  # as training does
    with console.status("timing"):
        inputs = case.inputs()
        runs: dict[str, Callable[[], object]] = {
            side: lambda side=side: gradients(case, side, inputs) for side in fitting
        }
        times = interleave(runs, rounds=args.rounds, device=device)

    table = Table(title=f"{args.kind}, {args.batch:,} pairs of {args.dim} dimensions, fp32, forward and backward")
    for column in ("", "ms", "peak MiB", "gradient error", "our time", "our memory"):
        table.add_column(column, justify="left" if not column else "right")
    for side in errors:
        if side in times:
            shown = f"{1000 * times[side].median:,.1f}", f"{memory[side] / MiB:,.0f}"
            shares = f"{1 / median_ratio(times[side], times['tiled']):.2f} ×", f"{memory['tiled'] / memory[side]:.3f} ×"
        else:
            shown, shares = ("–", "does not fit"), ("–", "–")
        table.add_row(side, *shown, f"{errors[side]:.1e}", *(("", "") if side == "tiled" else shares))
    console.print(table)
    console.print(
        f"{machine(device)}, {torch.get_num_threads()} threads; median of {args.rounds} rounds; gradients of "
        f"{min(args.batch, MOST_COMPARED):,} pairs against float64"
    )
    failed = not within_bars(args, times["tiled"], memory, console)
    ratio = median_ratio(times[args.against], times["tiled"]) if args.against in times else math.inf
    return int(bool(conclude(ratio, args.bar, console)) or failed)


def within_bars(args: argparse.Namespace, ours: Times, memory: dict[Side, float], console: Console) -> bool:
    """Whether memory and absolute time are as asked for; says what is not."""
    share, ms, mib = memory[args.against] / memory["tiled"], 1000 * ours.median, memory["tiled"] / MiB
    missed: list[str] = []
    if args.memory_bar is not None and share < args.memory_bar:
        missed.append(f"the peer needs {share:.1f} times our memory, below the bar of {args.memory_bar:.1f}")
    if args.most_ms is not None and ms > args.most_ms:
        missed.append(f"{ms:,.1f} ms, above the bar of {args.most_ms:,.1f}")
    if args.most_mib is not None and mib > args.most_mib:
        missed.append(f"{mib:,.0f} MiB, above the bar of {args.most_mib:,.0f}")
    for line in missed:
        console.print(line)
    return not missed


@dataclass(frozen=True)
class Case:
    """What is computed; small enough to be sent to another process."""

    kind: Literal["infonce", "sigmoid"]
    batch: int
    dim: int
    device: str

    def inputs(self, rows: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Leaves: image `(B, D)`, text `(B, D)`, scale, and the bias of the sigmoid loss. Captions are as near to
        their pictures, and as far from the others, as in a model in training: cosines of 0.3 and around 0."""
        generator = torch.Generator().manual_seed(0)
        image, noise = (torch.randn(self.batch, self.dim, generator=generator)[:rows] for _ in range(2))
        image, noise = F.normalize(image, dim=1), F.normalize(noise, dim=1)
        leaves = [image, F.normalize(image + 3 * noise, dim=1), torch.tensor(SCALE)]
        leaves += [torch.tensor(BIAS)] if self.kind == "sigmoid" else []
        return [leaf.to(self.device, dtype).requires_grad_() for leaf in leaves]


def gradients(case: Case, side: Side, leaves: list[Tensor]) -> list[Tensor]:
    """Forward and backward."""
    return list(torch.autograd.grad(loss(case, side, leaves), leaves))


def loss(case: Case, side: Side, leaves: list[Tensor]) -> Tensor:
    """One side's loss of the leaves."""
    if side == "open_clip":
        from open_clip.loss import ClipLoss, SigLipLoss

        return (SigLipLoss() if case.kind == "sigmoid" else ClipLoss())(*leaves)
    impl: Impl = side
    objective: Any = Sigmoid(impl=impl) if case.kind == "sigmoid" else InfoNCE(impl=impl)
    return objective.loss(Features.local(leaves[0], leaves[1]), *leaves[2:]).total


def gradient_error(case: Case, side: Side) -> float:
    """Largest difference from open_clip's gradients in float64, relative to each tensor's largest entry."""
    exact = gradients(case, "open_clip", case.inputs(MOST_COMPARED, torch.float64))
    found = gradients(case, side, case.inputs(MOST_COMPARED))
    return max(float((ours - truth).abs().max() / truth.abs().max()) for ours, truth in zip(found, exact, strict=True))


def peak_memory(case: Case, side: Side) -> float:
    """Bytes needed on top of the features, at most; infinite where they do not fit on the GPU."""
    if case.device == "cuda":
        return cuda_peak(case, side)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(resident_peak, case, side, torch.get_num_threads()).result()


def cuda_peak(case: Case, side: Side) -> float:
    leaves = case.inputs()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with suppress(torch.cuda.OutOfMemoryError):
        gradients(case, side, leaves)
        return torch.cuda.max_memory_allocated() - before
    return math.inf


def resident_peak(case: Case, side: Side, threads: int) -> float:
    """By Linux's account of this process, which should be a fresh one."""
    torch.set_num_threads(threads)
    few = [leaf[:256] if leaf.ndim else leaf for leaf in case.inputs()]
    gradients(case, side, few)  # libraries load and allocate what they keep
    leaves = case.inputs()
    del few
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is still resident would hide what the loss takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _status("VmRSS")
    gradients(case, side, leaves)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
