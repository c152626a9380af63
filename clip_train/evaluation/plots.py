"""Charts of a run, drawn with matplotlib's object interface (no pyplot, no global state).

Every function takes plain numbers and a `Theme` and returns a `Figure`; `png` makes bytes of one. Colours mean the
same thing everywhere: blue is the model, grey is chance, green is right, red is wrong.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

Floats = npt.NDArray[np.float64]


DPI = 180


@dataclass(frozen=True)
class Theme:
    """Colours of a chart. The same names are used by the page's style sheet."""

    ink: str
    muted: str
    line: str
    paper: str
    model: str
    second: str
    chance: str
    right: str
    wrong: str


LIGHT = Theme(
    ink="#16191d",
    muted="#626a75",
    line="#e3e6ea",
    paper="#ffffff",
    model="#2f5bea",
    second="#f08a24",
    chance="#9aa3ad",
    right="#128a5e",
    wrong="#d23b54",
)
DARK = Theme(
    ink="#eceff3",
    muted="#99a2ae",
    line="#2c323a",
    paper="#191d22",
    model="#7f9dff",
    second="#ffae5c",
    chance="#6d7681",
    right="#3ecb92",
    wrong="#ff7288",
)


def png(figure: Figure, theme: Theme, colours: int | None = 128) -> bytes:
    """The figure as a PNG on the theme's paper, with a palette of `colours` (None for pictures)."""
    out = io.BytesIO()
    with styled(theme), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captions may hold letters that no installed font has
        figure.savefig(out, format="png", dpi=DPI, facecolor=theme.paper)
    if colours is None:
        return out.getvalue()
    # A chart has few colours: a palette halves the bytes of a page that carries its pictures inside.
    with Image.open(out) as image:
        small = io.BytesIO()
        image.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


@dataclass(frozen=True)
class Panel:
    """One small chart over steps: named series, how values are written, and a reference line."""

    title: str
    series: Mapping[str, tuple[Floats, Floats]]
    unit: str = ""
    percent: bool = False
    reference: tuple[float, str] | None = None
    smooth: bool = False
    says: str | None = None
    """What stands at its upper right; the last value by default."""


