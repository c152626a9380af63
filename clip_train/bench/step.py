"""`clip-train bench step`: our training step beside open_clip's own loop, on the same batches, weights and precision.

Batches are decoded and tokenised beforehand, so that the step alone is timed: ours with captions trimmed (or padded
with `--pad`), open_clip's padded to the cap as its tokenizer gives them. Each side runs in a process of its own, in
turn, and before anything is timed their losses on the same batch are compared in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from clip_train.bench.measure import conclude, machine, median_ratio
from clip_train.bench.sides import (
    EMBEDDED,
    OpenClipSide,
    OurSide,
    in_arithmetic_of_this_machine,
    peer_inputs,
    with_adamw,
)
from clip_train.bench.worker import Worker, finish, interleave_workers, peak_memory, resident_bytes
from clip_train.config import load_recipe
from clip_train.config.load import set_values
from clip_train.config.schema import Recipe
from clip_train.data.batch import Batch
from clip_train.errors import UserError
from clip_train.evaluation.plots import LIGHT, png
from clip_train.from_recipe.data import build_stream
from clip_train.from_recipe.model import build_tokenizer, build_two_tower
from clip_train.models.flops import forward_flops
from clip_train.models.two_tower import TwoTower
from clip_train.runtime.process import launched
from clip_train.training.metrics import measured_peak_flops
from tokenizer import BPETokenizer

GIB = 2**30
LR = 1e-5


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    tokens: float
    samples_per_second: float
    seconds_per_step: float
    share_of_peak: float
    memory: int
    """Bytes, at most."""


def main(args: argparse.Namespace) -> int:
    """Compare, time, print one table and the ratio."""
    console = Console(highlight=False)
    recipe = load_recipe(args.recipe, [*args.overrides, *(EMBEDDED if args.embedded else [])])
    recipe = in_arithmetic_of_this_machine(recipe)
    if not args.own_optimizer:
        recipe = with_adamw(recipe)
    if args.compile:
        recipe = set_values(recipe, ["training.compile=true"])
    device = torch.device(args.device)
    with ExitStack() as stack:
        ours = stack.enter_context(Worker(our_side, recipe, args.steps, args.pad, device=args.device))
        theirs = stack.enter_context(Worker(open_clip_side, recipe, args.steps, args.device, device=args.device))
        with console.status("comparing losses"):
            ours.ready()
            theirs.ready()
            check_equal_losses(ours.call("loss"), theirs.call("loss"))
        with console.status("timing"):
            times = interleave_workers({"open_clip": theirs, "clip-train": ours}, rounds=args.rounds)
        memory = {"open_clip": theirs.call("memory"), "clip-train": ours.call("memory")}
        samples, captions = ours.call("samples"), ours.call("tokens")
    peak = measured_peak_flops(device, recipe.training.precision, seconds=1.0)
    tokenizer = build_tokenizer(recipe)
    with torch.device("meta"):
        model = build_two_tower(recipe, tokenizer)
    cap = float(tokenizer.context_length)
    rows: list[Row] = []
    for name, tokens in (("open_clip", cap), ("clip-train", cap if args.pad else captions / samples)):
        rate = samples / times[name].median
        # Each side's own work: open_clip computes every token of the last block too.
        flops = 3 * forward_flops(model, tokens, pooled_only=name == "clip-train", training=True).total
        row = Row(name, tokens, rate, times[name].median / args.steps, flops * rate / peak, memory[name])
        rows.append(row)
    title = f"training step, {recipe.name}, batch {recipe.data.batch_size}, {recipe.training.precision}"
    title += ", compiled" if recipe.training.compile else ""
    note = f"{machine(device)}; measured peak {peak / 1e12:.2f} TFLOP/s; median of {args.rounds} rounds"
    console.print(table(rows, title, device))
    console.print(note)
    ratio = median_ratio(times["open_clip"], times["clip-train"])
    if args.png:
        args.png.write_bytes(png(chart(rows, title, note, ratio), LIGHT))
    return conclude(ratio, args.bar, console)


def check_equal_losses(ours: float, theirs: float) -> None:
    """Both sides compute the same plain InfoNCE in fp32, or there is nothing to compare."""
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise UserError(f"the two losses differ before any training: ours {ours:.6f}, open_clip's {theirs:.6f}")


def table(rows: list[Row], title: str, device: torch.device) -> Table:
    """The figures of both sides."""
    made = Table(title=title)
    memory = "GPU memory" if device.type == "cuda" else "memory"
    for column in ("", "tokens a caption", "samples/s", "ms/step", "share of GEMM peak", f"{memory}, GiB"):
        made.add_column(column, justify="left" if not column else "right")
    for row in rows:
        made.add_row(
            row.name,
            f"{row.tokens:.1f}",
            f"{row.samples_per_second:,.1f}",
            f"{1000 * row.seconds_per_step:,.1f}",
            f"{100 * row.share_of_peak:.1f} %",
            f"{row.memory / GIB:.2f}",
        )
    return made


def chart(rows: list[Row], title: str, note: str, ratio: float) -> Figure:
    """Three pairs of bars: speed, share of the peak, memory."""
    figure = Figure(figsize=(9.8, 2.6), layout="constrained")
    figure.suptitle(f"{title}: {ratio:.2f} ×", color=LIGHT.ink, fontweight="bold", fontsize=11)
    figure.supxlabel(note, color=LIGHT.muted, fontsize=7)
    names = [row.name for row in rows]
    for place, (label, values, form) in enumerate(
        (
            ("samples/s", [row.samples_per_second for row in rows], "{:,.1f}"),
            ("share of GEMM peak, %", [100 * row.share_of_peak for row in rows], "{:.0f}"),
            ("memory, GiB", [row.memory / GIB for row in rows], "{:.2f}"),
        ),
        start=1,
    ):
        axes = figure.add_subplot(1, 3, place)
        bars = axes.barh(names, values, color=[LIGHT.chance, LIGHT.model], height=0.6)
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, color=LIGHT.ink, fontsize=9)
        axes.set_title(label, fontsize=9, color=LIGHT.muted, loc="left")
        axes.set_xlim(0, 1.25 * max(values))
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
        axes.tick_params(left=False, labelsize=9, labelcolor=LIGHT.ink)
        if place > 1:
            axes.set_yticklabels([])
    return figure


class _Ours:
    def __init__(self, side: OurSide, batches: list[Batch], before: int) -> None:
        self._side, self._batches, self._before = side, batches, before

    def loss(self) -> float:
        return self._side.loss(self._batches[0])

    def run(self) -> float:
        start = finish(self._side.process.device)
        for step, batch in enumerate(self._batches):
            self._side.update(batch, step, LR)
        return finish(self._side.process.device) - start

    def memory(self) -> int:
        return peak_memory(self._side.process.device, self._before)

    def samples(self) -> int:
        return sum(len(batch) for batch in self._batches)

    def tokens(self) -> int:
        return sum(int(batch.lengths.sum()) for batch in self._batches)


class _Theirs:
    def __init__(self, side: OpenClipSide, batches: list[Batch], before: int) -> None:
        self._side, self._first, self._before = side, batches[0], before
        self._inputs = [peer_inputs(side.recipe, batch, side.tokenizer) for batch in batches]

    def loss(self) -> float:
        return self._side.loss(self._first)

    def run(self) -> float:
        start = finish(self._side.device)
        self._side.train(self._inputs, 0)
        return finish(self._side.device) - start

    def memory(self) -> int:
        return peak_memory(self._side.device, self._before)


@contextmanager
def our_side(recipe: Recipe, steps: int, pad: bool) -> Generator[_Ours]:
    """For a worker."""
    with launched(recipe.training.precision) as process:
        before = resident_bytes("VmRSS")
        model, tokenizer, batches = begin(recipe, steps)
        yield _Ours(OurSide(recipe, model, tokenizer, process, pad), batches, before)


@contextmanager
def open_clip_side(recipe: Recipe, steps: int, device: str) -> Generator[_Theirs]:
    """For a worker."""
    before = resident_bytes("VmRSS")
    model, tokenizer, batches = begin(recipe, steps)
    side = OpenClipSide(recipe, model, tokenizer, torch.device(device), lr=LR)
    del model  # its weights were copied
    yield _Theirs(side, batches, before)


def begin(recipe: Recipe, steps: int) -> tuple[TwoTower, BPETokenizer, list[Batch]]:
    """The weights both sides start from, and their batches."""
    tokenizer = build_tokenizer(recipe)
    torch.manual_seed(recipe.training.seed)
    model = build_two_tower(recipe, tokenizer)
    stream = build_stream(recipe, tokenizer)
    return model, tokenizer, [stream[step] for step in range(steps)]
