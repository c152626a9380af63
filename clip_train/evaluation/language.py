"""Loss and accuracy of a language model on held-out texts, of tokens that are chosen once and for all.

Every caption of a sample is a text. Which of its tokens are hidden is a function of its number in the set alone, so
that all models, and all steps of a run, are asked the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from clip_train.config.schema import Language
from clip_train.data import columns
from clip_train.data.cache import Cache
from clip_train.data.columns import BadSampleError
from clip_train.data.files import ShardFiles
from clip_train.data.shards import index_all, resolve
from clip_train.errors import DataError
from clip_train.evaluation.encode import Gather, Tokenizer, alone, evaluating, gathered
from clip_train.evaluation.run import check_task_name, write_figures
from clip_train.objectives.base import Inputs, PerSample

SEED = 0


def evaluate_language(
    model: nn.Module,
    objective: PerSample,
    tokenizer: Tokenizer,
    tasks: Mapping[str, Language],
    *,
    device: torch.device,
    precision: str = "fp32",
    batch_size: int = 256,
    cache: Cache | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Gather = alone,
    run_dir: Path | None = None,
    step: int | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Figures of every task by flat name, `language/TASK/loss`. All ranks call it; the first writes `eval.json`.

    Raises ConfigError or DataError (on all ranks) for a task that cannot be measured.
    """
    figures: dict[str, float] = {}
    for name, task in tasks.items():
        check_task_name(name)
        started = time.perf_counter()

        def measured(task: Language = task) -> dict[str, float]:
            texts = held_out(task, cache)
            numbers = list(range(rank, len(texts), world))
            with evaluating(model, device, precision):  # pyright: ignore[reportArgumentType]
                return _sums(model, objective, tokenizer, texts, numbers, device, batch_size)

        parts = gathered(gather, measured)
        total: dict[str, float] = {key: sum(part[key] for part in parts) for key in parts[0]}
        loss, accuracy = total["loss"] / total["targets"], total["accuracy"] / total["targets"]
        found = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": accuracy,
            "targets": total["targets"],
            "texts": total["texts"],
        }
        figures |= {f"language/{name}/{short}": value for short, value in found.items()}
        if console is not None and rank == 0:
            console.print(
                f"[bold]{name}[/]: loss {loss:.3f}, {accuracy:.1%} of {total['targets']:,.0f} tokens right in "
                f"{total['texts']:,.0f} texts ({time.perf_counter() - started:.1f} s)"
            )
    if run_dir is not None and rank == 0:
        write_figures(run_dir, figures, step)
    return figures


def held_out(task: Language, cache: Cache | None = None) -> list[str]:
    """All captions of a task's samples, in order; samples without any are left out.

    Raises DataError where there are no shards or no texts.
    """
    files, column = ShardFiles(), columns.parse(task.caption)
    found: list[str] = []
    for one in index_all(resolve(task.shards), cache):
        columns.check_columns(one, caption=task.caption)
        for sample in range(len(one)):
            try:
                found += columns.read_captions(*columns.read(files, one, sample, column))
            except BadSampleError:
                continue
    if not found:
        raise DataError(f"shards {task.shards!r} hold no text under caption = {task.caption!r}")
    return found


def _sums(
    model: nn.Module,
    objective: PerSample,
    tokenizer: Tokenizer,
    texts: list[str],
    numbers: list[int],
    device: torch.device,
    batch_size: int,
) -> dict[str, float]:
    sums = {"loss": 0.0, "accuracy": 0.0, "targets": 0.0, "texts": float(len(numbers))}
    for rows in _batches(numbers, batch_size):
        ids, lengths = tokenizer.encode_batch([texts[row] for row in rows])
        grid: Any = np.full((len(rows), int(lengths.max())), tokenizer.pad, dtype=np.int64)
        grid[np.arange(grid.shape[1]) < lengths[:, None]] = ids
        inputs = Inputs(
            images=None,
            ids=torch.from_numpy(grid),
            lengths=torch.from_numpy(lengths).long(),
            groups=torch.arange(len(rows)),
            rows=torch.tensor(rows),
        )
        inputs = objective.prepare(inputs, seed=SEED, step=0)
        loss = objective.loss(model, inputs.to(device), torch.ones((), device=device))
        sums["loss"] += float(loss.total)
        sums["accuracy"] += float(loss.stats["accuracy"])
        sums["targets"] += objective.count(inputs)
    return sums


def _batches(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
