"""How long saving a checkpoint keeps training waiting: a synchronous save beside one that training goes on during.

Each round saves once each way, after an update and with training steps behind it. A synchronous save stalls for as long
as it takes to write. The other one stalls where training waits for it: while what a forward pass changes is copied, and
before the next update, where weights and moments are not copied yet. What else it costs, processor time and memory
bandwidth that the steps beside it do without, is given as the time these steps took longer than others.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from clip_train.bench.measure import conclude, machine
from clip_train.config import dump_recipe, load_recipe
from clip_train.config.schema import Recipe
from clip_train.from_recipe.model import build_objective, build_tokenizer, build_two_tower
from clip_train.from_recipe.update import build_optimizer
from clip_train.models.two_tower import TwoTower
from clip_train.objectives.base import Inputs
from clip_train.runtime.process import Process, launched
from clip_train.training.checkpoint import Companions, State
from clip_train.training.optimizer import named_state
from clip_train.training.saving import Saver
from clip_train.training.update import train_step
from tokenizer import BPETokenizer


@dataclass
class Bench:
    """A model in training, on one batch."""

    recipe: Recipe
    process: Process
    tokenizer: BPETokenizer
    model: TwoTower
    optimizer: torch.optim.Optimizer
    inputs: Inputs
    steps: int = 0

    @classmethod
    def of(cls, recipe: Recipe, process: Process, batch: int) -> Bench:
        torch.manual_seed(0)
        tokenizer = build_tokenizer(recipe)
        model = build_two_tower(recipe, tokenizer).to(process.device)
        size = recipe.vision.image_size
        ids, lengths = tokenizer.encode_batch([f"a photo of picture number {number}" for number in range(batch)])
        inputs = Inputs(
            images=torch.randn(batch, 3, size, size, device=process.device),
            ids=torch.from_numpy(tokenizer.padded(ids, lengths)).long().to(process.device),
            lengths=torch.from_numpy(lengths).long(),
            groups=torch.arange(batch, device=process.device),
        )
        return cls(recipe, process, tokenizer, model, build_optimizer(recipe, model), inputs)

    def step(self) -> float:
        """Seconds of one training step."""
        started = time.perf_counter()
        train_step(
            self.model,
            build_objective(self.recipe, self.tokenizer),
            self.optimizer,
            self.inputs,
            self.process,
            step=self.steps,
            seed=0,
            lr=1e-5,
            micro_batch=None,
            gradient_clip=self.recipe.training.gradient_clip,
        )
        if self.process.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps += 1
        return time.perf_counter() - started

    def saver(self, folder: Path, *, asynchronous: bool) -> Saver:
        companions = Companions(dump_recipe(self.recipe), self.tokenizer.save)
        return Saver(
            folder, self.process, self.optimizer, companions, sharded=False, asynchronous=asynchronous, keep_last=1
        )

    def save(self, saver: Saver) -> None:
        state = State(step=self.steps, samples=0, data_fingerprint="", tokenizer_fingerprint=self.tokenizer.fingerprint)
        optimizer = named_state(self.optimizer, self.model)
        saver.save(state, self.model.state_dict(), optimizer, dict(self.model.named_buffers()))


@dataclass
class Costs:
    """Seconds a save, one entry a round."""

    stalls: list[float]
    slower: list[float]
    """By which the steps beside the write exceeded as many others."""


def main(args: argparse.Namespace) -> int:
    """Save both ways in turn, print one table and the ratio."""
    console = Console(highlight=False)
    recipe = load_recipe(args.recipe, args.overrides)
    if args.device == "cpu":
        torch.cuda.is_available = lambda: False
    with (
        launched(recipe.training.precision) as process,
        tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-checkpoint-") as folder,
        console.status("saving"),
    ):
        bench = Bench.of(recipe, process, args.batch)
        with (
            bench.saver(Path(folder) / "synchronous", asynchronous=False) as synchronous,
            bench.saver(Path(folder) / "asynchronous", asynchronous=True) as asynchronous,
        ):
            for saver in (synchronous, asynchronous):  # allocates moments, host memory, space on the disk
                bench.step()
                bench.save(saver)
                saver.finish()
            costs = {"synchronous": Costs([], []), "asynchronous": Costs([], [])}
            alone: list[float] = []
            for _ in range(args.rounds):
                costs["synchronous"].stalls.append(stall_of(bench, synchronous))
                alone += [bench.step(), bench.step()]
                beside: list[float] = []
                costs["asynchronous"].stalls.append(stall_of(bench, asynchronous, beside))
                costs["asynchronous"].slower.append(sum(beside) - len(beside) * statistics.median(alone))
        written = sum(file.stat().st_size for file in (Path(folder) / "asynchronous/latest/").iterdir())
        memory = sum(tensor.nbytes for tensor in asynchronous.copies.kept.values())

    table = Table(title=f"saving {recipe.name} with {recipe.optimizer.kind}, {written / 1e9:.2f} GB")
    for column in ("", "training stalls, s", "steps beside it take longer, s", "host memory kept, GB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, cost in costs.items():
        slower = f"{statistics.median(cost.slower):.2f}" if cost.slower else "—"
        kept = f"{memory / 1e9:.2f}" if name == "asynchronous" else "—"
        table.add_row(name, f"{statistics.median(cost.stalls):.4f}", slower, kept)
    console.print(table)
    console.print(
        f"{machine(process.device)}; a step of {args.batch} pairs takes {statistics.median(alone):.2f} s alone; "
        f"median of {args.rounds} rounds"
    )
    pairs = zip(costs["synchronous"].stalls, costs["asynchronous"].stalls, strict=True)
    return conclude(statistics.median(one / other for one, other in pairs), args.bar, console)


def stall_of(bench: Bench, saver: Saver, beside: list[float] | None = None) -> float:
    """Seconds for which one save keeps training waiting; the steps beside an asynchronous write go into `beside`."""
    before = saver.stalled
    bench.save(saver)
    while beside is not None and (not beside or saver.busy):
        beside.append(bench.step())
    stalled = saver.stalled - before
    saver.finish()
    return stalled
