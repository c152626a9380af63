"""A grid's report: `report.html` (self-contained), `report.md` with the same words, and `report/*.png`."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from clip_train.ablation import cells as folders
from clip_train.ablation import figures, findings
from clip_train.ablation.findings import Finding
from clip_train.ablation.grid import Cell, Grid
from clip_train.ablation.plan import duration
from clip_train.ablation.results import UNIT_SCALE, Results, less_is_better
from clip_train.errors import UserError
from clip_train.evaluation import page
from clip_train.evaluation.page import text
from clip_train.evaluation.plots import DARK, LIGHT, Theme, png
from clip_train.evaluation.run_folder import read_run
from clip_train.evaluation.statistics import Floats

Charts = dict[str, tuple[bytes, bytes]]
"""PNGs in both colourings, by name."""


def write_report(grid: Grid) -> Path:
    """Write the report of the finished cells into the grid's folder; the path of the page.

    Raises UserError where no cell is finished.
    """
    results = Results(grid)
    if not results.rows:
        raise UserError(f"{grid.out}: no cell is finished, so there is nothing to report")
    found = findings.find(results)
    charts = _charts(results, found)
    pictures = _pictures(results)
    if pictures is not None:
        charts["pictures"] = (pictures, pictures)
    folder = grid.out / "report"
    folder.mkdir(exist_ok=True)
    for name, (light, _) in charts.items():
        (folder / f"{name}.png").write_bytes(light)
    (grid.out / "report.md").write_text(_markdown(results, found, charts), encoding="utf-8")
    out = grid.out / "report.html"
    out.write_text(page.page(f"{grid.file.name} · clip-train", _html(results, found, charts)), encoding="utf-8")
    return out


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
        "First less second, more being better, × 100: percentage points of accuracies and recalls, hundredths of "
        "correlations. 95 % intervals over items (paired bootstrap) and seeds (their spread, t with Satterthwaite's "
        "degrees of freedom). Filled and coloured: p < 0.05 after Holm's correction over all rows of this chart.",
    ),
    "tasks": (
        "Every task",
        "Mean over seeds; bold is the best of its column; colour goes from the worst of a column to the best.",
    ),
    "pictures": (
        "What the generator draws",
        "The same frozen generator, told by each frozen encoder through one linear prefix; drawn with one seed, not "
        "chosen.",
    ),
    "learning": ("How they learned", "Loss of the batch over steps, mean over seeds, smoothed over 8 % of the run."),
}


OPEN = "Differences × 100 that are not told from zero; those within the interval are not excluded."


def _charts(results: Results, found: Sequence[Finding]) -> Charts:
    draw: dict[str, Callable[[Theme], Figure] | None] = {
        "headline": _headline(results),
        "heatmaps": _heatmaps(results),
        "differences": _differences(results, found),
        "tasks": _tasks(results),
        "learning": _learning(results),
    }
    return {name: (png(one(LIGHT), LIGHT), png(one(DARK), DARK)) for name, one in draw.items() if one is not None}


def _headline(results: Results) -> Callable[[Theme], Figure] | None:
    panels = [
        figures.Dots(
            _short(name), {cell: results.values(cell, name) for cell in results.cells}, _chance(results, name),
            _percent(results, name),
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
            panels.append(figures.Heat(_short(name), values, spread, _percent(results, name)))
    return (lambda theme: figures.heatmaps(panels, list(rows), list(columns), theme)) if panels else None


def _differences(results: Results, found: Sequence[Finding]) -> Callable[[Theme], Figure] | None:
    groups: dict[str, list[figures.Effect]] = {}
    for one in found:
        hundred = type(one.interval)(
            100 * one.interval.estimate, 100 * one.interval.low, 100 * one.interval.high, one.interval.level,
            one.interval.p,
        )  # fmt: skip
        title = f"{one.comparison.question}   {findings.sides(one.comparison)}"
        groups.setdefault(title, []).append(figures.Effect(_short(one.headline), hundred, one.sure))
    return (lambda theme: figures.forest(groups, theme, "difference × 100")) if groups else None


def _tasks(results: Results) -> Callable[[Theme], Figure] | None:
    names = list(dict.fromkeys(task for name in results.headline for task in results.tasks(name)))
    if not names:
        return None
    means = {(cell, name): _mean(results, cell, name) for cell in results.cells for name in names}
    better = [-1.0 if less_is_better(results.row(name)) else 1.0 for name in names]
    values = np.array(
        [[means[cell, n] * sign for n, sign in zip(names, better, strict=True)] for cell in results.cells]
    )
    written = [[_written(results, name, means[cell, name]) for name in names] for cell in results.cells]
    labels = [
        f"{name.partition('/')[0][3:]} · {name.partition('/')[2]}" if name.startswith("exp") else _short(name)
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


def _curve(grid: Grid, cell: Cell) -> tuple[Floats, Floats] | None:
    try:
        return read_run(grid.folder(cell)).curves.get("loss")
    except UserError:
        return None


def _html(results: Results, found: Sequence[Finding], charts: Charts) -> str:
    grid = results.grid
    shown, open_ = findings.claims(found)
    parts = [
        f'<header><p class="run"><b>{text(grid.file.name)}</b> · clip-train</p><h1>{text(_title(results, found))}</h1>'
        f'<p class="lead">{text(grid.file.description)}</p>{page.stats(_stats(results, found))}</header>',
        page.section("claims", "What it shows", "", _list(shown or ["Nothing, after the correction."])),
        page.section("open", "What it leaves open", OPEN, _list(open_)) if open_ else "",
    ]
    for name, (light, dark) in charts.items():
        title, note = TITLES[name]
        parts.append(page.section(name, title, note, page.chart(light, dark, title)))
    parts += [
        page.section("tests", "All tests", "Corrected as one family.", _html_table(_tests(found))),
        page.section("figures", "All figures", "Mean ± standard deviation over seeds.", _html_table(_figures(results))),
        page.section("limits", "What it cannot claim", "", _list(_limits(results))),
        page.section("runs", "Runs", "", _html_table(_runs(results))),
        f"<footer>Written by clip-train {text(version('clip-train'))} on {text(_machine())}. table.csv has every "
        "figure of every run.</footer>",
    ]
    return "\n".join(part for part in parts if part)


def _markdown(results: Results, found: Sequence[Finding], charts: Charts) -> str:
    shown, open_ = findings.claims(found)
    lines = [f"# {results.grid.file.name}", "", results.grid.file.description, "", f"**{_title(results, found)}.**", ""]
    lines += ["## What it shows", "", *(f"- {one}" for one in shown or ["Nothing, after the correction."]), ""]
    lines += ["## What it leaves open", "", OPEN, "", *(f"- {one}" for one in open_ or ["Nothing that was asked."]), ""]
    for name in charts:
        title, note = TITLES[name]
        lines += [f"## {title}", "", note, "", f"![{title}](report/{name}.png)", ""]
    lines += ["## All tests", "", *_markdown_table(_tests(found)), ""]
    lines += [
        "## All figures",
        "",
        "Mean ± standard deviation over seeds.",
        "",
        *_markdown_table(_figures(results)),
        "",
    ]
    lines += ["## What it cannot claim", "", *(f"- {one}" for one in _limits(results)), ""]
    lines += ["## Runs", "", *_markdown_table(_runs(results)), "", f"On {_machine()}.", ""]
    return "\n".join(lines)


def _title(results: Results, found: Sequence[Finding]) -> str:
    sure = sum(one.sure for one in found)
    expected = [one.verdict for one in found if one.verdict]
    tail = ""
    if expected:
        counts = ", ".join(
            f"{expected.count(word)} {word}" for word in ("reproduced", "refuted", "undecided") if word in expected
        )
        tail = f"; of {len(expected)} known directions {counts}"
    return f"{sure} of {len(found)} differences are told from zero{tail}"


def _stats(results: Results, found: Sequence[Finding]) -> list[tuple[str, str]]:
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


def _tests(found: Sequence[Finding]) -> list[list[str]]:
    lines = [["question", "first − second", "figure", "difference × 100 [95 %]", "p", "Holm p", "known direction"]]
    return lines + [
        [
            one.comparison.question, findings.sides(one.comparison), findings.label(one.headline),
            findings.difference(one.interval), findings.p_value(one.interval.p).removeprefix("= "),
            findings.p_value(one.p_holm).removeprefix("= "), one.verdict,
        ]
        for one in found
    ]  # fmt: skip


def _figures(results: Results) -> list[list[str]]:
    names = _all_tasks(results)
    lines = [["figure", "measure", "chance", "items", *results.cells]]
    for name in names:
        row = results.row(name)
        chance = "" if row.chance is None else _written(results, name, row.chance)
        cells = [_with_spread(results, cell, name) for cell in results.cells]
        lines.append([findings.label(name), row.measure, chance, "" if row.n is None else f"{row.n:,}", *cells])
    return lines


def _runs(results: Results) -> list[list[str]]:
    lines = [["arm", "steps", "samples", "parameters", "seconds, mean", "recipe"]]
    for name in results.cells:
        rows = [row for row in results.rows if row.cell == name]
        cell = next(cell for cell in results.grid.cells if cell.name == name)
        seconds = np.mean(list({row.seed: row.seconds for row in rows}.values()))
        lines.append(
            [
                name, f"{cell.steps:,}", f"{cell.steps * cell.recipe.data.batch_size:,}", f"{rows[0].parameters:,}",
                f"{seconds:,.0f}", rows[0].recipe_hash,
            ]
        )  # fmt: skip
    return lines


def _limits(results: Results) -> list[str]:
    grid = results.grid
    trained = [cell for cell in grid.cells if cell.steps and cell.name in results.cells]
    seen = max((cell.steps * cell.recipe.data.batch_size for cell in trained), default=0)
    sizes = [row.parameters for row in results.rows]
    seeds = len(results.seeds)
    lines = [
        f"It speaks of models of {min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} M parameters that saw at most "
        f"{seen:,} samples each. A difference at this size need not hold, and one that is missing may appear, where "
        "data and models are a thousand times larger.",
        "All arms have the same learning rate, schedule and batch, chosen once for all and tuned for none: an arm that "
        "would like others is at a disadvantage.",
        "Probes are linear, on frozen features, with the pool chosen on development items: they say what can be read "
        "out so, not what the tower could learn by fine-tuning.",
    ]
    if seeds == 1:
        lines.append(
            "There is one seed: intervals are over items alone, so a difference that is told from zero is one between "
            "these two runs, not between the two arms."
        )
    else:
        lines.append(
            f"{seeds} seeds: where they disagree, intervals are wide and small differences cannot be shown. What is "
            "not told from zero is not shown to be zero."
        )
    missing = [cell.id for cell in grid.runs if not folders.is_finished(grid, cell)]
    if missing:
        lines.append(f"{len(missing)} runs are not finished and left out: {', '.join(missing)}.")
    unmeasured = [name for name in grid.file.headline if not results.tasks(name)]
    if unmeasured:
        lines.append(f"Not measured: {', '.join(unmeasured)}.")
    return lines


def _all_tasks(results: Results) -> list[str]:
    single = list(chain.from_iterable(results.tasks(name) for name in results.headline))
    return list(dict.fromkeys([*single, *(name for name in results.metrics if name.startswith("exp"))]))


def _mean(results: Results, cell: str, name: str) -> float:
    values = [rows[name].value for (one, _), rows in results.by_cell.items() if one == cell and name in rows]
    return float(np.mean(values)) if values else float("nan")


def _with_spread(results: Results, cell: str, name: str) -> str:
    values = [rows[name].value for (one, _), rows in results.by_cell.items() if one == cell and name in rows]
    if not values:
        return "–"
    spread = f" ± {_written(results, name, float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return _written(results, name, float(np.mean(values))) + spread


def _written(results: Results, name: str, value: float) -> str:
    if np.isnan(value):
        return "–"
    return f"{100 * value:.1f}" if _percent(results, name) else f"{value:.3f}"


def _percent(results: Results, headline: str) -> bool:
    tasks = results.tasks(headline)
    return tasks != [headline] or results.row(headline).measure in UNIT_SCALE


def _chance(results: Results, headline: str) -> float | None:
    return 0.0 if results.tasks(headline) != [headline] else results.row(headline).chance


def _short(headline: str) -> str:
    return findings.label(headline).replace(", openclipart", "").replace(" unseen style", "")


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


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, Python {platform.python_version()}"


def _list(items: Sequence[str]) -> str:
    return '<div class="card"><ul class="notes">' + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul></div>"


def _html_table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    cells = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in line) + "</tr>" for line in rest)
    return f'<div class="card wide"><table><tr>{cells}</tr>{body}</table></div>'


def _markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in rest)]
