"""Which charts a grid's report has: finished cells in, PNGs in both colourings out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from clip_train.ablation import figures, findings
from clip_train.ablation.findings import Finding
from clip_train.ablation.grid import Cell, Grid
from clip_train.ablation.results import Results, less_is_better
from clip_train.errors import UserError
from clip_train.evaluation.plots import DARK, LIGHT, Theme, png
from clip_train.evaluation.run_folder import read_run
from clip_train.evaluation.statistics import Floats

Charts = dict[str, tuple[bytes, bytes]]
"""PNGs in both colourings, by name."""

TITLES = {
    "headline": (
        "Every arm",
        "A dot a seed, a bar at their mean, the shadow from the worst seed to the best; the dotted line is chance. An "
        "experiment's figure is the mean over its tasks, 0 being chance and 100 perfect.",
    ),
    "heatmaps": (
        "Over the grid's axes",
        "Mean over seeds, ± their standard deviation. Each square has its own scale of colour.",
    ),
    "differences": (
        "Differences",
        "First less second, more being better, × 100: points of accuracies, recalls and areas, hundredths of "
        "correlations, bits and losses, of means over tasks points between chance (0) and perfect (100). 95 % "
        "intervals over items (paired bootstrap of groups that belong together) and seeds (spread pooled over all "
        "arms), by t. Filled and coloured: p < 0.05 after Holm's correction over all rows of this chart.",
    ),
    "tasks": (
        "Every task",
        "Mean over seeds; bold is the best of its column, by chance maybe: see the differences. Colour goes from the "
        "worst of a column to the best. A probe's pool is chosen on development items, whatever pool was trained.",
    ),
    "pictures": (
        "What the generator draws",
        "The same frozen generator, told by each frozen encoder through one linear prefix; drawn with one seed, not "
        "chosen.",
    ),
    "learning": ("How they learned", "Loss of the batch over steps, mean over seeds, smoothed over 8 % of the run."),
}


def draw_charts(results: Results, found: Sequence[Finding]) -> Charts:
    """All that the finished cells allow. Writes the pictures of experiment 3 into the grid's `report` folder."""
    draw: dict[str, Callable[[Theme], Figure] | None] = {
        "headline": _headline(results),
        "heatmaps": _heatmaps(results),
        "differences": _differences(results, found),
        "tasks": _tasks(results),
        "learning": _learning(results),
    }
    charts = {name: (png(one(LIGHT), LIGHT), png(one(DARK), DARK)) for name, one in draw.items() if one is not None}
    pictures = _pictures(results)
    return charts if pictures is None else charts | {"pictures": (pictures, pictures)}


def _headline(results: Results) -> Callable[[Theme], Figure] | None:
    panels = [
        figures.Dots(
            _short(results, name), {cell: results.values(cell, name) for cell in results.cells}, results.chance(name),
            results.is_percent(name),
        )
        for name in results.headline
    ]  # fmt: skip
    groups = _colour_groups(results)
    return (lambda theme: figures.dots(panels, results.cells, groups, theme)) if panels else None


def _heatmaps(results: Results) -> Callable[[Theme], Figure] | None:
    axes = results.grid.file.axes
    if len(axes) != 2:
        return None
    (_, rows), (_, columns) = axes.items()
    panels: list[figures.Heat] = []
    for name in results.headline:
        values = np.full((len(rows), len(columns)), np.nan)
        spread = np.zeros_like(values)
        for (y, row), (x, column) in ((a, b) for a in enumerate(rows) for b in enumerate(columns)):
            of_cell = results.values(f"{row}-{column}", name)
            if len(of_cell):
                values[y, x] = of_cell.mean()
                spread[y, x] = of_cell.std(ddof=1) if len(of_cell) > 1 else 0.0
        if not np.isnan(values).all():
            panels.append(figures.Heat(_short(results, name), values, spread, results.is_percent(name)))
    return (lambda theme: figures.heatmaps(panels, list(rows), list(columns), theme)) if panels else None


def _differences(results: Results, found: Sequence[Finding]) -> Callable[[Theme], Figure] | None:
    groups: dict[str, list[figures.Effect]] = {}
    for one in found:
        hundred = type(one.interval)(
            100 * one.interval.estimate, 100 * one.interval.low, 100 * one.interval.high, one.interval.level,
            one.interval.p,
        )  # fmt: skip
        title = f"{one.comparison.question}   {findings.sides(one.comparison)}"
        groups.setdefault(title, []).append(figures.Effect(_short(results, one.headline), hundred, one.sure))
    return (lambda theme: figures.forest(groups, theme, "difference × 100")) if groups else None


