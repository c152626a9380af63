"""The loop: set up -> restore -> dry run -> (batch -> update -> log -> save -> evaluate) until done.

Everything random is a function of (seed, step) or (seed, epoch, sample), and the schedule is one of the step, so a
run that was cut goes on exactly where its last checkpoint stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from clip_train import heartbeat
from clip_train.config.schema import Recipe
from clip_train.data.batch import Batch
from clip_train.data.transforms import normalize
from clip_train.errors import DataError
from clip_train.from_recipe.data import build_loader
from clip_train.from_recipe.update import learning_rate
from clip_train.models.base import Model
from clip_train.models.flops import image_flops, text_flops
from clip_train.objectives.base import Inputs, PerSample
from clip_train.runtime import collectives
from clip_train.runtime.process import Process
from clip_train.runtime.watchdog import watchdog
from clip_train.training.changes import changes_between
from clip_train.training.failed_step import is_over_budget, stop_and_keep, watch_loss
from clip_train.training.metrics import Interval, MetricsFile, Trackers, measured_peak_flops
from clip_train.training.progress import TrainingProgress
from clip_train.training.run_state import is_save_due, open_saver, save, save_aside
from clip_train.training.saving import Saver
from clip_train.training.setup import Run, set_up
from clip_train.training.signals import StopFlag, mark_interrupted, stop_signals
from clip_train.training.tally import SourceTally, flatten
from clip_train.training.update import train_step
from tokenizer import BPETokenizer

Evaluate = Callable[[Model, BPETokenizer, int], Mapping[str, float]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    signal: int | None = None
    """The signal that ended it early, after a checkpoint."""


def train(
    recipe: Recipe,
    run_dir: Path,
    process: Process,
    *,
    resume: str,
    console: Console,
    evaluate: Evaluate,
    allow_changed: Sequence[str] = (),
) -> Outcome:
    """Train a recipe in `run_dir` to its last step, or to the first SIGTERM, SIGINT or SIGUSR1.

    `resume` is `auto` (go on from the run's newest checkpoint where there is one), `never`, or a checkpoint's path;
    `allow_changed` are keys that may differ from the checkpoint's. Raises UserError for everything that a person can
    mend.
    """
    heartbeat.at("set up", 0)
    with watchdog(process, recipe.faults.stall_minutes):
        run = set_up(recipe, run_dir, process, resume=resume, allow_changed=allow_changed, console=console)
        with stop_signals() as stop, open_saver(run) as saver:
            outcome = loop(run, stop, evaluate, saver)
            if process.is_main:  # before the same signal may come again, from torchrun: then it would end the process
                mark_interrupted(run_dir, outcome.signal, outcome.step)
            return outcome


def loop(run: Run, stop: StopFlag, evaluate: Evaluate, saver: Saver) -> Outcome:
    """Update until the last step or a signal."""
    recipe, process = run.recipe, run.process
    steps, every = run.steps, recipe.logging.every_steps
    image_cost = lru_cache(lambda size: image_flops(run.model.towers["image"], True, training=True, image_size=size))
    peak = measured_peak_flops(process.device, process.precision) * process.world
    metrics = MetricsFile(run.run_dir / "metrics.jsonl", run.step) if process.is_main else None
    trackers = Trackers(
        process.accelerator,
        project=recipe.logging.wandb_project or recipe.name,
        run_dir=run.run_dir,
        config=recipe.model_dump(mode="json"),
    )
    progress = TrainingProgress(run.console, total=steps, done=run.step, enabled=process.is_main)
    interval, sources = Interval.begin(), SourceTally(list(recipe.data.sources), process.device)
    if run.step == steps == 0:
        save(run, saver)
        saver.finish()
    if run.step == steps and recipe.evaluation.tasks and not is_evaluated(run):
        measure(run, evaluate, saver)  # a run that was cut between its last save and the end
    run.model.train()
    with progress:
        batches = iter(build_loader(recipe, run.stream, run.step, steps, pin_memory=process.device.type == "cuda"))
        while run.step < steps:
            heartbeat.at("data", run.step + 1)
            waiting = time.perf_counter()
            batch = next_batch(batches, run)
            interval.waited += time.perf_counter() - waiting
            lr = learning_rate(recipe, run.step, steps)
            heartbeat.at("update", run.step + 1)
            inputs = to_inputs(batch, run)
            result = train_step(
                run.wrapped,
                run.objective,
                run.optimizer,
                inputs,
                process,
                step=run.step,
                seed=recipe.training.seed,
                lr=lr,
                micro_batch=recipe.training.micro_batch,
                gradient_clip=recipe.training.gradient_clip,
            )
            if not result.applied and is_over_budget(run, batch, float(result.loss)):
                saver.finish()
                raise stop_and_keep(run, batch, inputs, lr, lambda folder: save_aside(run, folder))
            run.model.after_update_()
            run.step += 1
            if run.average is not None and result.applied:
                run.average.update(run.step)
            interval.steps += 1
            interval.samples += len(batch)
            interval.tokens += int(batch.ids.numel())
            interval.targets += inputs.target_count
            del inputs  # its memory is the next batch's
            if batch.images is not None:
                interval.image_flops += len(batch) * image_cost(batch.images.shape[-1])
            sources.add(batch.sources, result.rows)
            run.captions_cut += batch.captions_cut
            progress.advance()

            last = run.step == steps
            heartbeat.at("log", run.step)
            if run.step % every == 0 or last or run.step == 1:
                names = ["loss", *result.stats]
                values = [result.loss, *result.stats.values()]
                means = [float(value) / process.world for value in values]
                *means, cut = collectives.sum_over_processes([*means, run.captions_cut], process.device)
                by_source = sources.read()
                changed = changes_between(run.changes, (run.step - 1) // every * every, run.step)
                digest = collectives.sum_modulo_2_63(batch.digest_part(), process.device)
                rates = interval.rates(process.world)
                every_token = run.model.reads_every_token
                forward = (interval.image_flops + run.model.target_flops * interval.targets) / interval.samples
                forward += text_flops(run.model.towers["text"], interval.tokens / interval.samples, not every_token)
                line: dict[str, Any] = {
                    "step": run.step,
                    **dict(zip(names, means, strict=True)),
                    "lr": lr,
                    "grad_norm": result.grad_norm,
                    **rates,
                    "mfu": 3 * forward * rates["samples_per_second"] / peak,
                    **sizes(batch, recipe),
                    "batch": f"{digest:016x}",
                    "samples": run.samples,
                    "epoch": run.samples / run.stream.samples,
                    "bad_samples": run.bad_samples.bad,
                    "captions_cut": int(cut),
                    **({"sources": by_source} if by_source else {}),
                    **({"changed": changed} if changed else {}),
                }
                watch_loss(run, batch, means[0])
                line |= run.faults.counts
                if metrics is not None:
                    metrics.write(line)
                    trackers.log(flatten(line), run.step)
                    progress.show(line)
                interval = Interval.begin()

            flags = [stop.signal is not None, is_save_due(run), saver.failed]
            stopped, due, unsaved = collectives.any_process(flags, process.device)
            heartbeat.at("save", run.step)
            if last or stopped or due:
                save(run, saver)
            if last or stopped or unsaved:
                saver.finish()
            if not stopped and should_evaluate(run, last=last):
                heartbeat.at("evaluate", run.step)
                figures = measure(run, evaluate, saver)
                run.model.train()
                if process.is_main:
                    trackers.log(figures, run.step)
                interval = Interval.begin()
            if stopped:
                break
    if metrics is not None:
        metrics.close()
    trackers.close()
    return Outcome(run.step, stop.signal)


def sizes(batch: Batch, recipe: Recipe) -> dict[str, int]:
    """The side of the pictures, where it changes in the run."""
    return {"image_size": batch.images.shape[-1]} if recipe.training.stages and batch.images is not None else {}


def to_inputs(batch: Batch, run: Run) -> Inputs:
    """A batch as the objective wants it: captions padded to the longest, pixels normalised on the device."""
    inputs = Inputs(
        images=batch.images,
        ids=batch.padded_ids(run.tokenizer.pad),
        lengths=batch.lengths.long(),
        groups=batch.groups,
        rows=batch.rows,
    )
    if isinstance(run.objective, PerSample):
        inputs = run.objective.prepare(inputs, seed=run.recipe.training.seed, step=run.step)
    inputs, look = inputs.to(run.process.device), run.recipe.preprocess
    return inputs if inputs.images is None else replace(inputs, images=normalize(inputs.images, look.mean, look.std))


def next_batch(batches: Iterator[Batch], run: Run) -> Batch:
    """The next batch, its bad samples counted.

    All processes count all bad samples and learn of each other's failures, so that they stop at the same step, and
    nobody waits in a collective for a process whose loader gave up.
    """
    failure: DataError | None = None
    batch: Batch | None = None
    try:
        batch = next(batches)
    except DataError as error:
        failure = error
    heartbeat.at("agree", run.step + 1)
    skipped = batch.skipped if batch is not None else []
    bad, failed = collectives.any_process([bool(skipped), failure is not None], run.process.device)
    if failed:
        messages = [message for message in collectives.gather_objects(str(failure or "")) if message]
        raise failure or DataError(f"another process could not read its data: {messages[0]}")
    assert batch is not None
    if bad:
        skipped = [sample for part in collectives.gather_objects(skipped) for sample in part]
    run.bad_samples.add(skipped, seen=run.recipe.data.batch_size)
    return batch


def should_evaluate(run: Run, *, last: bool) -> bool:
    policy = run.recipe.evaluation
    return bool(policy.tasks) and (last or (policy.every_steps > 0 and run.step % policy.every_steps == 0))


def measure(run: Run, evaluate: Evaluate, saver: Saver) -> Mapping[str, float]:
    """Evaluate the weights that the recipe names."""
    if run.average is None or run.recipe.evaluation.weights == "raw":
        return evaluate(run.model, run.tokenizer, run.step)
    saver.wait_for_copy()
    with run.average.in_place_of_weights():
        return evaluate(run.model, run.tokenizer, run.step)


def is_evaluated(run: Run) -> bool:
    """Whether this step's evaluation is on disk; the first process's view counts."""
    path = run.run_dir / "evals.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = any(f'"step": {run.step},' in line or f'"step": {run.step}}}' in line for line in lines)
    return bool(collectives.gather_objects(found)[0])
