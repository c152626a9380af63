"""The page that shows what a run learned: `write_report(run_dir)` -> `report.html`, and PNGs under `report/`."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

from clip_train.evaluation import page, report_charts, report_galleries, report_robustness
from clip_train.evaluation.gallery import Album
from clip_train.evaluation.page import text
from clip_train.evaluation.plots import compact, percent
from clip_train.evaluation.run_folder import Run, read_run, where, words


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` (self-contained) and `report/*.png` into a run folder; the path of the page.

    What is missing is left out and said so at the end of the page. Raises UserError for a folder that is no run.
    """
    run = read_run(Path(run_dir))
    album = Album(run.folder, run.notes, run.cache)
    images: dict[str, bytes] = {}
    parts = [
        _header(run),
        report_charts.accuracy(run, images),
        report_robustness.robustness(run, images),
        *report_galleries.names(run, album, images),
        *report_galleries.searches(run, album, images),
        *report_galleries.confusions(run, album, images),
        report_charts.curves(run, images),
        report_galleries.examples(run, album, images),
        _figures(run),
        _recipe(run),
        _environment(run),
        _notes(run),
        f"<footer>Written by clip-train {text(_version('clip-train'))}. Samples are drawn at random with a fixed seed, "
        "not chosen. Ties count as wrong.</footer>",
    ]
    body = "\n".join(part for part in parts if part)
    folder = run.folder / "report"
    folder.mkdir(exist_ok=True)
    for name, data in images.items():
        (folder / f"{name}.png").write_bytes(data)
    out = run.folder / "report.html"
    aside = out.with_name("report.html.part")
    aside.write_text(page.page(f"{run.name} · clip-train", body), encoding="utf-8")
    aside.replace(out)
    return out


def headline(run: Run) -> tuple[str, str]:
    """One sentence that says what was reached, and its part to emphasise."""
    zeroshot = run.tasks("zeroshot")
    for name in _in_recipe_order(run, zeroshot):
        m = zeroshot[name]
        if {"top1", "classes", "chance"} <= m.keys():
            strong = f"{percent(m['top1'])} of {m['classes']:,.0f} concepts"
            return f"Names {strong} {where(name)}; chance is {percent(m['chance'])}", strong
    retrieval = run.tasks("retrieval")
    for name in _in_recipe_order(run, retrieval):
        m = retrieval[name]
        if "text_to_image/r@10" in m:
            strong = f"{percent(m['text_to_image/r@10'])} of captions"
            return f"Finds the picture for {strong} among its first ten of {m['images']:,.0f}", strong
    if "loss" in run.curves:
        steps, loss = run.curves["loss"]
        strong = f"a loss of {compact(float(loss[-1]))}"
        return f"Trained for {steps[-1]:,.0f} steps to {strong}", strong
    return run.name, ""


def _header(run: Run) -> str:
    sentence, strong = headline(run)
    title = text(sentence)
    if strong:
        title = title.replace(text(strong), f"<em>{text(strong)}</em>")
    description = run.recipe.get("description", "")
    lead = f'<p class="lead">{text(description)}</p>' if description else ""
    return (
        f'<header><p class="run"><b>{text(run.name)}</b> · clip-train</p><h1>{title}</h1>{lead}'
        f"{page.stats(_stats(run))}</header>"
    )


def _stats(run: Run) -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    zeroshot = run.tasks("zeroshot")
    for name in _in_recipe_order(run, zeroshot)[:1]:
        m = zeroshot[name]
        if "top1" in m:
            items.append((percent(m["top1"]), f"zero-shot top-1, {words(name)}"))
        if "top5" in m:
            items.append((percent(m["top5"]), "its top-5"))
    retrieval = run.tasks("retrieval")
    for name in _in_recipe_order(run, retrieval)[:1]:
        m = retrieval[name]
        reached, chance = m.get("text_to_image/r@10"), m.get("text_to_image/chance_r@10")
        if reached is not None and chance:
            label = f"caption → picture R@10, {words(name)} ({compact(reached / chance)}× chance)"
            items.append((percent(reached), label))
    batch = run.recipe.get("data", {}).get("batch_size")
    if "loss" in run.curves:
        steps = float(run.curves["loss"][0][-1])
        if isinstance(batch, int):
            items.append((compact(steps * batch), f"pairs seen in {steps:,.0f} steps of {batch:,}"))
        else:
            items.append((f"{steps:,.0f}", "steps"))
    if "samples_per_second" in run.curves:
        items.append((compact(float(np.median(run.curves["samples_per_second"][1]))), "pairs a second, median"))
    return items


def _figures(run: Run) -> str:
    if not run.figures:
        return ""
    # Spoiled pictures have a chart of their own, and are many.
    shown = {name: value for name, value in run.figures.items() if "/corrupted/" not in name}
    rows = [(name, _figure(name, value)) for name, value in sorted(shown.items())]
    half = -(-len(rows) // 2)
    tables = "".join(page.table(part) for part in (rows[:half], rows[half:]) if part)
    return page.section("figures", "All figures", "As in eval.json.", f'<div class="two">{tables}</div>')


def _figure(name: str, value: float) -> str:
    short = name.rpartition("/")[2]
    if short in ("samples", "classes", "images", "captions", "skipped", "train_samples"):
        return f"{value:,.0f}"
    if short == "median_rank":
        return f"{value:,.1f}"
    if short == "l2":
        return compact(value)
    return percent(value)


def _recipe(run: Run) -> str:
    if not run.recipe_text:
        return ""
    return page.section("recipe", "Recipe", "Resolved: every key with the value it had.", page.toml(run.recipe_text))


def _environment(run: Run) -> str:
    if run.environment:
        return page.section(
            "environment", "Environment", "Where it was trained.", page.table(list(run.environment.items()))
        )
    rows = [
        ("Python", sys.version.split()[0]),
        ("system", platform.platform()),
        ("processors", str(os.cpu_count())),
        *((name, _version(name)) for name in ("clip-train", "torch", "torchvision", "timm", "accelerate", "numpy")),
    ]
    return page.section("environment", "Environment", "Where this report was written.", page.table(rows))


def _notes(run: Run) -> str:
    if not run.notes:
        return ""
    items = "".join(f"<li>{text(note)}</li>" for note in dict.fromkeys(run.notes))
    return page.section("notes", "Left out", "", f'<ul class="notes">{items}</ul>')


def _in_recipe_order(run: Run, tasks: dict[str, dict[str, float]]) -> list[str]:
    order = list(run.recipe.get("evaluation", {}).get("tasks", {}))
    return sorted(tasks, key=lambda name: order.index(name) if name in order else len(order))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
