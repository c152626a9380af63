"""The report's charts: how often the model is right, and how it learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from clip_train.evaluation import page, plots
from clip_train.evaluation.plots import DARK, LIGHT, Bar, Panel, Theme, compact, percent
from clip_train.evaluation.run_folder import Run, words


def accuracy(run: Run, images: dict[str, bytes]) -> str:
    groups: dict[str, Sequence[Bar]] = {}
    kinds = {"zeroshot": "Zero-shot", "linear_probe": "Linear probe", "knn": "Nearest neighbours"}
    for title, (name, m) in [(title, task) for kind, title in kinds.items() for task in run.tasks(kind).items()]:
        bars = [
            Bar(label, m[key], m.get(chance))
            for label, key, chance in (
                ("first guess", "top1", "chance"),
                ("first five", "top5", "chance_top5"),
                ("mean of classes", "per_class_mean", "chance"),
            )
            # With as many pictures of every class, the mean of classes is top-1 again.
            if key in m and not (key == "per_class_mean" and abs(m[key] - m.get("top1", -1)) < 5e-4)
        ]
        counts = f"{m.get('samples', 0):,.0f} pictures, {m.get('classes', 0):,.0f} classes"
        groups[f"{title}: {words(name)} ({counts})"] = bars
    for name, m in run.tasks("retrieval").items():
        counts = f"{m.get('images', 0):,.0f} pictures, {m.get('captions', 0):,.0f} captions"
        groups[f"Retrieval: {words(name)} ({counts})"] = [
            Bar(f"{label}, R@{k}", m[f"{way}/r@{k}"], m.get(f"{way}/chance_r@{k}"))
            for way, label in (("text_to_image", "caption → picture"), ("image_to_text", "picture → caption"))
            for k in (1, 5, 10)
            if f"{way}/r@{k}" in m
        ]
    charts: list[str] = []
    if groups:
        charts.append(
            _both("accuracy", lambda theme: plots.bars(groups, theme), images, "shares against chance, as bars")
        )
    over_time = _over_training(run)
    if over_time:
        charts.append(
            "<h3>Over training</h3>"
            + _both("accuracy_over_training", lambda t: plots.panels(over_time, t), images, "accuracy over steps")
        )
    over_shots = _over_shots(run)
    if over_shots:
        charts.append(
            "<h3>Over training pictures of each class</h3>"
            + _both("accuracy_over_shots", lambda t: plots.panels(over_shots, t), images, "accuracy over shots")
        )
    if not charts:
        return ""
    note = (
        "On the recipe's evaluation sets. The grey tick is what guessing would reach; R@k is the share of "
        "queries whose right answer is among the first k."
    )
    return page.section("accuracy", "How often it is right", note, *charts)


def _over_training(run: Run) -> list[Panel]:
    items: list[Panel] = []
    for name, m in run.tasks("zeroshot").items():
        series = {
            label: run.history[f"zeroshot/{name}/{key}"]
            for label, key in (("top-1", "top1"), ("top-5", "top5"))
            if f"zeroshot/{name}/{key}" in run.history
        }
        if any(len(steps) > 1 for steps, _ in series.values()):
            reference = (m["chance"], f"chance {percent(m['chance'])}") if "chance" in m else None
            items.append(Panel(f"Zero-shot, {words(name)}", series, percent=True, reference=reference))
    for name, m in run.tasks("retrieval").items():
        series = {
            label: run.history[f"retrieval/{name}/{way}/r@10"]
            for label, way in (("caption → picture", "text_to_image"), ("picture → caption", "image_to_text"))
            if f"retrieval/{name}/{way}/r@10" in run.history
        }
        if any(len(steps) > 1 for steps, _ in series.values()):
            chance = m.get("text_to_image/chance_r@10")
            reference = (chance, f"chance {percent(chance)}") if chance is not None else None
            items.append(Panel(f"Retrieval R@10, {words(name)}", series, percent=True, reference=reference))
    return items


def _over_shots(run: Run) -> list[Panel]:
    """Few-shot curves: top-1 over the number of training pictures of each class, the mean of all draws."""
    items: list[Panel] = []
    for kind, title in (("linear_probe", "Linear probe"), ("knn", "Nearest neighbours")):
        for name, m in run.tasks(kind).items():
            found = {int(key.split("/")[1]): v for key, v in m.items() if key.startswith("shots/") and "top1" in key}
            if len(found) > 1:
                shots = sorted(found)
                series = np.array(shots, float), np.array([found[number] for number in shots])
                reference = (m["chance"], f"chance {percent(m['chance'])}") if "chance" in m else None
                items.append(Panel(f"{title}, {words(name)}", {"top-1": series}, percent=True, reference=reference))
    return items


def curves(run: Run, images: dict[str, bytes]) -> str:
    c = run.curves
    items: list[Panel] = []
    batch = run.recipe.get("data", {}).get("batch_size")
    if "loss" in c:
        chance = (math.log(batch), f"chance, ln {batch:,}") if isinstance(batch, int) and batch > 1 else None
        items.append(Panel("Loss", {"loss": c["loss"]}, reference=chance, smooth=True))
    by_source = {
        name.removeprefix("sources/").removesuffix("/loss"): series
        for name, series in c.items()
        if name.startswith("sources/") and name.endswith("/loss")
    }
    if by_source:
        items.append(Panel("Loss by source", by_source, smooth=True))
    accuracy = {
        name.replace("accuracy", "")
        .replace("_", " ")
        .strip()
        .replace("image to text", "picture → caption")
        .replace("text to image", "caption → picture")
        or "accuracy": series
        for name, series in c.items()
        if "accuracy" in name
    }
    if accuracy:
        items.append(Panel("Right within the batch", accuracy, percent=True, smooth=True))
    for title, name, unit, smooth in (
        ("Logit scale", "logit_scale", "", False),
        ("Learning rate", "lr", "", False),
        ("Gradient norm", "grad_norm", "", True),
        ("Throughput", "samples_per_second", "pairs/s", True),
        ("Text tokens", "tokens_per_second", "tokens/s", True),
    ):
        if name in c:
            says = f"peak {compact(float(c[name][1].max()))}" if name == "lr" else None
            items.append(Panel(title, {name: c[name]}, unit=unit, smooth=smooth, says=says))
    for title, name in (("Waiting for data", "data_wait"), ("Model FLOPs utilisation", "mfu")):
        if name in c:
            share = bool(np.all(c[name][1] <= 1.0)) if name == "data_wait" else True
            items.append(Panel(title, {name: c[name]}, unit="" if share else "s", percent=share, smooth=True))
    if not items:
        return ""
    note = "Over optimizer steps. Faint: as measured; bold: the mean over a window of 3 % of the run."
    return page.section(
        "curves",
        "How it learned",
        note,
        _both("curves", lambda t: plots.panels(items, t), images, "training curves"),
    )


def _both(name: str, draw: Callable[[Theme], Figure], images: dict[str, bytes], alt: str) -> str:
    images[name] = plots.png(draw(LIGHT), LIGHT)
    return page.chart(images[name], plots.png(draw(DARK), DARK), alt)
