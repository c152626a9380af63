"""`clip-train bench curves`: both trainers on the same batches from the same weights, step for step.

The recipe with AdamW, in each seed's order of samples. The sides take turns, a part of the run at a time, so that a
machine that slows down slows both; what is timed is the training loop alone, with batches decoded beforehand and
evaluation left out. What comes out: the losses of every step, the held-out zero-shot accuracy after every part, and how
long each side took to reach the accuracy that both reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clip_train.bench.measure import conclude, machine
from clip_train.bench.sides import OpenClipSide, OurSide, in_arithmetic_of_this_machine, peer_inputs, with_adamw
from clip_train.bench.step import begin, check_equal_losses
from clip_train.bench.worker import Worker, finish
from clip_train.config import load_recipe
from clip_train.config.load import set_values
from clip_train.config.schema import AdamW, Recipe, ZeroShot
from clip_train.data.transforms import Preprocess
from clip_train.errors import UserError
from clip_train.evaluation.plots import LIGHT, png
from clip_train.evaluation.run import evaluate
from clip_train.from_recipe.data import build_preprocess, build_stream
from clip_train.from_recipe.update import learning_rate
from clip_train.runtime.process import launched
from tokenizer import BPETokenizer

SIDES = ("open_clip", "clip-train")


@dataclass
class Curve:
    """One side's run of one seed."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Spent in training by the end of each part."""
    accuracy: list[float] = field(default_factory=list)
    """Top-1 at the end of each part."""

    def seconds_to(self, accuracy: float) -> float:
        """When it first had `accuracy`, on straight lines between the parts."""
        before = (0.0, 0.0)
        for now in zip(self.seconds, self.accuracy, strict=True):
            if now[1] >= accuracy:
                share = (accuracy - before[1]) / (now[1] - before[1]) if now[1] > before[1] else 1.0
                return before[0] + share * (now[0] - before[0])
            before = now
        raise AssertionError("both sides reach it")


Curves = dict[str, list[Curve]]
"""A curve a seed, of each side."""


@dataclass(frozen=True)
class Verdict:
    """What the curves say."""

    between_sides: float
    """Mean absolute difference of the losses of a step between the two sides, at the same seed."""
    between_seeds: float
    """The same between two seeds of one side."""
    accuracy: dict[str, float]
    """At the end, mean over seeds."""
    target: list[float]
    """Of each seed, the best accuracy that both sides reach."""
    seconds: dict[str, list[float]]
    """To reach it."""
    ratio: float
    """Median over seeds of open_clip's seconds over ours."""


