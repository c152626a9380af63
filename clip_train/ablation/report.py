"""A grid's report: `report.html` (self-contained), `report.md` with the same words, and `report/*.png`."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from clip_train.ablation import findings, summary
from clip_train.ablation.charts import TITLES, Charts, draw_charts
from clip_train.ablation.findings import Finding
from clip_train.ablation.grid import Grid
from clip_train.ablation.results import Results
from clip_train.errors import UserError
from clip_train.evaluation import page
from clip_train.evaluation.page import text


def write_report(grid: Grid) -> Path:
    """Write the report of the finished cells into the grid's folder; the path of the page.

    Raises UserError where no cell is finished.
    """
    results = Results(grid)
    if not results.rows:
        raise UserError(f"{grid.out}: no cell is finished, so there is nothing to report")
    found = findings.find(results)
    folder = grid.out / "report"
    folder.mkdir(exist_ok=True)
    charts = draw_charts(results, found)
    for name, (light, _) in charts.items():
        (folder / f"{name}.png").write_bytes(light)
    sections = _sections(results, found, charts)
    (grid.out / "report.md").write_text(_markdown(results, found, sections), encoding="utf-8")
    out = grid.out / "report.html"
    body = _html(results, found, sections, charts)
    out.write_text(page.page(f"{grid.file.name} · clip-train", body), encoding="utf-8")
    return out


@dataclass(frozen=True)
class _Section:
    """A heading with sentences, a chart or a table under it."""

    name: str
    title: str
    note: str = ""
    sentences: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    """Lines of cells; the first is the head."""


def _sections(results: Results, found: Sequence[Finding], charts: Charts) -> list[_Section]:
    shown, left = findings.claims(found)
    return [
        _Section("claims", "What it shows", sentences=shown or ["Nothing, after the correction."]),
        _Section("open", "What it leaves open", summary.OPEN, left or ["Nothing that was asked."]),
        *(_Section(name, *TITLES[name]) for name in charts),
        _Section("tests", "All tests", "Corrected as one family.", table=summary.tests(found)),
        _Section("figures", "All figures", "Mean ± standard deviation over seeds.", table=summary.all_figures(results)),
        _Section("limits", "What it cannot claim", sentences=summary.limits(results, found)),
        _Section("runs", "Runs", table=summary.runs(results)),
    ]


def _html(results: Results, found: Sequence[Finding], sections: Sequence[_Section], charts: Charts) -> str:
    file = results.grid.file
    parts = [
        f'<header><p class="run"><b>{text(file.name)}</b> · clip-train</p>',
        f"<h1>{text(summary.title(results, found))}</h1>",
        f'<p class="lead">{text(file.description)}</p>{page.stats(summary.stats(results, found))}</header>',
    ]
    for one in sections:
        if one.name in charts:
            body = page.chart(*charts[one.name], one.title)
        else:
            body = _html_table(one.table) if one.table else _html_list(one.sentences)
        parts.append(page.section(one.name, one.title, one.note, body))
    parts.append(
        f"<footer>Written by clip-train {text(version('clip-train'))} on {text(_machine())}. table.csv has every "
        "figure of every run.</footer>"
    )
    return "\n".join(parts)


def _markdown(results: Results, found: Sequence[Finding], sections: Sequence[_Section]) -> str:
    file = results.grid.file
    lines = [f"# {file.name}", "", file.description, "", f"**{summary.title(results, found)}.**", ""]
    for one in sections:
        lines += [f"## {one.title}", ""]
        if one.note:
            lines += [one.note, ""]
        if one.table:
            lines += [*_markdown_table(one.table), ""]
        elif one.sentences:
            lines += [*(f"- {sentence}" for sentence in one.sentences), ""]
        else:
            lines += [f"![{one.title}](report/{one.name}.png)", ""]
    return "\n".join([*lines, f"On {_machine()}.", ""])


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, Python {platform.python_version()}"


def _html_list(items: Sequence[str]) -> str:
    return '<div class="card"><ul class="notes">' + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul></div>"


def _html_table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    cells = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in line) + "</tr>" for line in rest)
    return f'<div class="card wide"><table><tr>{cells}</tr>{body}</table></div>'


def _markdown_table(lines: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in rest)]
