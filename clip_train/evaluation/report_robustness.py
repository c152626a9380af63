"""The report's table in colours: accuracy on pictures that were spoiled, by corruption and severity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from clip_train.evaluation import page, plots
from clip_train.evaluation.plots import DARK, LIGHT, Floats, Theme, percent
from clip_train.evaluation.run_folder import Run, words


def robustness(run: Run, images: dict[str, bytes]) -> str:
    """A section with a chart a task; empty where nothing was spoiled."""
    charts: list[str] = []
    for name, figures in run.tasks("zeroshot").items():
        rows, columns, values = _table(figures)
        if not rows:
            continue
        clean, mean = figures.get("top1", 0.0), figures.get("corrupted_top1", 0.0)
        relative = f", {percent(figures['relative_robustness'])} of it" if "relative_robustness" in figures else ""
        title = f"{words(name)}: {percent(clean)} on clean pictures, {percent(mean)} on spoiled ones{relative}"

        def draw(theme: Theme, rows: list[str] = rows, columns: list[str] = columns, values: Floats = values) -> Figure:
            return heatmap(rows, columns, values, theme)

        key = f"robustness_{name}"
        images[key] = plots.png(draw(LIGHT), LIGHT)
        charts.append(f"<h3>{page.text(title)}</h3>" + page.chart(images[key], plots.png(draw(DARK), DARK), title))
    if not charts:
        return ""
    note = "Zero-shot top-1 by what was done to the pictures and how badly (1 to 5); the last row is the mean of all."
    return page.section("robustness", "How it bears spoiled pictures", note, *charts)


def _table(figures: Mapping[str, float]) -> tuple[list[str], list[str], Floats]:
    """Names of corruptions, names of columns, and accuracies `(rows, columns)`, clean ones first."""
    found: dict[str, dict[int, float]] = {}
    for figure, value in figures.items():
        head, _, rest = figure.partition("/")
        name, _, severity = rest.partition("/")
        if head == "corrupted" and severity.isdecimal():
            found.setdefault(name, {})[int(severity)] = value
    if not found:
        return [], [], np.empty((0, 0))
    severities = sorted({severity for own in found.values() for severity in own})
    clean = figures.get("top1", np.nan)
    values = np.array([[clean, *(own.get(severity, np.nan) for severity in severities)] for own in found.values()])
    rows = [words(name) for name in found]
    if len(found) > 1:
        rows, values = [*rows, "mean"], np.vstack([values, values.mean(0)])
    return rows, ["clean", *map(str, severities)], values


def heatmap(rows: list[str], columns: list[str], values: Floats, theme: Theme) -> Figure:
    """Shares `(rows, columns)` as cells from the paper's colour (0) to the model's (the largest share)."""
    shades = LinearSegmentedColormap.from_list("model", [to_rgb(theme.paper), to_rgb(theme.model)])
    most = max(float(np.nanmax(values)), 1e-9)
    with plots.styled(theme):
        figure = Figure(figsize=(9.8, 0.29 * len(rows) + 0.5), layout="constrained")
        axes = figure.add_subplot()
        axes.pcolormesh(values, cmap=shades, vmin=0, vmax=most, edgecolors=theme.paper, linewidth=2)
        for r, c in np.ndindex(*values.shape):
            share = float(values[r, c])
            if np.isnan(share):
                continue
            ink = theme.paper if share > 0.6 * most else theme.ink
            weight = "bold" if rows[r] == "mean" else "normal"
            axes.text(c + 0.5, r + 0.5, percent(share), ha="center", va="center", color=ink, fontweight=weight)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.tick_params(length=0, labelcolor=theme.ink)
        axes.xaxis.tick_top()
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return figure
