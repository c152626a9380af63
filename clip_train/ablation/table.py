"""One long table of a grid: a line a cell, seed and figure, as CSV and, where pyarrow is there, as parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from clip_train.ablation import cells as folders
from clip_train.ablation.grid import Cell, Grid
from clip_train.errors import ConfigError, UserError
from clip_train.from_recipe.model import build_model, build_tokenizer


@dataclass(frozen=True)
class Row:
    """One figure of one run."""

    cell: str
    seed: int
    levels: dict[str, str]
    metric: str
    """`zeroshot/TASK/top1`, `retrieval/TASK/text_to_image/r@10`, `language/TASK/loss`, `exp1/TASK`."""
    measure: str
    """What is measured: accuracy, recall, loss, auc, spearman, bits …"""
    value: float
    chance: float | None
    """What guessing reaches, where that is known."""
    n: int | None
    """Items it is taken over."""
    pool: str | None
    """Of a probe: the pool that was best on its development items."""
    seconds: float
    """Of the whole run: training, evaluation, probes."""
    parameters: int
    recipe_hash: str


def write_table(grid: Grid) -> Path:
    """Write `table.csv` (and `table.parquet`) of the finished cells into the grid's folder; the CSV's path.

    Raises ConfigError where no cell is finished, or none measured anything: a table that is there stays.
    """
    if not any(folders.is_finished(grid, cell) for cell in grid.runs):
        raise ConfigError(f"{grid.out}: no cell is finished: run the grid as it is now without --report first")
    rows = list(read_rows(grid))
    if not rows:
        raise ConfigError(f"{grid.out}: nothing was measured: give the grid probes, or its recipe evaluation.tasks")
    axes = list(grid.file.axes)
    names = [field.name for field in fields(Row)]
    at = names.index("levels")
    header = [*names[:at], *(f"axis_{axis}" for axis in axes), *names[at + 1 :]]
    lines = [
        [*_values(row, names[:at]), *(row.levels.get(axis, "") for axis in axes), *_values(row, names[at + 1 :])]
        for row in rows
    ]
    out = grid.out / "table.csv"
    aside = out.with_suffix(".csv.part")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([["" if value is None else value for value in line] for line in lines])
    aside.replace(out)
    if find_spec("pyarrow") is not None:
        import pyarrow
        import pyarrow.parquet

        columns = {name: list(column) for name, column in zip(header, zip(*lines, strict=True), strict=True)}
        aside = out.with_suffix(".parquet.part")
        pyarrow.parquet.write_table(pyarrow.table(columns), aside)
        aside.replace(out.with_suffix(".parquet"))
    return out


def read_rows(grid: Grid) -> Iterator[Row]:
    """Every figure of every finished cell; equal cells have the same ones.

    Raises UserError where cells were probed with different picture generators, whose figures do not compare.
    """
    sizes: dict[str, int] = {}
    generators: dict[str, str] = {}
    for cell in grid.cells:
        run = cell if cell.same_as is None else grid.cell(cell.same_as)
        if not folders.is_finished(grid, run):
            continue
        if cell.name not in sizes:
            sizes[cell.name] = _parameters(cell)
        for one in generators_of(grid.folder(cell), grid.file.probes):
            generators.setdefault(one, cell.id)
        if len(generators) > 1:
            known = ", ".join(f"{name} with {one}" for one, name in generators.items())
            raise UserError(f"{grid.out}: cells were probed with different generators ({known}): remove their probe/")
        for figure in read_figures(grid.folder(cell), grid.file.probes):
            yield Row(
                cell.name, cell.seed, cell.levels, **figure, seconds=folders.seconds_of(grid, run) or 0.0,
                parameters=sizes[cell.name], recipe_hash=cell.key,
            )  # fmt: skip


def read_figures(folder: Path, probes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The figures of a run: `metric, measure, value, chance, n, pool`."""
    path = folder / "eval.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, value in figures.items():
        head, _, short = name.rpartition("/")
        if short in ("top1", "top5", "per_class_mean"):
            chance = figures.get(f"{head}/chance_top5" if short == "top5" else f"{head}/chance")
            n = figures.get(f"{head}/samples")
        elif short.startswith("r@"):
            chance = figures.get(f"{head}/chance_{short}")
            n = figures.get(f"{head.rpartition('/')[0]}/{'images' if 'image_to' in head else 'captions'}")
        elif name.startswith("language/") and short in ("loss", "perplexity", "accuracy"):
            chance, n = None, figures.get(f"{head}/targets")
        else:
            continue
        measure = "recall" if short.startswith("r@") else short if short in ("loss", "perplexity") else "accuracy"
        yield {
            "metric": name, "measure": measure, "value": value, "chance": chance,
            "n": None if n is None else int(n), "pool": None,
        }  # fmt: skip
    for suite in probes:
        tree = json.loads((folder / "probe" / f"{suite}.json").read_text(encoding="utf-8"))
        for name, task in tree["tasks"].items():
            yield {
                "metric": name, "measure": task["metric"], "value": task["value"], "chance": task.get("chance"),
                "n": task.get("n"), "pool": task.get("pool"),
            }  # fmt: skip


def generators_of(folder: Path, probes: Sequence[str]) -> set[str]:
    """Fingerprints of the picture generators that a run was probed with."""
    trees = [json.loads((folder / "probe" / f"{suite}.json").read_text(encoding="utf-8")) for suite in probes]
    return {task["generator"] for tree in trees for task in tree["tasks"].values() if "generator" in task}


def _values(row: Row, names: Sequence[str]) -> list[Any]:
    return [getattr(row, name) for name in names]


def _parameters(cell: Cell) -> int:
    with torch.device("meta"):
        model = build_model(cell.recipe, build_tokenizer(cell.recipe))
    return sum(parameter.numel() for parameter in model.parameters())
