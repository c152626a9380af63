"""What the loop does about a step that goes wrong, on all processes alike: warn, leave it out, or stop and keep it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clip_train.data.batch import Batch
from clip_train.errors import TrainingError
from clip_train.objectives.base import Inputs
from clip_train.runtime import collectives
from clip_train.training.faults import gradient_norms, running_statistics, write_failed_step
from clip_train.training.setup import Run
from clip_train.training.update import backward


def watch_loss(run: Run, batch: Batch, loss: float) -> None:
    """Warn of a spike of the logged loss, and keep the batch's keys."""
    sigmas = run.faults.observe(loss)
    if sigmas is not None:
        run.faults.spike(run.step, loss=loss, sigmas=sigmas, keys=all_keys(batch))
        if run.process.is_main:
            run.console.print(f"step {run.step}: the loss, {loss:.3f}, is {sigmas:.0f} sigmas above its median")


def all_keys(batch: Batch) -> list[str]:
    """Of the global batch, in the order of its rows."""
    return [key for part in collectives.gather_objects(batch.keys) for key in part]


def is_over_budget(run: Run, batch: Batch, loss: float) -> bool:
    """Count an update that was left out, and say so; whether it was one too many."""
    scaler, step = run.process.scaler, run.step + 1
    overflow = scaler is not None and scaler.get_scale() >= 1  # it has room to go lower: no fault of the data's
    over = run.faults.skip(step, loss=loss, overflow=overflow, keys=all_keys(batch))
    if run.process.is_main and not overflow:
        run.console.print(f"step {step}: the gradient is not finite, so the update is left out (see faults.jsonl)")
    return over


def stop_and_keep(run: Run, batch: Batch, inputs: Inputs, lr: float, keep: Callable[[Path], None]) -> TrainingError:
    """Keep what is needed to look at a step that failed; `keep` saves the weights before it in a folder."""
    step, folder, training = run.step + 1, run.run_dir / f"failed_step_{run.step + 1}", run.recipe.training
    # Again, for clipping has spoilt the gradient.
    run.optimizer.zero_grad(set_to_none=True)
    statistics = running_statistics(run.wrapped)
    before = [buffer.clone() for buffer in statistics]
    loss = backward(
        run.wrapped,
        run.objective,
        inputs,
        run.process,
        step=run.step,
        seed=training.seed,
        micro_batch=training.micro_batch,
    )
    for buffer, value in zip(statistics, before, strict=True):
        buffer.copy_(value)
    norms, rank, total = gradient_norms(run.model), run.process.rank, float(loss.total)
    write_failed_step(folder, rank, step=step, loss=total, lr=lr, norms=norms, batch=batch)
    keep(folder)
    limit, window = run.faults.max_skipped_steps, run.faults.window_steps
    return TrainingError(
        f"step {step}: the gradient is not finite (loss {total}), and faults.max_skipped_steps = {limit} of the last "
        f"{window} updates were left out already. First samples of this batch: {', '.join(batch.keys[:5])}. Worst "
        f"gradients: {', '.join(f'{name} {norm:.3g}' for name, norm in list(norms.items())[:3])}. Batch, gradient "
        f"norms and the weights before this step are in {folder}; try a lower optimizer.lr, training.gradient_clip = "
        "1.0, a longer schedule.warmup_steps, or precision 'fp32'"
    )
