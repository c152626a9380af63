"""`clip-train probe --suite text`: which tasks, each on one encoder, and the files that come of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clip_train.errors import DataError
from clip_train.evaluation.text.encoder import PooledEncoder
from clip_train.evaluation.text.finetune import Settings, finetune_task
from clip_train.evaluation.text.results import TaskResult, write_results
from clip_train.evaluation.text.synesthesia import compare_task
from clip_train.evaluation.text.tasks import EMBEDDED, TextTask, load_embedded
from clip_train.evaluation.text.understanding import probe_task

EXP3 = "exp3"
Chosen = list[tuple[str, TextTask]]
"""Experiment and task, in the order in which they are run."""


def choose(wanted: Sequence[str], extra: Sequence[TextTask] = ()) -> Chosen:
    """The tasks of experiments 1 and 2, read and checked.

    Args:
        wanted: `exp1`, `exp2`, `exp1/topic` …; none is all that is there. `exp3` is no task of texts, and passed over.
        extra: tasks of experiment 1 from elsewhere (sentiment, GLUE).

    Raises:
        DataError: an unknown name; the nearest are listed.
    """
    others = {f"exp1/{task.name}": task for task in extra}
    known = [f"exp1/{name}" for name in EMBEDDED["exp1"]] + list(others)
    known += [f"exp2/{name}" for name in EMBEDDED["exp2"]]
    groups = [*EMBEDDED, EXP3]
    for name in wanted:
        if name not in known and name not in groups:
            near = difflib.get_close_matches(name, [*known, *groups], n=3, cutoff=0.4)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise DataError(f"no text task {name!r}{hint}. All: {', '.join([*known, EXP3])}")
    chosen = [name for name in known if not wanted or name in wanted or name.split("/")[0] in wanted]
    return [(name.split("/")[0], others[name] if name in others else load_embedded(name.split("/")[1]))
            for name in chosen]  # fmt: skip


def tasks_from_elsewhere(sentiment: Path | None, glue: str | None, glue_limit: int) -> list[TextTask]:
    """Tasks of experiment 1 that do not ship with the project.

    Args:
        sentiment: as `read_sentiment`.
        glue: `hub` or a folder, and behind a colon the names of some tasks.
        glue_limit: training texts of a task of GLUE at most.

    Raises DataError where they are not there or cannot be read.
    """
    found: list[TextTask] = []
    if sentiment is not None:
        from clip_train.evaluation.text.sentiment import read_sentiment

        found += read_sentiment(sentiment)
    if glue is not None:
        from clip_train.evaluation.text.glue import read_glue

        source, _, names = glue.partition(":")
        found += read_glue(source, [name for name in names.split(",") if name], limit=glue_limit)
    return found


@dataclass(frozen=True)
class Pictures:
    """What experiment 3 needs."""

    generator: Any
    budget: str
    grid: Path
    """PNG of what the generator draws for this encoder."""


def run_suite(
    encoder: PooledEncoder,
    tasks: Chosen,
    *,
    finetune: Settings | None = None,
    pictures: Pictures | None = None,
    advance: Callable[[str, list[TaskResult]], None] | None = None,
) -> list[TaskResult]:
    """Every task's figures.

    Args:
        finetune: fine-tune on every task of experiment 1 as well.
        pictures: run experiment 3 as well.
        advance: told the task's name, and its figures, after each.
    """
    results: list[TaskResult] = []

    def one(name: str, run: Callable[[], list[TaskResult]], cut: int, cut_apart: int = 0) -> None:
        found = run()
        for result in found:
            result.more["texts_cut"] = cut_apart if result.name.endswith("/apart") else cut
        results.extend(found)
        if advance is not None:
            advance(name, found)

    for experiment, task in tasks:
        name, (first, second) = f"{experiment}/{task.name}", task.texts()
        apart = encoder.texts_cut([*first, *(second or [])])
        if experiment == "exp2":
            one(name, partial(compare_task, encoder, task), apart)
            continue
        cut = apart if second is None else encoder.texts_cut(first, second)
        one(name, partial(probe_task, encoder, task), cut, apart)
        if finetune is not None:
            one(f"{name}/finetuned", lambda task=task: [finetune_task(encoder, task, finetune)], cut)
    if pictures is not None:
        from clip_train.evaluation.text_to_image.score import asked_of, exp3

        cut = encoder.texts_cut(asked_of(pictures.generator, pictures.budget))
        one(EXP3, lambda: exp3(encoder, pictures.generator, budget=pictures.budget, grid=pictures.grid), cut)
    return results


def save_suite(encoder: PooledEncoder, path: Path, out: Path, results: Sequence[TaskResult]) -> str:
    """`text.json` and `text.npz`; what was there of another encoder or step and is gone (see `write_results`)."""
    about: dict[str, Any] = {
        "name": encoder.name, "path": str(path.resolve()), "step": encoder.tower.step, "width": encoder.width,
        "pools": list(encoder.pools),
        "weights": encoder.tower.weights,
        "parameters": sum(parameter.numel() for parameter in encoder.tower.module.parameters()),
    }  # fmt: skip
    return write_results(out, about, results)
