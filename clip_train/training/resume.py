"""Going on from a checkpoint: which one, whether it belongs to this run, and what changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_train.config.load import differences, parse_toml
from clip_train.config.schema import Recipe
from clip_train.errors import CheckpointError
from clip_train.models.two_tower import TwoTower
from clip_train.training.checkpoint import Checkpoint, State, load_weights, read_checkpoint, read_optimizer

# What may change between a checkpoint and the run that goes on from it: nothing that the numbers depend on, but for
# the length of the run, which is said aloud.
FREE = (
    "name",
    "description",
    "logging.",
    "evaluation.",
    "checkpoint.",
    "data.workers",
    "data.cache_decoded",
    "data.cache_dir",
    "data.cache_gib",
    "data.max_bad_fraction",
    "tokenizer.path",  # its fingerprint is compared instead
    "training.micro_batch",
    "training.compile",
    "training.activation_checkpointing",
    "training.parallel.",
    "training.steps",
    "training.epochs",
    "training.init",  # what the first step started from; a checkpoint goes on from itself
)


def restore(
    recipe: Recipe,
    run_dir: Path,
    resume: str,
    *,
    model: TwoTower,
    load_optimizer: Callable[[dict[str, Tensor]], None],
    scaler: torch.amp.GradScaler | None,  # pyright: ignore[reportPrivateImportUsage]
    data_fingerprint: str,
    tokenizer_fingerprint: str,
    notify: Callable[[str], Any],
) -> State | None:
    """Load the checkpoint that `resume` means into the model and the optimizer; None where the run starts afresh.

    Raises CheckpointError where the checkpoint is of another recipe, data or vocabulary, with the differences, and
    for `never` in a run folder that has checkpoints.
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
    check_same_run(recipe, checkpoint, data_fingerprint, tokenizer_fingerprint, notify)
    load_weights(model, checkpoint)
    try:
        load_optimizer(read_optimizer(checkpoint, model))
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.path}: the optimizer's state lacks {error}") from error
    if scaler is not None and checkpoint.state.scaler:
        scaler.load_state_dict(checkpoint.state.scaler)
    notify(f"resuming from {checkpoint.path} at step {checkpoint.state.step}")
    return checkpoint.state


def check_same_run(
    recipe: Recipe,
    checkpoint: Checkpoint,
    data_fingerprint: str,
    tokenizer_fingerprint: str,
    notify: Callable[[str], Any],
) -> None:
    """Refuse to go on with another model, data, order or vocabulary."""
    old = parse_toml(checkpoint.recipe_toml, where=str(checkpoint.path / "recipe.toml"))
    changed = differences(old, recipe)
    for key in ("training.steps", "training.epochs"):
        if key in changed:
            before, now = changed[key]
            notify(f"{key} changes from {before} to {now}: learning rates follow the new length from here on")
    wrong = [
        f"{key}: {before!r} in the checkpoint, {now!r} now"
        for key, (before, now) in changed.items()
        if not any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)
    ]
    if checkpoint.state.data_fingerprint != data_fingerprint:
        wrong.append("the shards hold other samples than those the checkpoint was trained on")
    if checkpoint.state.tokenizer_fingerprint != tokenizer_fingerprint:
        wrong.append("tokenizer.path is another vocabulary")
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path} is of another run: {'; '.join(wrong)}. Give these values again, or start afresh with "
            "another --run-dir"
        )