def _tasks(results: Results) -> Callable[[Theme], Figure] | None:
    names = list(dict.fromkeys(task for name in results.headline for task in results.tasks(name)))
    if not names:
        return None
    means = {(cell, name): results.mean(cell, name) for cell in results.cells for name in names}
    better = [-1.0 if less_is_better(results.row(name)) else 1.0 for name in names]
    values = np.array(
        [[means[cell, n] * sign for n, sign in zip(names, better, strict=True)] for cell in results.cells]
    )
    written = [[results.written(name, means[cell, name]) for name in names] for cell in results.cells]
    labels = [
        f"{name.partition('/')[0][3:]} · {name.partition('/')[2].removesuffix('/centred')}"
        if name.startswith("exp")
        else _short(results, name)
        for name in names
    ]
    return lambda theme: figures.tasks(results.cells, labels, values, written, theme)


def _learning(results: Results) -> Callable[[Theme], Figure] | None:
    groups = _colour_groups(results)
    panels: dict[str, list[figures.Curve]] = {}
    titles = {"infonce": "contrastive loss", "sigmoid": "sigmoid loss", "mlm": "masked tokens", "clm": "next tokens"}
    for name in results.cells:
        curves = [_curve(results.grid, cell) for cell in results.grid.cells if cell.name == name]
        known = [one for one in curves if one is not None]
        if not known:
            continue
        shortest = min(len(steps) for steps, _ in known)
        cell = next(cell for cell in results.grid.cells if cell.name == name)
        values = np.mean([values[:shortest] for _, values in known], axis=0)
        kind = cell.recipe.loss.kind
        panels.setdefault(titles.get(kind, kind), []).append(
            figures.Curve(name, known[0][0][:shortest], values, groups.get(name, 0), _dash(results.grid, cell))
        )
    return (lambda theme: figures.learning(panels, theme)) if panels else None


def _pictures(results: Results) -> bytes | None:
    """The grid of experiment 3 for the arms that are compared alone, as PNG; None where it was not run."""
    grid = results.grid
    folder = grid.out / "generator"
    comparisons = grid.file.comparisons.values()
    names = dict.fromkeys(name for one in comparisons if len(one.first) == 1 for name in [*one.second, *one.first])
    cells = [cell for cell in grid.cells if cell.name in names and cell.seed == results.seeds[0]]
    probed = {
        name: grid.folder(cell) / "probe"
        for name in names
        for cell in cells
        if cell.name == name and (name, cell.seed) in results.by_cell
    }
    if grid.generator is None or not folder.exists() or not probed:
        return None
    from clip_train.evaluation.text_to_image.generator import load_generator
    from clip_train.evaluation.text_to_image.grid import grid_of_codes
    from clip_train.evaluation.text_to_image.score import GRID, read_grid

    out = grid.out / "report" / "pictures.png"
    try:
        generator = load_generator(folder)
        grid_of_codes(generator, GRID, {name: read_grid(path, generator) for name, path in probed.items()}, out)
    except UserError:  # the probes were run without it
        return None
    return out.read_bytes()


def _short(results: Results, headline: str) -> str:
    """A figure in few words: without its data set, where all figures of its kind are of that one."""
    kind, *rest = headline.split("/")
    of_kind = {name.split("/")[1] for name in results.headline if name.startswith(f"{kind}/")}
    label = results.label(headline)
    if kind in ("zeroshot", "retrieval", "language") and len(of_kind) == 1:
        data = rest[0].replace("_", " ")
        label = label.replace(f", {data}", "").replace(f" {data},", ",")
    return label


def _curve(grid: Grid, cell: Cell) -> tuple[Floats, Floats] | None:
    try:
        return read_run(grid.folder(cell)).curves.get("loss")
    except UserError:
        return None


def _colour_groups(results: Results) -> dict[str, int]:
    """A colour for each level of the first axis; another one for arms."""
    first = next(iter(results.grid.file.axes), None)
    levels = list(results.grid.file.axes[first]) if first is not None else []
    groups: dict[str, int] = {}
    for cell in results.grid.cells:
        is_arm = cell.name in results.grid.file.arms
        groups[cell.name] = len(levels) if is_arm or first is None else levels.index(cell.levels[first])
    return groups


def _dash(grid: Grid, cell: Cell) -> int:
    """A style of line for each level of the second axis, and for each arm."""
    if cell.name in grid.file.arms:
        return list(grid.file.arms).index(cell.name)
    if len(grid.file.axes) < 2:
        return 0
    second = list(grid.file.axes)[1]
    return list(grid.file.axes[second]).index(cell.levels[second])
