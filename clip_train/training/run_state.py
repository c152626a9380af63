"""When a run is saved, and what of it."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import accelerate
import torch

from clip_train.config.load import dump_recipe
from clip_train.runtime import collectives
from clip_train.runtime.parallel import is_sharded
from clip_train.training.checkpoint import Companions, State
from clip_train.training.optimizer import named_state
from clip_train.training.saving import Saver
from clip_train.training.setup import Run


def is_save_due(run: Run) -> bool:
    """By steps, or by this process's clock."""
    policy = run.recipe.checkpoint
    minutes = (time.monotonic() - run.saved_at) / 60
    return (policy.every_steps > 0 and run.step % policy.every_steps == 0) or 0 < policy.every_minutes <= minutes


def open_saver(run: Run, folder: Path | None = None) -> Saver:
    """What writes the run's checkpoints; sharded where the model is."""
    policy = run.recipe.checkpoint
    return Saver(
        folder or run.run_dir / "checkpoints",
        run.process,
        run.optimizer,
        Companions(dump_recipe(run.recipe), run.tokenizer.save),
        sharded=is_sharded(run.model),
        asynchronous=policy.asynchronous,
        keep_last=policy.keep_last,
    )


def save_aside(run: Run, folder: Path) -> None:
    """A checkpoint of now that is not one of the run's own."""
    run.saved_step = -1
    with open_saver(run, folder) as saver:
        save(run, saver)


def save(run: Run, saver: Saver) -> None:
    """Save a checkpoint, unless this step has one."""
    run.saved_at = time.monotonic()
    if run.saved_step == run.step:
        return
    run.saved_step = run.step
    scaler = run.process.scaler
    [captions_cut] = collectives.sum_over_processes([run.captions_cut], run.process.device)
    state = State(
        step=run.step,
        samples=run.samples,
        data_fingerprint=run.stream.fingerprint,
        tokenizer_fingerprint=run.tokenizer.fingerprint,
        bad_samples=run.bad_samples.bad,
        captions_cut=int(captions_cut),
        sources=run.stream.contents,
        origin=run.stream.order.origin,
        changes=run.changes,
        faults=run.faults.state(),
        scaler={} if scaler is None else scaler.state_dict(),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
    )
    tensors = named_state(run.optimizer, run.model)
    if run.average is not None:
        tensors |= run.average.named_state()
    saver.save(state, run.model.state_dict(), tensors, dict(run.model.named_buffers()))
