"""The charts of a grid's report. Plain numbers and a theme in, a `Figure` out, as in `evaluation.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from clip_train.evaluation.plots import Theme, compact, shortened, smoothed, styled
from clip_train.evaluation.statistics import Floats, Interval

GAP = 0.32
"""Inches that a row of a chart takes."""
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (2, 2)))


@dataclass(frozen=True)
class Dots:
    """One figure of every cell: a dot a seed, a bar at their mean."""

    title: str
    values: Mapping[str, Floats]
    """By cell, `(S,)`."""
    chance: float | None
    percent: bool


def dots(panels: Sequence[Dots], rows: Sequence[str], groups: Mapping[str, int], theme: Theme) -> Figure:
    """A panel a figure, four side by side, cells as rows; `groups` numbers the colours of cells."""
    colours = _colours(theme)
    wide = min(4, len(panels))
    high = -(-len(panels) // wide)
    with styled(theme):
        figure = Figure(figsize=(9.8, high * (GAP * len(rows) + 0.9)), layout="constrained")
        axes = figure.subplots(high, wide, sharey=True, squeeze=False).flatten().tolist()
        for column in axes[len(panels) :]:
            column.remove()
        for column, panel in zip(axes, panels, strict=False):
            scale = 100.0 if panel.percent else 1.0
            for y, name in enumerate(rows):
                values = scale * panel.values.get(name, np.array([]))
                if not len(values):
                    continue
                colour = colours[groups.get(name, 0) % len(colours)]
                column.plot([values.min(), values.max()], [y, y], color=colour, linewidth=5, alpha=0.18)
                column.plot(values, [y] * len(values), "o", color=colour, markersize=3.2, alpha=0.55, markeredgewidth=0)
                column.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2.2)
                column.annotate(
                    compact(float(values.mean())), (1.0, y), xycoords=("axes fraction", "data"), va="center",
                    ha="right", color=theme.ink, fontsize=7.5, xytext=(-1, 0), textcoords="offset points",
                )  # fmt: skip
            if panel.chance is not None:
                column.axvline(scale * panel.chance, color=theme.chance, linewidth=1, linestyle=(0, (2, 2)))
            low, high = column.get_xlim()
            column.set_xlim(low, high + 0.24 * (high - low))  # for the figures at the right
            title = fill(panel.title + (" (%)" if panel.percent else ""), 30)
            column.set_title(title, loc="left", fontsize=8.5)
            column.set_yticks(range(len(rows)), list(rows))
            column.set_ylim(len(rows) - 0.5, -0.5)
            column.tick_params(axis="y", labelcolor=theme.ink)
            column.xaxis.set_major_locator(MaxNLocator(4))
            column.grid(visible=False, axis="y")
    return figure


@dataclass(frozen=True)
class Heat:
    """One figure over two axes of the grid."""

    title: str
    values: Floats
    """`(levels of the first, levels of the second)`, NaN where a combination is left out."""
    spread: Floats
    """Standard deviation over seeds, likewise."""
    percent: bool


def heatmaps(panels: Sequence[Heat], rows: Sequence[str], columns: Sequence[str], theme: Theme) -> Figure:
    """A square a cell of the product, its mean written in it; each panel has its own scale."""
    wide = min(3, len(panels))
    high = -(-len(panels) // wide)
    colours = LinearSegmentedColormap.from_list("paper", [theme.paper, theme.model])
    with styled(theme):
        figure = Figure(figsize=(9.8, high * (0.52 * len(rows) + 0.75)), layout="constrained")
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(high, wide, i + 1)
            scale = 100.0 if panel.percent else 1.0
            values = scale * panel.values
            low, top = float(np.nanmin(values)), float(np.nanmax(values))
            span = top - low or 1.0
            axes.imshow(values, cmap=colours, vmin=low - 0.25 * span, vmax=top + 0.35 * span, aspect="auto")
            for y in range(len(rows)):
                for x in range(len(columns)):
                    if np.isnan(values[y, x]):
                        axes.text(x, y, "–", ha="center", va="center", color=theme.muted)
                        continue
                    spread = scale * panel.spread[y, x]
                    axes.text(
                        x, y - 0.13, f"{values[y, x]:.{_digits(top)}f}", ha="center", va="center", fontweight="bold"
                    )
                    if spread > 0:
                        under = f"± {spread:.{_digits(top)}f}"
                        axes.text(x, y + 0.24, under, ha="center", va="center", fontsize=6.5, color=theme.muted)
            axes.set_xticks(range(len(columns)), list(columns))
            axes.set_yticks(range(len(rows)), list(rows))
            axes.tick_params(labelcolor=theme.ink)
            axes.set_title(panel.title + (" (%)" if panel.percent else ""), loc="left", fontsize=8.5)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
    return figure


@dataclass(frozen=True)
class Effect:
    """A difference with its interval; `sure` where it is not zero after the correction."""

    label: str
    interval: Interval
    sure: bool


def forest(groups: Mapping[str, Sequence[Effect]], theme: Theme, unit: str) -> Figure:
    """Differences with intervals, a group under each question; filled where the corrected test is sure."""
    count = sum(len(group) for group in groups.values()) + 1.25 * len(groups)
    with styled(theme):
        figure = Figure(figsize=(9.8, 0.27 * count + 0.6), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=theme.chance, linewidth=1.2)
        y, ticks = 0.0, dict[float, str]()
        every = [effect.interval for group in groups.values() for effect in group]
        reach = max((max(abs(one.low), abs(one.high)) for one in every), default=1.0) or 1.0
        for title, group in groups.items():
            axes.text(-1.04 * reach, y + 0.1, title, fontweight="bold", fontsize=9, va="center")
            y += 1.0
            for effect in group:
                one = effect.interval
                colour = theme.muted if not effect.sure else theme.right if one.estimate > 0 else theme.wrong
                axes.plot([one.low, one.high], [y, y], color=colour, linewidth=2)
                axes.plot(
                    one.estimate,
                    y,
                    "o",
                    color=colour,
                    markersize=6,
                    markerfacecolor=colour if effect.sure else theme.paper,
                )
                axes.text(
                    1.06 * reach, y, f"{one.estimate:+.1f}", va="center", fontweight="bold" if effect.sure else "normal"
                )
                ticks[y] = effect.label
                y += 1
            y += 0.25
        axes.set_xlim(-1.08 * reach, 1.22 * reach)
        axes.set_ylim(y - 0.3, -0.6)
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.tick_params(axis="y", labelcolor=theme.ink)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
    return figure


def tasks(
    cells: Sequence[str], names: Sequence[str], values: Floats, written: Sequence[Sequence[str]], theme: Theme
) -> Figure:
    """A table of all tasks: `values (cells, tasks)` colour it, each column by itself; `written` stands in it."""
    colours = LinearSegmentedColormap.from_list("task", [theme.paper, theme.model])
    with styled(theme):
        figure = Figure(figsize=(9.8, 0.29 * len(cells) + 1.7), layout="constrained")
        axes = figure.add_subplot()
        shade = np.array(values, dtype=np.float64)
        low, high = np.nanmin(shade, axis=0), np.nanmax(shade, axis=0)
        shade = (shade - low) / np.where(high > low, high - low, 1.0)
        axes.imshow(shade, cmap=colours, vmin=-0.1, vmax=1.7, aspect="auto")
        for y, line in enumerate(written):
            for x, cell in enumerate(line):
                best = bool(values[y][x] == high[x])
                axes.text(x, y, cell, ha="center", va="center", fontsize=7, fontweight="bold" if best else "normal")
        short = [shortened(name.replace("_", " "), 26) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=38, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(cells)), list(cells))
        axes.tick_params(labelcolor=theme.ink)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return figure


@dataclass(frozen=True)
class Curve:
    """A cell's loss over steps, mean over seeds."""

    label: str
    steps: Floats
    values: Floats
    colour: int
    dash: int


def learning(panels: Mapping[str, Sequence[Curve]], theme: Theme) -> Figure:
    """A panel a loss."""
    colours = _colours(theme)
    with styled(theme):
        figure = Figure(figsize=(9.8, 3.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for column, (title, curves) in zip(axes, panels.items(), strict=True):
            for curve in curves:
                column.plot(
                    curve.steps, smoothed(curve.values, 0.08), color=colours[curve.colour % len(colours)],
                    linestyle=DASHES[curve.dash % len(DASHES)], linewidth=1.3, label=curve.label,
                )  # fmt: skip
            column.set_title(title, loc="left")
            column.set_xlabel("step")
            handles: list[Any] = [line for line in column.get_lines() if isinstance(line, Line2D)]
            column.legend(handles=handles, fontsize=6.5, ncols=2 if len(curves) > 6 else 1)
    return figure


def _colours(theme: Theme) -> tuple[str, ...]:
    return (theme.model, theme.second, theme.right, theme.wrong, theme.muted)


def _digits(top: float) -> int:
    return 1 if abs(top) >= 10 else 2 if abs(top) >= 0.995 else 3