def main(args: argparse.Namespace) -> int:
    """Train, compare, draw; the last line is the ratio of the times to equal accuracy."""
    console = Console(highlight=False)
    recipe = in_arithmetic_of_this_machine(load_recipe(args.recipe, args.overrides))
    recipe = prepare(recipe, args.steps, args.lr)
    parts = split(args.steps, args.parts)
    curves: Curves = {side: [] for side in SIDES}
    with console.status("starting") as status:
        for seed in range(args.seeds):
            seeded = set_values(recipe, [f"training.seed={seed}"])
            for side, curve in run_seed(seeded, parts, args.device, lambda says: status.update(says)).items():
                curves[side].append(curve)
            console.print(
                f"seed {seed}: "
                + "; ".join(
                    f"{side} {curves[side][-1].seconds[-1]:.0f} s, loss {curves[side][-1].losses[-1]:.3f}, "
                    f"top-1 {curves[side][-1].accuracy[-1]:.1%}"
                    for side in SIDES
                )
            )
    found = judge(curves)
    args.out.mkdir(parents=True, exist_ok=True)
    where = machine(torch.device(args.device))
    note = f"{recipe.name}, batch {recipe.data.batch_size}, {recipe.training.precision}, {where}"
    data = {"recipe": recipe.model_dump(mode="json"), "machine": note, "verdict": asdict(found)}
    data["curves"] = {side: [asdict(curve) for curve in kept] for side, kept in curves.items()}
    (args.out / "curves.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.out / "curves.png").write_bytes(png(chart(curves, parts, note, found), LIGHT))
    console.print(table(found))
    console.print(note)
    console.print(f"curves: {args.out / 'curves.json'}, {args.out / 'curves.png'}", soft_wrap=True)
    if found.between_sides > found.between_seeds:
        console.print("the curves differ by more than seeds do")
        conclude(found.ratio, None, console)
        return 1
    return conclude(found.ratio, args.bar, console)


def prepare(recipe: Recipe, steps: int, lr: float) -> Recipe:
    """The recipe as both can train it: AdamW, and a cosine over `steps`. Raises UserError where they cannot."""
    if not isinstance(recipe.optimizer, AdamW):
        recipe = set_values(with_adamw(recipe), [f"optimizer.lr={lr}"])
    warmup = max(1, steps // 10)
    recipe = set_values(recipe, [f"training.steps={steps}", f"schedule={{kind='cosine', warmup_steps={warmup}}}"])
    zeroshot_task(recipe)
    return recipe


def zeroshot_task(recipe: Recipe) -> tuple[str, ZeroShot]:
    """The recipe's first zero-shot task."""
    tasks = [(name, task) for name, task in recipe.evaluation.tasks.items() if isinstance(task, ZeroShot)]
    if not tasks:
        raise UserError(f"recipe {recipe.name} has no zero-shot task in evaluation.tasks to compare accuracy on")
    return tasks[0]


def split(steps: int, parts: int) -> list[int]:
    """Where each of `parts` equal parts ends. Raises UserError for steps that cannot be cut so."""
    if steps % parts:
        raise UserError(f"--steps {steps} is not a multiple of --parts {parts}")
    return [steps // parts * (number + 1) for number in range(parts)]


def run_seed(recipe: Recipe, parts: list[int], device: str, say: Callable[[str], object]) -> dict[str, Curve]:
    """Both sides from the same weights over the same batches, in turn."""
    curves = {side: Curve() for side in SIDES}
    with ExitStack() as stack:
        workers = {
            "open_clip": stack.enter_context(Worker(open_clip_trainer, recipe, device, device=device)),
            "clip-train": stack.enter_context(Worker(our_trainer, recipe, device=device)),
        }
        for worker in workers.values():
            worker.ready()
        check_equal_losses(workers["clip-train"].call("loss"), workers["open_clip"].call("loss"))
        for number, last in enumerate(parts):
            for side, worker in workers.items():
                say(f"seed {recipe.training.seed}, to step {last}: {side}")
                first = parts[number - 1] if number else 0
                losses, seconds = worker.call("train", first, last)
                curve = curves[side]
                curve.losses += losses
                curve.seconds.append(seconds + (curve.seconds[-1] if curve.seconds else 0.0))
                curve.accuracy.append(worker.call("accuracy"))
    return curves


def judge(curves: Curves) -> Verdict:
    """Differences of losses between sides and between seeds; seconds to equal accuracy."""
    losses = {side: np.array([curve.losses for curve in kept]) for side, kept in curves.items()}
    theirs, ours = (losses[side] for side in SIDES)
    pairs = [(a, b) for a in range(len(ours)) for b in range(a)]
    spread = [np.abs(one[a] - one[b]).mean() for one in (theirs, ours) for a, b in pairs]
    target = [min(max(a.accuracy), max(b.accuracy)) for a, b in zip(curves[SIDES[0]], curves[SIDES[1]], strict=True)]
    seconds = {
        side: [curve.seconds_to(goal) for curve, goal in zip(curves[side], target, strict=True)] for side in SIDES
    }
    return Verdict(
        between_sides=float(np.abs(theirs - ours).mean()),
        between_seeds=float(np.mean(spread)) if spread else float("inf"),
        accuracy={side: statistics.fmean(curve.accuracy[-1] for curve in kept) for side, kept in curves.items()},
        target=target,
        seconds=seconds,
        ratio=statistics.median(a / b for a, b in zip(seconds[SIDES[0]], seconds[SIDES[1]], strict=True)),
    )


def table(found: Verdict) -> Table:
    """Accuracy and seconds of both sides, and how far apart the losses are."""
    made = Table(title="equal curves, and seconds to equal accuracy")
    for column in ("", "top-1 at the end", "seconds to the accuracy both reach"):
        made.add_column(column, justify="left" if not column else "right")
    for side in SIDES:
        made.add_row(side, f"{found.accuracy[side]:.1%}", " / ".join(f"{value:.1f}" for value in found.seconds[side]))
    made.add_section()
    made.add_row(
        "|difference| of a step's loss", f"sides {found.between_sides:.4f}", f"seeds {found.between_seeds:.4f}"
    )
    return made


def chart(curves: Curves, parts: list[int], note: str, found: Verdict) -> Figure:
    """Losses over steps, accuracy over steps, accuracy over seconds; a line a seed."""
    figure = Figure(figsize=(9.8, 3.2), layout="constrained")
    figure.supxlabel(note, color=LIGHT.muted, fontsize=7)
    figure.suptitle(f"the same accuracy {found.ratio:.2f} × as fast", color=LIGHT.ink, fontweight="bold", fontsize=11)
    titles = ("loss, over steps", "top-1, %, over steps", "top-1, %, over seconds of training")
    charts = [figure.add_subplot(1, 3, place) for place in (1, 2, 3)]
    for axes, title in zip(charts, titles, strict=True):
        axes.set_title(title, fontsize=9, color=LIGHT.muted, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, labelcolor=LIGHT.muted)
    for side, colour, style in zip(SIDES, (LIGHT.second, LIGHT.model), ("-", "--"), strict=True):
        for number, curve in enumerate(curves[side]):
            label = side if number == 0 else None
            percent = [100 * value for value in curve.accuracy]
            line: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.2, "label": label}
            charts[0].plot(range(1, len(curve.losses) + 1), curve.losses, **line)
            charts[1].plot(parts, percent, **line)
            charts[2].plot(curve.seconds, percent, **line)
    charts[0].legend(frameon=False, fontsize=8)
    return figure


@dataclass(frozen=True)
class _Loaded:
    model: Any
    preprocess: Preprocess
    tokenizer: BPETokenizer


class _Trainer:
    """What a worker answers to, whichever its side."""

    def __init__(self, recipe: Recipe, tokenizer: BPETokenizer, device: torch.device, model: Any) -> None:
        self.recipe, self.tokenizer, self.device = recipe, tokenizer, device
        self.stream = build_stream(recipe, tokenizer)
        assert recipe.training.steps is not None, "`prepare` has set them"
        self.steps = recipe.training.steps
        self._model = model

    def accuracy(self) -> float:
        """Top-1 of the recipe's zero-shot task."""
        name, task = zeroshot_task(self.recipe)
        loaded = _Loaded(self._model, build_preprocess(self.recipe), self.tokenizer)
        figures = evaluate(loaded, {name: task}, device=self.device, precision=self.recipe.training.precision)
        return figures[f"zeroshot/{name}/top1"]


class _Ours(_Trainer):
    def __init__(self, side: OurSide) -> None:
        super().__init__(side.recipe, side.tokenizer, side.process.device, side.model)
        self._side = side

    def loss(self) -> float:
        return self._side.loss(self.stream[0])

    def train(self, first: int, last: int) -> tuple[list[float], float]:
        batches = [self.stream[step] for step in range(first, last)]
        start = finish(self.device)
        losses = [
            self._side.update(batch, step, learning_rate(self.recipe, step, self.steps))
            for step, batch in enumerate(batches, start=first)
        ]
        seconds = finish(self.device) - start
        return [float(loss) for loss in losses], seconds


class _Theirs(_Trainer):
    def __init__(self, side: OpenClipSide) -> None:
        super().__init__(side.recipe, side.tokenizer, side.device, _Encoder(side.model))
        self._side = side

    def loss(self) -> float:
        return self._side.loss(self.stream[0])

    def train(self, first: int, last: int) -> tuple[list[float], float]:
        inputs = [peer_inputs(self.recipe, self.stream[step], self.tokenizer) for step in range(first, last)]
        start = finish(self.device)
        losses = self._side.train(inputs, first // (last - first))
        return losses, finish(self.device) - start


class _Encoder:
    """open_clip's model as our evaluation calls models: EOT is its largest id, captions are padded to the cap."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.logit_scale = model.logit_scale

    @property
    def training(self) -> bool:
        return self._model.training

    def train(self, mode: bool = True) -> None:
        self._model.train(mode)

    def encode_image(self, images: Tensor) -> Tensor:
        return self._model.encode_image(images)

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
        padded = ids.new_zeros(len(ids), self._model.context_length)
        padded[:, : ids.shape[1]] = ids.masked_fill(padding, 0)
        return self._model.encode_text(padded)


@contextmanager
def our_trainer(recipe: Recipe) -> Generator[_Ours]:
    """For a worker."""
    with launched(recipe.training.precision) as process:
        model, tokenizer, _ = begin(recipe, 0)
        yield _Ours(OurSide(recipe, model, tokenizer, process))


@contextmanager
def open_clip_trainer(recipe: Recipe, device: str) -> Generator[_Theirs]:
    """For a worker."""
    from open_clip_train.scheduler import cosine_lr

    model, tokenizer, _ = begin(recipe, 0)
    lr, warmup, steps = recipe.optimizer.lr, recipe.schedule.warmup_steps, recipe.training.steps
    side = OpenClipSide(
        recipe, model, tokenizer, torch.device(device), lr=lr, schedule=lambda one: cosine_lr(one, lr, warmup, steps)
    )
    yield _Theirs(side)
