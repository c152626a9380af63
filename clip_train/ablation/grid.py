"""A grid expanded into cells, one recipe each: the product of its axes, and its arms, for every seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from clip_train.ablation.grid_file import PREVIOUS, Budget, Comparison, GridFile, Probe, nearest, read_grid_file
from clip_train.config import Recipe, load_recipe
from clip_train.errors import ConfigError
from clip_train.evaluation.text.tasks import EMBEDDED

EXPERIMENTS = ("exp1", "exp2", "exp3")


@dataclass(frozen=True)
class Cell:
    """One run: a recipe with a seed, and where it stands in the grid."""

    name: str
    seed: int
    levels: dict[str, str]
    recipe: Recipe
    key: str
    """Hash of what decides its numbers: equal cells are run once."""
    after: str | None = None
    """The cell, by `id`, that runs before it."""
    same_as: str | None = None
    """An earlier cell, by `id`, of the same hash, which stands for this one."""

    @property
    def id(self) -> str:
        """`causal-eot-seed0`: its folder's name."""
        return f"{self.name}-seed{self.seed}"

    @property
    def steps(self) -> int:
        assert self.recipe.training.steps is not None, "`expand` has refused epochs"
        return self.recipe.training.steps


@dataclass(frozen=True)
class Grid:
    """A grid on a budget: what is run."""

    file: GridFile
    budget: str | None
    out: Path
    cells: list[Cell]
    generator: str | None = None
    """Size of the generator of experiment 3, which is kept in `out`/generator."""

    def folder(self, cell: Cell | str) -> Path:
        """Where a cell runs: its own folder, or that of the equal cell that stands for it."""
        found = self.cell(cell) if isinstance(cell, str) else cell
        return self.out / "cells" / (found.same_as or found.id)

    def cell(self, identifier: str) -> Cell:
        return next(cell for cell in self.cells if cell.id == identifier)

    @property
    def runs(self) -> list[Cell]:
        """Without those for which an equal one stands, each behind the one it comes after."""
        return [cell for cell in self.cells if cell.same_as is None]

    @property
    def vocabulary(self) -> Path | None:
        """Where the grid's own vocabulary is kept."""
        return None if self.file.vocabulary is None else self.out / "vocabulary.json"


def load_grid(path: Path, out: Path, budget: str | None = None) -> Grid:
    """Read a grid file and expand it on a budget.

    Raises ConfigError as `read_grid_file` does; for unknown axes, levels, cells or budgets (the nearest ones are
    named), a chain that goes in a circle, and every recipe that cannot be.
    """
    return expand(read_grid_file(path), path, out, budget)


def expand(file: GridFile, path: Path, out: Path, budget: str | None = None) -> Grid:
    """All cells of a grid on a budget, each recipe resolved. Raises ConfigError as `load_grid` does."""
    where = str(path)
    out = out.resolve()
    if budget is not None and budget not in file.budgets:
        raise ConfigError(f"{where}: no budget {budget!r}.{nearest(budget, file.budgets, 'Budgets')}")
    if file.generator is not None and not file.probes:
        raise ConfigError(f"{where}: generator = {file.generator!r} is for probes = ['text'], and there are no probes")
    if file.probe != Probe() and not file.probes:
        raise ConfigError(f"{where}: [probe] is for probes = ['text'], and there are no probes")
    _check_figures(file, where)
    chosen = file.budgets[budget] if budget is not None else Budget()
    plans = _plans(file, where)
    names = _chosen(chosen.cells, plans, where) if chosen.cells is not None else list(plans)
    for side in file.comparisons.values():
        _check_comparison(side, plans, file, where)
    base = path.parent / file.recipe
    grid = Grid(file, budget, out, [], chosen.generator or file.generator)
    first_of: dict[str, str] = {}
    for seed in chosen.seeds or file.seeds:
        done: dict[str, Cell] = {}
        for name in _in_order(names, plans, where):
            plan = plans[name]
            before = done[plan.after] if plan.after is not None else None
            overrides = [*plan.axes, *chosen.set, *plan.set, f"name={name}", f"training.seed={seed}"]
            if before is not None:
                overrides = [one.replace(PREVIOUS, str(grid.folder(before))) for one in overrides]
            if grid.vocabulary is not None:
                overrides.append(f"tokenizer.path={grid.vocabulary}")
            try:
                recipe = load_recipe(base if base.is_file() else file.recipe, overrides)
            except ConfigError as error:
                raise ConfigError(f"{where}: cell {name!r}: {error}") from None
            if recipe.training.steps is None:
                raise ConfigError(f"{where}: cell {name!r}: give training.steps: cells are compared at equal steps")
            key = _key(recipe, grid, before)
            after = None if before is None else before.same_as or before.id
            cell = Cell(name, seed, plan.levels, recipe, key, after, first_of.get(key))
            first_of.setdefault(key, cell.id)
            done[name] = cell
            grid.cells.append(cell)
    return grid


@dataclass(frozen=True)
class _Plan:
    """A cell without its seed."""

    levels: dict[str, str]
    axes: list[str]
    set: list[str]
    after: str | None


