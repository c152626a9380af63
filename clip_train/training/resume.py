"""Going on from a checkpoint: which one, whether it belongs to this run, and what changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_train.config.schema import Recipe
from clip_train.data.stream import Stream
from clip_train.errors import CheckpointError
from clip_train.models.base import Model
from clip_train.training.changes import accepted_changes, with_changes
from clip_train.training.checkpoint import State, load_weights, read_checkpoint, read_optimizer


def restore(
    recipe: Recipe,
    run_dir: Path,
    resume: str,
    *,
    model: Model,
    load_optimizer: Callable[[dict[str, Tensor]], None],
    scaler: torch.amp.GradScaler | None,  # pyright: ignore[reportPrivateImportUsage]
    stream: Stream,
    tokenizer_fingerprint: str,
    allow_changed: Sequence[str],
    notify: Callable[[str], Any],
) -> State | None:
    """Load the checkpoint that `resume` means into the model and the optimizer; None where the run starts afresh.

    `stream` is told where its samples go on. Raises CheckpointError where the checkpoint is of another recipe, data or
    vocabulary, with the differences, unless `allow_changed` accepts them (see `changes`); and for `never` in a run
    folder that has checkpoints.
    """
    has_some = any((run_dir / "checkpoints").glob("step_*"))
    if resume == "never":
        if has_some:
            raise CheckpointError(
                f"{run_dir} already holds checkpoints: go on with --resume auto, or choose another --run-dir"
            )
        return None
    if resume == "auto" and not has_some:
        return None
    checkpoint = read_checkpoint(run_dir if resume == "auto" else Path(resume))
    changed = accepted_changes(recipe, checkpoint, stream, tokenizer_fingerprint, allow_changed, notify)
    load_weights(model, checkpoint)
    try:
        load_optimizer(read_optimizer(checkpoint, model))
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.path}: the optimizer's state lacks {error}") from error
    if scaler is not None and checkpoint.state.scaler:
        scaler.load_state_dict(checkpoint.state.scaler)
    notify(f"resuming from {checkpoint.path} at step {checkpoint.state.step}")
    state = with_changes(checkpoint.state, changed)
    stream.order.origin = state.origin
    return state