def panels(items: Sequence[Panel], theme: Theme, columns: int = 3) -> Figure:
    """Small charts in a grid, all over steps."""
    columns = max(2, min(columns, len(items)))
    rows = -(-len(items) // columns)
    with styled(theme):
        figure = Figure(figsize=(9.8, (2.15 if columns > 2 else 2.6) * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr]
        for i, panel in enumerate(items):
            axes = figure.add_subplot(rows, columns, i + 1)
            _draw(axes, panel, theme)
    return figure


def _draw(axes: Any, panel: Panel, theme: Theme) -> None:
    colours = (theme.model, theme.second, theme.right)
    many = len(panel.series) > 1
    for (name, (steps, values)), colour in zip(panel.series.items(), colours, strict=False):
        if panel.smooth and len(values) > 20:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = smoothed(values)
        marker = "o" if len(values) <= 12 else None
        axes.plot(steps, values, color=colour, marker=marker, markersize=3.5, label=name if many else None)
        if not many and len(values):
            last = float(values[-1])
            says = panel.says or (percent(last) if panel.percent else f"{compact(last)} {panel.unit}".rstrip())
            axes.set_title(says, loc="right", color=colour, fontweight="bold")
    if panel.reference is not None:
        axes.axhline(panel.reference[0], color=theme.chance, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            panel.reference[1],
            (0.99, panel.reference[0]),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=theme.muted,
            fontsize=7.5,
        )
    axes.set_title(panel.title, loc="left")
    axes.margins(x=0.02, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: compact(x)))
    form = (lambda y, _: f"{100 * y:.0f} %") if panel.percent else (lambda y, _: compact(y))
    axes.yaxis.set_major_formatter(FuncFormatter(form))
    if many:
        axes.legend(loc="best", handlelength=1.2)


@dataclass(frozen=True)
class Bar:
    """One share with the share that chance would reach."""

    label: str
    value: float
    chance: float | None


def bars(groups: Mapping[str, Sequence[Bar]], theme: Theme) -> Figure:
    """Horizontal bars from 0 to 100 %, chance as a grey tick, and in words how far above it the model is."""
    count = sum(len(group) for group in groups.values()) + 1.1 * len(groups)
    with styled(theme):
        figure = Figure(figsize=(9.8, 0.27 * count + 0.45), layout="constrained")
        axes = figure.add_subplot()
        y = 0.0
        ticks: dict[float, str] = {}
        for title, group in groups.items():
            axes.text(0, y + 0.05, title, fontweight="bold", fontsize=9.5, va="center")
            y += 0.95
            for bar in group:
                axes.barh(y, 1.0, height=0.6, color=theme.line, linewidth=0, alpha=0.55)
                axes.barh(y, bar.value, height=0.6, color=theme.model, linewidth=0)
                axes.text(1.012, y, percent(bar.value), va="center", fontweight="bold")
                if bar.chance:
                    axes.plot([bar.chance] * 2, [y - 0.4, y + 0.4], color=theme.chance, linewidth=2.2)
                    note = f"{compact(bar.value / bar.chance)}× chance ({percent(bar.chance)})"
                    axes.text(1.085, y, note, va="center", color=theme.muted, fontsize=8)
                ticks[y] = bar.label
                y += 1
            y += 0.15
        axes.set_xlim(0, 1.3)
        axes.set_ylim(y - 0.45, -0.5)
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.tick_params(axis="y", labelcolor=theme.ink)
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
    return figure


@dataclass(frozen=True)
class Tile:
    """A picture in a contact sheet: lines under it, and a frame where it was right (True) or wrong (False)."""

    picture: Image.Image | None
    lines: Sequence[str]
    right: bool | None = None


def sheet(
    rows: Sequence[tuple[str, Sequence[Tile]]], theme: Theme, title: str, note: str = "", size: float = 1.02
) -> Figure:
    """Rows of pictures, each with words at its left (or none): a figure to paste into a talk."""
    wide = max(len(tiles) for _, tiles in rows)
    under = max((len(tile.lines) for _, tiles in rows for tile in tiles), default=0)
    left, top, edge = (2.5 if any(words for words, _ in rows) else 0.15), 0.8, 0.15
    across, down = size + 0.2, size + (0.22 + 0.15 * under if under else 0.16)
    width, height = left + wide * across - 0.2 + edge, top + len(rows) * down
    with styled(theme):
        figure = Figure(figsize=(width, height))
        # One set of axes in inches, y downwards: a hundred sets of their own would take seconds.
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.text(edge, 0.29, title, fontsize=13, fontweight="bold", va="center")
        axes.text(edge, 0.56, note, fontsize=8.5, color=theme.muted, va="center")
        for r, (words, tiles) in enumerate(rows):
            y = top + r * down
            axes.text(edge, y + size / 2, wrapped(words, 28, 4), fontsize=10, va="center", linespacing=1.35)
            for c, tile in enumerate(tiles):
                _draw_tile(axes, tile, left + c * across, y, size, theme)
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def _draw_tile(axes: Any, tile: Tile, x: float, y: float, size: float, theme: Theme) -> None:
    axes.add_patch(Rectangle((x, y), size, size, facecolor="#ffffff", linewidth=0, zorder=0))
    if tile.picture is not None:
        pixels = np.asarray(tile.picture.convert("RGB"))
        tall, wide = pixels.shape[:2]
        w, h = size * min(1.0, wide / tall), size * min(1.0, tall / wide)
        right, bottom = x + (size + w) / 2, y + (size + h) / 2
        axes.imshow(pixels, extent=(right - w, right, bottom, bottom - h), interpolation="lanczos", zorder=1)
    colour = theme.line if tile.right is None else theme.right if tile.right else theme.wrong
    thick = 0.8 if tile.right is None else 2.4
    axes.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor=colour, linewidth=thick))
    for i, line in enumerate(tile.lines):
        style = {"color": theme.muted} if i else {"fontweight": "bold"}
        at = (x + size / 2, y + size + 0.12 + 0.15 * i)
        axes.text(*at, shortened(line, 21), fontsize=7, ha="center", va="center", **style)


def smoothed(values: Floats, share: float = 0.03) -> Floats:
    """Mean over a centred window of `share` of the curve: no lag; narrower at its ends."""
    half = max(1, round(share * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def compact(value: float) -> str:
    """A number in at most four digits: 1.2k, 0.034, 5e-4."""
    size = abs(value)
    if size == 0 or not np.isfinite(value):
        return f"{value:.0f}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def percent(share: float) -> str:
    """53.1 %, 0.07 %, 0.0012 %: one decimal, or as many as a small share needs."""
    if share == 0 or abs(share) >= 0.00995:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.2f} %" if abs(share) >= 0.0005 else f"{100 * share:.2g} %"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def wrapped(text: str, width: int, lines: int) -> str:
    parts = textwrap.wrap(text, width) or [""]
    return "\n".join(parts[:lines]) + (" …" if len(parts) > lines else "")


@lru_cache(maxsize=1)
def _fonts() -> list[str]:
    # Only those that are there: matplotlib warns of every other one, for every text.
    there = set(font_manager.get_font_names())
    return [name for name in ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans") if name in there]


def styled(theme: Theme) -> Any:
    return mpl.rc_context(
        {
            "font.family": "sans-serif",
            "font.sans-serif": _fonts(),
            "font.size": 8.5,
            "text.color": theme.ink,
            "text.parse_math": False,
            "axes.edgecolor": theme.line,
            "axes.facecolor": theme.paper,
            "axes.labelcolor": theme.muted,
            "axes.titlecolor": theme.ink,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlepad": 8,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "grid.color": theme.line,
            "grid.linewidth": 0.8,
            "xtick.color": theme.line,
            "ytick.color": theme.line,
            "xtick.labelcolor": theme.muted,
            "ytick.labelcolor": theme.muted,
            "ytick.major.size": 0,
            "lines.linewidth": 1.7,
            "lines.solid_capstyle": "round",
            "legend.frameon": False,
            "legend.fontsize": 8,
            "legend.labelcolor": theme.ink,
        }
    )