def _plans(file: GridFile, where: str) -> dict[str, _Plan]:
    for levels in [*file.exclude, *(arm.levels for arm in file.arms.values())]:
        for axis, level in levels.items():
            if axis not in file.axes:
                raise ConfigError(f"{where}: unknown axis {axis!r}.{nearest(axis, file.axes, 'Axes')}")
            if level not in file.axes[axis]:
                raise ConfigError(f"{where}: axis {axis!r} has no level {level!r}.{nearest(level, file.axes[axis])}")
    plans: dict[str, _Plan] = {}
    for combination in product(*file.axes.values()) if file.axes else []:
        levels = dict(zip(file.axes, combination, strict=True))
        if not any(levels.items() >= left_out.items() for left_out in file.exclude):
            plans["-".join(combination)] = _Plan(levels, _overrides(file, levels), [], None)
    for name, arm in file.arms.items():
        if name in plans:
            raise ConfigError(f"{where}: the arm {name!r} is called as a combination of levels: give it another name")
        if arm.after is None and any(PREVIOUS in one for one in arm.set):
            raise ConfigError(f"{where}: arms.{name}.set speaks of {PREVIOUS}, but has no `after` that says which")
        plans[name] = _Plan(arm.levels, _overrides(file, arm.levels), arm.set, arm.after)
    if not plans:
        raise ConfigError(f"{where}: has no cell: give [axes.NAME] with levels, or [arms.NAME]")
    for name, plan in plans.items():
        if plan.after is not None and plan.after not in plans:
            raise ConfigError(f"{where}: arms.{name}.after: no cell {plan.after!r}.{nearest(plan.after, plans)}")
    return plans


def _overrides(file: GridFile, levels: dict[str, str]) -> list[str]:
    return [override for axis, level in levels.items() for override in file.axes[axis][level]]


def _chosen(patterns: Sequence[str], plans: dict[str, _Plan], where: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in plans):
            raise ConfigError(f"{where}: no cell {pattern!r}.{nearest(pattern, plans)}")
    return [name for name in plans if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _in_order(names: Sequence[str], plans: dict[str, _Plan], where: str) -> list[str]:
    """Those cells and what they come after, which goes first."""
    ordered: dict[str, None] = {}

    def add(name: str, chain: tuple[str, ...]) -> None:
        if name in chain:
            raise ConfigError(f"{where}: `after` goes in a circle: {' → '.join([*chain, name])}")
        before = plans[name].after
        if before is not None:
            add(before, (*chain, name))
        ordered[name] = None

    for name in names:
        add(name, ())
    return list(ordered)


def _check_figures(file: GridFile, where: str) -> None:
    """Raises ConfigError for headline figures and means that no probe will give; the others only a run can tell."""
    if "exp3" in file.headline:
        raise ConfigError(f"{where}: headline: exp3 has bits, ranks and shares, no mean: name exp3/caption, …")
    for name, mean in file.means.items():
        if name in EXPERIMENTS:
            raise ConfigError(f"{where}: means.{name} is called as an experiment: give it another name")
        if name not in file.headline:
            raise ConfigError(f"{where}: means.{name} is not in headline, so nothing would show it")
        for figure in mean.of:
            experiment, task, *_ = [*figure.split("/"), ""]
            known = EMBEDDED.get(experiment)
            if known is not None and task not in known:
                raise ConfigError(f"{where}: means.{name}: no task {task!r} in {experiment}.{nearest(task, known)}")


def _check_comparison(comparison: Comparison, plans: dict[str, _Plan], file: GridFile, where: str) -> None:
    for name in [*comparison.first, *comparison.second]:
        if name not in plans:
            raise ConfigError(f"{where}: comparisons: no cell {name!r}.{nearest(name, plans)}")
    for name in comparison.control:
        if name not in file.comparisons:
            raise ConfigError(f"{where}: comparisons: no control {name!r}.{nearest(name, file.comparisons)}")
    for name in comparison.expect:
        if file.headline and name not in file.headline:
            raise ConfigError(
                f"{where}: comparisons: expect speaks of {name!r}.{nearest(name, file.headline, 'Headline')}"
            )
    if len(comparison.first) != len(comparison.second):
        raise ConfigError(
            f"{where}: the comparison {comparison.question!r} pairs {len(comparison.first)} cells with "
            f"{len(comparison.second)}: give as many of both"
        )


def _key(recipe: Recipe, grid: Grid, before: Cell | None) -> str:
    """Hash of a recipe without its name, and without where things lie."""
    tree = {name: value for name, value in _said(recipe).items() if name not in ("name", "description")}
    text = json.dumps(tree, sort_keys=True, default=str)
    if grid.file.vocabulary is not None:
        text = text.replace(json.dumps(str(grid.vocabulary)), grid.file.vocabulary.model_dump_json())
    if before is not None:
        text = text.replace(json.dumps(str(grid.folder(before)))[1:-1], before.key)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def probe_key(cell: Cell, grid: Grid) -> str:
    """As a cell's key, of what decides the figures of its probes."""
    parts = [cell.key]
    if grid.generator is not None:
        parts.append(grid.generator)
    said = _said(grid.file.probe)
    said.pop("device", None)
    if said:
        parts.append(hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16])
    return "-".join(parts)


def _said(value: object) -> Any:
    """A recipe without what is as by default, so that a key that is new to the program changes no hash."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        kept = {name: getattr(value, name) for name in fields}
        return {name: _said(one) for name, one in kept.items() if name == "kind" or one != fields[name].default}
    if isinstance(value, dict):
        return {name: _said(one) for name, one in cast("dict[str, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_said(one) for one in cast("Sequence[object]", value)]
    return value
