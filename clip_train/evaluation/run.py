"""From the tasks of a recipe to figures: `evaluate` measures, and writes `eval.json` and `eval/TASK.npz`.

The same function serves `clip-train eval` and the evaluations during training, where all ranks call it together.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clip_train.config.schema import Classified, Language, LinearProbe, PictureTask, Retrieval, Task, ZeroShot
from clip_train.data.cache import Cache
from clip_train.data.collections.base import Collection
from clip_train.data.collections.opening import open_collection
from clip_train.data.collections.shards import Shards
from clip_train.errors import ConfigError
from clip_train.evaluation.encode import Gather, Loaded, Rows, agreed, alone
from clip_train.evaluation.probe import Shots, evaluate_knn, evaluate_linear_probe
from clip_train.evaluation.reading import Advance, Reading, class_places, read_lines
from clip_train.evaluation.results import write_benchmark
from clip_train.evaluation.retrieval import evaluate_retrieval
from clip_train.evaluation.robustness import Spoiling
from clip_train.evaluation.zeroshot import EvalResult, evaluate_zeroshot


def evaluate(
    loaded: Loaded,
    tasks: Mapping[str, Task],
    *,
    device: torch.device | None = None,
    precision: str = "fp32",
    batch_size: int = 256,
    workers: int = 0,
    cache: Cache | None = None,
    relative_to: Path | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Gather = alone,
    run_dir: Path | None = None,
    step: int | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Run every task and return its figures by flat name, `zeroshot/TASK/top1`, `retrieval/TASK/image_to_text/r@1`.

    All ranks call it with the same arguments but `rank`; `gather` gives each rank everybody's part. Paths of a task
    are taken from `relative_to`, then from the working directory; shards from elsewhere are kept in `cache`. Given a
    `run_dir`, rank 0 writes there `eval.json` (sorted), `eval/TASK.npz` (the rows the report draws), the figures in
    CLIP_benchmark's form and, given a `step`, a line of `evals.jsonl`.

    Raises ConfigError or DataError (on all ranks) for a task that cannot be measured.
    """
    if device is None:
        device = next(iter(loaded.model.parameters())).device
    assert device is not None
    figures: dict[str, float] = {}
    for name, task in tasks.items():
        check_task_name(name)
        if isinstance(task, Language):
            raise ConfigError(f"evaluation.tasks.{name} is of language models, and this model has two towers")
        started = time.perf_counter()
        columns = {"image": task.image, **_columns(task)}
        opened = partial(open_data, columns=columns, relative_to=relative_to, cache=cache)
        collection = agreed(gather, partial(opened, task.shards, task.data))
        reading = Reading(
            collection,
            loaded.preprocess,
            label=not isinstance(task, Retrieval),
            captions=isinstance(task, Retrieval),
            batch_size=batch_size,
            workers=workers,
            rank=rank,
            world=world,
        )
        training = None
        if isinstance(task, Classified):
            learned = agreed(gather, partial(opened, task.train_shards, task.train_data))
            training = replace(reading, collection=learned)
        total = len(reading) * passes(task) + (0 if training is None else len(training))
        with _progress(console if rank == 0 else None, name, total) as advance:
            reading = replace(reading, advance=advance)
            if training is not None:
                training = replace(training, advance=advance)
            result = _measure(loaded, task, reading, training, relative_to, device, precision, gather)
        figures |= {f"{task.kind}/{name}/{short}": value for short, value in result.metrics.items()}
        if console is not None and rank == 0:
            console.print(f"{headline(name, task, result)} ({time.perf_counter() - started:.1f} s)")
        if run_dir is not None and rank == 0:
            write_rows(run_dir / "eval" / f"{name}.npz", result.rows)
    if run_dir is not None and rank == 0:
        write_figures(run_dir, figures, step)
        write_benchmark(run_dir, figures, tasks, model=run_dir.name)
    return figures


def open_data(
    shards: str | list[str] | None,
    data: str | None,
    columns: Mapping[str, str],
    relative_to: Path | None = None,
    cache: Cache | None = None,
) -> Collection:
    """The pictures of a task: shards with their columns, or the data that `data` names.

    Raises ConfigError or DataError where they are not there.
    """
    if data is not None:
        return open_collection(data, relative_to)
    assert shards is not None
    return Shards.of(shards, relative_to=relative_to, cache=cache, **columns)


def _columns(task: PictureTask) -> dict[str, str]:
    return {"caption": task.caption} if isinstance(task, Retrieval) else {"label": task.label}


def passes(task: PictureTask) -> int:
    """How often a task reads its pictures."""
    return 1 + len(_spoiling(task)) if isinstance(task, ZeroShot) and task.corruptions else 1


