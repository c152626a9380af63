"""A cell's folder: which stages are finished, for which recipe, how long they took, and who is at work in it.

OUT/cells/causal-eot-seed0/
  cell.toml       the resolved recipe, given to `clip-train train`
  stages.json     seconds and the recipe's hash of every stage
  train.log …     what the stages said
  lock            held by whoever works here, and by its child: gone with them, however they end
  …               what training and probes write: checkpoints/, metrics.jsonl, eval.json, probe/
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clip_train.ablation.grid import Cell, Grid, probe_key
from clip_train.config.load import dump_recipe
from clip_train.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A command of a cell, and what it leaves behind."""

    name: str
    command: tuple[str, ...]
    """Arguments of `clip-train`."""
    outputs: tuple[Path, ...]
    key: str
    """Hash of what decides its result."""


@dataclass(frozen=True)
class Done:
    """A stage as `stages.json` has it."""

    key: str
    seconds: float
    """Of all attempts."""
    finished: bool


def stages(grid: Grid, cell: Cell) -> list[Stage]:
    """What is run for a cell, in order."""
    folder = grid.folder(cell)
    trained = [folder / "checkpoints" / "latest"]
    if cell.recipe.evaluation.tasks:
        trained.append(folder / "eval.json")
    command = ("train", str(folder / "cell.toml"), "--run-dir", str(folder), "--resume", "auto")
    found = [Stage("train", command, tuple(trained), cell.key)]
    for suite in grid.file.probes:
        command = ("probe", str(folder), "--suite", suite, *_probe_options(grid))
        found.append(Stage(f"probe-{suite}", command, (folder / "probe" / f"{suite}.json",), probe_key(cell, grid)))
    return found


def _probe_options(grid: Grid) -> list[str]:
    said = grid.file.probe.model_dump(exclude_defaults=True)
    tasks = said.pop("tasks", [])
    options: list[str] = []
    if grid.generator is None:  # said, or it would take a generator that is there for other work
        tasks = tasks or ["exp1", "exp2"]
    else:
        options += ["--generator", str(grid.out / "generator"), "--budget", grid.generator]
        tasks = [*tasks, "exp3"] if tasks else []
    if tasks:
        options += ["--tasks", ",".join(tasks)]
    for key, value in said.items():
        options += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return options


def prepare(grid: Grid, cell: Cell) -> None:
    """Make the folder. Raises UserError where it holds a run of another recipe."""
    folder = grid.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    check(grid, cell)
    _write(folder / "cell.toml", dump_recipe(cell.recipe))


def clear(stage: Stage) -> None:
    """Take away what a probe is to make anew: it would leave other settings' figures beside its own."""
    if stage.name != "train":
        for output in stage.outputs:
            output.unlink(missing_ok=True)


def check(grid: Grid, cell: Cell) -> None:
    """Raises UserError where a cell's folder holds a run of another recipe."""
    folder = grid.folder(cell)
    trained = read(folder).get("train")
    if trained is not None and trained.key != cell.key:
        raise UserError(
            f"{folder} holds a run of another recipe (the grid has changed since, or the budget is another one): "
            "choose another --out, or remove that folder"
        )


def read(folder: Path) -> dict[str, Done]:
    """Stages of a folder that were begun."""
    try:
        tree = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {name: Done(**done) for name, done in tree.items()}


def record(folder: Path, stage: Stage, seconds: float, finished: bool) -> None:
    """Add an attempt at a stage."""
    known = read(folder)
    before = known[stage.name].seconds if stage.name in known else 0.0
    known[stage.name] = Done(stage.key, round(before + seconds, 2), finished)
    _write(folder / "stages.json", json.dumps({name: asdict(done) for name, done in known.items()}, indent=2) + "\n")


def unfinished(grid: Grid, cell: Cell) -> list[Stage]:
    """The stages of a cell that are still to run: from the first one whose outputs are not there, or are another's."""
    known = read(grid.folder(cell))
    todo = stages(grid, cell)
    while todo:
        done = known.get(todo[0].name)
        is_there = all(output.exists() for output in todo[0].outputs)
        if done is None or not done.finished or done.key != todo[0].key or not is_there:
            break
        todo.pop(0)
    return todo


def is_finished(grid: Grid, cell: Cell) -> bool:
    return not unfinished(grid, cell)


def seconds_of(grid: Grid, cell: Cell) -> float | None:
    """What a finished cell took; None for one that is not."""
    return sum(done.seconds for done in read(grid.folder(cell)).values()) if is_finished(grid, cell) else None


class Lock:
    """Held by one process (and its children that inherit `descriptor`) at a time."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> Lock | None:
        """The lock, or None where another process holds it and one does not `wait`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(path, descriptor)

    def release(self) -> None:
        os.close(self.descriptor)


def usable_cores() -> int:
    """Cores that this process may use: of a Slurm job those it was given, not the node's."""
    return len(os.sched_getaffinity(0))


def environment(threads: int) -> dict[str, str]:
    """Of a stage's process: so many threads of arithmetic."""
    count = str(threads)
    return {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONUNBUFFERED": "1"}


def last_words(log: Path, lines: int = 6) -> str:
    """The end of a log, for a message."""
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])
    except OSError:
        return ""


def share_of(cells: Sequence[Cell], number: int, of: int) -> list[Cell]:
    """Part `number` (from 1) of `of`: whole chains, so that no part waits for another one."""
    parts: list[Cell] = []
    root_of: dict[str, str] = {}
    roots: list[str] = []
    for cell in cells:
        root = root_of[cell.after] if cell.after is not None else cell.id
        root_of[cell.id] = root
        if root not in roots:
            roots.append(root)
        if roots.index(root) % of == number - 1:
            parts.append(cell)
    return parts


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
