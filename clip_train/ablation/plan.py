"""The budget view: how many runs of how many steps, and how long that takes, measured and not guessed.

Times come from cells of the same grid that are finished; where there is none, `measure` times a few steps, an
evaluation and a probe of one cell of each loss.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from clip_train.ablation import cells as folders
from clip_train.ablation.grid import Cell, Grid
from clip_train.config.load import dump_recipe, set_values
from clip_train.errors import UserError
from clip_train.training.signals import stop_signals

TIMED_STEPS = 16


@dataclass(frozen=True)
class Timing:
    """Seconds of one loss, measured in a short run."""

    fixed: float
    """Start, evaluation, end."""
    step: float
    probe: float


@dataclass(frozen=True)
class Costs:
    """What is known of seconds."""

    trained: list[tuple[Cell, float]]
    probed: list[tuple[Cell, float]]
    timings: dict[str, Timing]
    """By loss."""

    @classmethod
    def known(cls, grid: Grid) -> Costs:
        """From finished stages, and from `measure`."""
        trained: list[tuple[Cell, float]] = []
        probed: list[tuple[Cell, float]] = []
        for cell in grid.runs:
            done = folders.read(grid.folder(cell))
            if all(one.finished for one in done.values()) and "train" in done:
                trained.append((cell, done["train"].seconds))
                if len(done) == len(folders.stages(grid, cell)):
                    probed.append((cell, sum(one.seconds for name, one in done.items() if name != "train")))
        try:
            timings = json.loads((grid.out / "timing.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            timings = {}
        return cls(trained, probed, {kind: Timing(**one) for kind, one in timings.items()})

    def seconds(self, cell: Cell) -> float | None:
        """Of a whole cell: as others of its name, else of its loss, else as it was timed."""
        train, probe = self.training(cell), self.probing(cell)
        return None if train is None or probe is None else train + probe

    def training(self, cell: Cell) -> float | None:
        found = _nearest(cell, self.trained)
        if found is not None:
            return found
        timing = self.timings.get(cell.recipe.loss.kind)
        return None if timing is None else timing.fixed + timing.step * cell.steps

    def probing(self, cell: Cell) -> float | None:
        found = _nearest(cell, self.probed)
        if found is None and self.probed:
            found = fmean(seconds for _, seconds in self.probed)
        timing = self.timings.get(cell.recipe.loss.kind)
        return found if found is not None or timing is None else timing.probe

    def total(self, cells: Iterable[Cell]) -> float | None:
        """Of several cells; None where one is unknown."""
        seconds = [self.seconds(cell) for cell in cells]
        known = [one for one in seconds if one is not None]
        return sum(known) if len(known) == len(seconds) else None


def measure(grid: Grid, program: Sequence[str], threads: int, console: Console) -> None:
    """Time one cell of each loss that nothing is known of. Raises UserError where a timed run fails."""
    costs = Costs.known(grid)
    timings = dict(costs.timings)
    for cell in grid.runs:
        kind = cell.recipe.loss.kind
        if costs.seconds(cell) is not None or kind in timings or cell.after is not None or cell.steps == 0:
            continue
        console.print(f"timing {TIMED_STEPS} steps of {cell.name}", soft_wrap=True)
        timings[kind] = _time(grid, cell, program, threads)
    (grid.out / "timing.json").write_text(
        json.dumps({kind: asdict(one) for kind, one in timings.items()}, indent=2) + "\n", encoding="utf-8"
    )


def _time(grid: Grid, cell: Cell, program: Sequence[str], threads: int) -> Timing:
    steps = min(TIMED_STEPS, cell.steps)
    folder = grid.out / "timing" / f"{cell.id}-{time.time_ns()}"
    folder.mkdir(parents=True)
    recipe = set_values(cell.recipe, [f"training.steps={steps}", "schedule.warmup_steps=1", "logging.every_steps=4"])
    (folder / "cell.toml").write_text(dump_recipe(recipe), encoding="utf-8")
    began = time.monotonic()
    run_command(program, ["train", str(folder / "cell.toml"), "--run-dir", str(folder)], threads, folder / "train.log")
    seconds = time.monotonic() - began
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    step = recipe.data.batch_size / lines[-1]["samples_per_second"]
    began = time.monotonic()
    for stage in folders.stages(grid, cell)[1:]:
        arguments = [str(folder) if part == str(grid.folder(cell)) else part for part in stage.command]
        run_command(program, arguments, threads, folder / f"{stage.name}.log")
    return Timing(max(0.0, seconds - steps * step), step, time.monotonic() - began)


def run_command(program: Sequence[str], arguments: Sequence[str], threads: int, log: Path) -> None:
    """One command to its end. Raises UserError, with the end of its log, where it fails; a signal goes to it, too."""
    with stop_signals() as stop, log.open("a", encoding="utf-8") as out:
        child = subprocess.Popen(
            [*program, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env=folders.environment(threads), start_new_session=True,
        )  # fmt: skip
        try:
            while child.poll() is None and stop.signal is None:
                time.sleep(0.1)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
        if stop.signal is not None:
            raise SystemExit(128 + stop.signal)
    if child.returncode:
        raise UserError(
            f"exit code {child.returncode} of {' '.join(arguments)}; {log} ends:\n{folders.last_words(log)}"
        )


def show(grid: Grid, cells: Sequence[Cell], jobs: int, console: Console) -> None:
    """Print the budget view of these cells."""
    costs = Costs.known(grid)
    missing = [cell for cell in cells if not folders.is_finished(grid, cell)]
    table = Table(title=f"{grid.file.name}{'' if grid.budget is None else f', budget {grid.budget}'}")
    for column in ("cell", "seeds", "steps", "samples", "a run", "left"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell.name, []).append(cell)
    for name, ofname in by_name.items():
        first, left = ofname[0], [cell for cell in ofname if cell in missing]
        table.add_row(
            name + (f"  (after {first.after.rpartition('-seed')[0]})" if first.after else ""),
            ", ".join(str(cell.seed) for cell in ofname),
            f"{first.steps:,}",
            f"{first.steps * first.recipe.data.batch_size:,}",
            _spoken(costs.seconds(first)),
            f"{len(left)}" if left else "finished",
        )
    console.print(table)
    steps = sum(cell.steps for cell in missing)
    samples = sum(cell.steps * cell.recipe.data.batch_size for cell in missing)
    total = costs.total(missing)
    same = len([cell for cell in grid.cells if cell.same_as is not None])
    console.print(
        f"{len(missing)} of {len(cells)} runs to go"
        + (f" ({same} more are equal to one of them)" if same else "")
        + f": {steps:,} steps, {samples:,} samples; "
        + (
            f"about {duration(total)} of work, {duration(total / min(jobs, max(1, len(missing))))} with --jobs {jobs}"
            if total is not None
            else "the time is known when the first of each kind is finished (`--plan` measures it)"
        ),
        soft_wrap=True,
    )


def duration(seconds: float) -> str:
    """45 s, 12 min, 1 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _spoken(seconds: float | None) -> str:
    return "?" if seconds is None else duration(seconds)


def _nearest(cell: Cell, known: Sequence[tuple[Cell, float]]) -> float | None:
    for same in (_name, _loss_and_steps):
        found = [seconds for other, seconds in known if same(other) == same(cell)]
        if found:
            return fmean(found)
    return None


def _name(cell: Cell) -> Any:
    return cell.name


def _loss_and_steps(cell: Cell) -> Any:
    return cell.recipe.loss.kind, cell.steps