def _spoiling(task: ZeroShot) -> Spoiling:
    return Spoiling.of(task.corruptions, task.severities, task.corruption_seed)


def _measure(
    loaded: Loaded,
    task: PictureTask,
    reading: Reading,
    training: Reading | None,
    relative_to: Path | None,
    device: torch.device,
    precision: str,
    gather: Gather,
) -> EvalResult:
    how: dict[str, Any] = {"device": device, "precision": precision, "gather": gather}
    if isinstance(task, Retrieval):
        how |= {"most_captions": task.most_captions, "merge": task.equal_captions == "one", "folds": task.folds}
        return evaluate_retrieval(loaded, reading, **how)
    names = read_classes(task.classes, reading if training is None else training, relative_to)
    reading = _named(reading, names, task.classes)
    if isinstance(task, ZeroShot):
        spoiling = _spoiling(task) if task.corruptions else None
        return evaluate_zeroshot(loaded, reading, names, read_templates(task, relative_to), spoiling=spoiling, **how)
    assert training is not None
    training = _named(training, names, task.classes)
    how["shots"] = Shots.of(task.shots, task.draws)
    if isinstance(task, LinearProbe):
        return evaluate_linear_probe(loaded, training, reading, names, **how)
    return evaluate_knn(
        loaded, training, reading, names, neighbours=task.neighbours, temperature=task.temperature, **how
    )


def read_classes(file: str | None, reading: Reading, relative_to: Path | None = None) -> list[str]:
    """Names of the classes: of the file, or those that the data have.

    Raises ConfigError where there is no file and the data have none.
    """
    if file is not None:
        return read_lines(file, relative_to)
    if reading.collection.classes is None:
        raise ConfigError(f"{reading.collection.patterns[0]}: has no names of classes: give a text file, classes = …")
    return list(reading.collection.classes)


def _named(reading: Reading, names: Sequence[str], file: str | None) -> Reading:
    collection = reading.collection
    where = ", ".join(collection.patterns)
    return replace(reading, places=class_places(collection.classes, names, where, file or "the training data"))


def read_templates(task: ZeroShot, relative_to: Path | None = None) -> list[str]:
    """The prompts of a task: given in place, or one a line in the file that `templates` names."""
    if isinstance(task.templates, str):
        return [task.templates] if "{}" in task.templates else read_lines(task.templates, relative_to)
    return list(task.templates)


def headline(name: str, task: PictureTask, result: EvalResult) -> str:
    """One line for the console."""
    m = result.metrics
    if not isinstance(task, Retrieval):
        robust = f"; spoiled {m['corrupted_top1']:.1%}" if "corrupted_top1" in m else ""
        learned = f" after {m['train_samples']:,.0f}" if "train_samples" in m else ""
        return (
            f"[bold]{name}[/]: top-1 {m['top1']:.1%}, top-5 {m['top5']:.1%} of {m['samples']:,.0f} pictures{learned} "
            f"among {m['classes']:,.0f} classes (chance {m['chance']:.2%}, majority {m['majority']:.2%}){robust}"
        )
    return (
        f"[bold]{name}[/]: R@10 image to text {m['image_to_text/r@10']:.1%} "
        f"(chance {m['image_to_text/chance_r@10']:.2%}), text to image {m['text_to_image/r@10']:.1%} "
        f"(chance {m['text_to_image/chance_r@10']:.2%}), {m['images']:,.0f} pictures, {m['captions']:,.0f} captions"
    )


def check_task_name(name: str) -> None:
    """Task names become parts of figures' and files' names."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("."):
        raise ConfigError(f"evaluation.tasks: {name!r} must be of letters, digits, '.', '_' and '-'")


def write_rows(path: Path, rows: Rows) -> None:
    """Arrays to a compressed npz that loads with `allow_pickle=False`; replaced whole or not at all."""
    assert not any(array.dtype.hasobject for array in rows.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **rows)
    aside.replace(path)


def write_figures(run_dir: Path, figures: Mapping[str, float], step: int | None) -> None:
    """`eval.json`, sorted, and where the step is known a line of `evals.jsonl`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    aside = run_dir / "eval.json.part"
    aside.write_text(json.dumps(dict(sorted(figures.items())), indent=2) + "\n", encoding="utf-8")
    aside.replace(run_dir / "eval.json")
    if step is not None:
        with (run_dir / "evals.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")


@contextmanager
def _progress(console: Console | None, name: str, total: int) -> Generator[Advance | None]:
    if console is None:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"evaluating {name}", total=total)

        def advance(samples: int) -> None:
            progress.update(bar, advance=samples)

        yield advance
