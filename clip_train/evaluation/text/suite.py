"""`clip-train probe --suite text`: which tasks, each on one encoder, and the files that come of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clip_train.errors import DataError
from clip_train.evaluation.text.encoder import PooledEncoder
from clip_train.evaluation.text.results import TaskResult, write_results
from clip_train.evaluation.text.synesthesia import compare_task
from clip_train.evaluation.text.tasks import EMBEDDED, TextTask, load_embedded
from clip_train.evaluation.text.understanding import probe_task

Chosen = list[tuple[str, TextTask]]
"""Experiment and task, in the order in which they are run."""


def choose(wanted: Sequence[str], extra: Sequence[TextTask] = ()) -> Chosen:
    """The tasks of a suite, read and checked.

    Args:
        wanted: `exp1`, `exp2`, `exp1/topic` …; none is all that is there.
        extra: tasks of experiment 1 from elsewhere (sentiment, GLUE).

    Raises:
        DataError: an unknown name; the nearest are listed.
    """
    others = {f"exp1/{task.name}": task for task in extra}
    known = [f"exp1/{name}" for name in EMBEDDED["exp1"]] + list(others)
    known += [f"exp2/{name}" for name in EMBEDDED["exp2"]]
    for name in wanted:
        if name not in known and name not in EMBEDDED:
            near = difflib.get_close_matches(name, [*known, *EMBEDDED], n=3, cutoff=0.4)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise DataError(f"no text task {name!r}{hint}. All: {', '.join(known)}")
    chosen = [name for name in known if not wanted or name in wanted or name.split("/")[0] in wanted]
    return [(name.split("/")[0], others[name] if name in others else load_embedded(name.split("/")[1]))
            for name in chosen]  # fmt: skip


def run_suite(
    encoder: PooledEncoder, tasks: Chosen, *, advance: Callable[[str, list[TaskResult]], None] | None = None
) -> list[TaskResult]:
    """Every task's figures.

    Args:
        advance: told the task's name, and its figures, after each.
    """
    results: list[TaskResult] = []
    for experiment, task in tasks:
        cut = encoder.cut
        found = probe_task(encoder, task) if experiment == "exp1" else compare_task(encoder, task)
        for one in found:
            one.more["texts_cut"] = encoder.cut - cut
        results += found
        if advance is not None:
            advance(f"{experiment}/{task.name}", found)
    return results


def save_suite(encoder: PooledEncoder, path: Path, out: Path, results: Sequence[TaskResult]) -> None:
    """`text.json` and `text.npz`."""
    about: dict[str, Any] = {
        "name": encoder.name, "path": str(path), "width": encoder.width, "pools": list(encoder.pools),
        "parameters": sum(parameter.numel() for parameter in encoder.tower.module.parameters()),
    }  # fmt: skip
    write_results(out, about, results)
