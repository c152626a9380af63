"""What a grid's report says beside its charts: headline counts, tables as lists of lines, and limits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from clip_train.ablation import cells as folders
from clip_train.ablation import findings
from clip_train.ablation.findings import Finding
from clip_train.ablation.grid import Cell, Grid
from clip_train.ablation.plan import duration
from clip_train.ablation.results import Results

OPEN = "Differences × 100 that are not told from zero; those within the interval are not excluded."


def title(results: Results, found: Sequence[Finding]) -> str:
    """In a sentence: how many differences were found, and what became of the known directions."""
    sure = sum(one.sure for one in found)
    expected = [one.verdict for one in found if one.verdict]
    tail = ""
    if expected:
        counts = ", ".join(
            f"{expected.count(word)} {word}"
            for word in ("reproduced", "refuted", "undecided", "not testable", "control not run")
            if word in expected
        )
        tail = f"; of {len(expected)} known directions {counts}"
    return f"{sure} of {len(found)} differences are told from zero{tail}"


def stats(results: Results, found: Sequence[Finding]) -> list[tuple[str, str]]:
    """Figures for the head of the page, each with what it counts."""
    runs = [cell for cell in results.grid.runs if folders.is_finished(results.grid, cell)]
    seconds = sum(folders.seconds_of(results.grid, cell) or 0.0 for cell in runs)
    samples = sum(cell.steps * cell.recipe.data.batch_size for cell in runs)
    return [
        (f"{len(results.cells)}", "arms"),
        (f"{len(results.seeds)}", f"seed{'s' * (len(results.seeds) > 1)}"),
        (f"{len(runs)}", f"runs of {duration(seconds / max(1, len(runs)))} on average"),
        (f"{samples / 1e6:.2f} M", "samples seen in all"),
        (f"{len(found)}", "tests in one family"),
    ]


def tests(found: Sequence[Finding]) -> list[list[str]]:
    """Every comparison, a line each."""
    lines = [
        ["question", "first − second", "figure", "difference × 100 [95 %]", "p", "Holm p", "seeds", "known direction"]
    ]
    return lines + [
        [
            one.comparison.question, findings.sides(one.comparison), one.label,
            findings.difference(one.interval), findings.p_value(one.interval.p).removeprefix("= "),
            findings.p_value(one.p_holm).removeprefix("= "), str(one.seeds), one.verdict,
        ]
        for one in found
    ]  # fmt: skip


def all_figures(results: Results) -> list[list[str]]:
    """Every figure of every arm, mean ± standard deviation over seeds."""
    names = _all_tasks(results)
    lines = [["figure", "measure", "chance", "items", *results.cells]]
    for name in names:
        row = results.row(name)
        chance = "" if row.chance is None else results.written(name, row.chance)
        cells = [results.with_spread(cell, name) for cell in results.cells]
        lines.append([results.label(name), row.measure, chance, "" if row.n is None else f"{row.n:,}", *cells])
    return lines


def runs(results: Results) -> list[list[str]]:
    """What every arm took."""
    lines = [["arm", "steps", "samples", "parameters", "seconds, mean", "recipe"]]
    for name in results.cells:
        rows = [row for row in results.rows if row.cell == name]
        cell = next(cell for cell in results.grid.cells if cell.name == name)
        seconds = np.mean(list({row.seed: row.seconds for row in rows}.values()))
        lines.append(
            [
                name, f"{cell.steps:,}", f"{samples_seen(results.grid, cell):,}", f"{rows[0].parameters:,}",
                f"{seconds:,.0f}", rows[0].recipe_hash,
            ]
        )  # fmt: skip
    return lines


def samples_seen(grid: Grid, cell: Cell) -> int:
    """By a cell and by those that it comes after."""
    before = 0 if cell.after is None else samples_seen(grid, grid.cell(cell.after))
    return before + cell.steps * cell.recipe.data.batch_size


def limits(results: Results, found: Sequence[Finding]) -> list[str]:
    """What the grid cannot claim, as sentences."""
    grid = results.grid
    seen = max(samples_seen(grid, cell) for cell in grid.cells if cell.name in results.cells)
    sizes = [row.parameters for row in results.rows]
    seeds = len(results.seeds)
    lines = [
        f"It speaks of models of {min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} M parameters that saw at most "
        f"{seen:,} samples each. A difference at this size need not hold, and one that is missing may appear, where "
        "data and models are a thousand times larger.",
        "All arms have the learning rate, schedule and batch of one recipe, tuned for none of them here. An arm that "
        "would like others is at a disadvantage, and one with another objective more likely so.",
        "Probes are linear, on frozen features, with the pool chosen on development items, which need not be the one "
        "that was trained: they say what can be read out so, not what the tower could learn by fine-tuning.",
    ]
    if seeds == 1:
        lines.append(
            "There is one seed: intervals are over items alone, so a difference that is told from zero is one between "
            "these two runs, not between the two arms."
        )
    else:
        lines.append(
            f"{seeds} seeds: how far a seed moves a figure is taken to be the same for all arms, and estimated from "
            "all of them. What is not told from zero is not shown to be zero: the interval says how large it may be."
        )
        if any(one.seeds < seeds for one in found):
            lines.append("Rows with fewer seeds are of cells that are not finished; with one, over items alone.")
    missing = [cell.id for cell in grid.runs if not folders.is_finished(grid, cell)]
    if missing:
        lines.append(f"{len(missing)} runs are not finished and left out: {', '.join(missing)}.")
    untested = findings.untested(results, found)
    if untested:
        lines.append(f"Not tested, for want of their cells: {', '.join(untested)}.")
    alone = dict.fromkeys(one.label for one in found if not one.items)
    if alone:
        lines.append(f"No items are kept of {', '.join(alone)}: these intervals are over seeds alone.")
    tested = {one.headline for one in found}
    left = [results.label(name) for name in results.headline if name not in tested]
    if left and grid.file.comparisons:
        lines.append(f"In no test, for want of cells, or of items or a second seed: {', '.join(left)}.")
    for name in grid.file.headline:
        if not results.tasks(name):
            missing = [one for one in (grid.file.means[name].of if name in grid.file.means else [name])
                       if one not in results.metrics]  # fmt: skip
            lines.append(f"Not measured: {', '.join(missing)}.")
    return lines


def _all_tasks(results: Results) -> list[str]:
    single = list(chain.from_iterable(results.tasks(name) for name in results.headline))
    return list(dict.fromkeys([*single, *(name for name in results.metrics if name.startswith("exp"))]))
