"""The loop: set up -> restore -> dry run -> (batch -> update -> log -> save -> evaluate) until done.

Everything random is a function of (seed, step) or (seed, epoch, sample), and the schedule is one of the step, so a
run that was cut goes on exactly where its last checkpoint stands.
"""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import accelerate
import torch
from rich.console import Console
from torch import nn

from clip_train.build import (
    build_loader,
    build_model,
    build_objective,
    build_optimizer,
    build_stream,
    build_tokenizer,
    learning_rate,
)
from clip_train.config.load import dump_recipe
from clip_train.config.schema import Recipe
from clip_train.data.bad_samples import BadSampleLog
from clip_train.data.batch import Batch
from clip_train.data.stream import Stream
from clip_train.data.transforms import normalize
from clip_train.errors import ConfigError, DataError, TrainingError
from clip_train.models.flops import image_flops, text_flops
from clip_train.models.two_tower import TwoTower
from clip_train.runtime import collectives
from clip_train.runtime.parallel import parallelize
from clip_train.runtime.process import Process
from clip_train.training.checkpoint import State, save_checkpoint
from clip_train.training.metrics import Interval, MetricsFile, Trackers, measured_peak_flops
from clip_train.training.optimizer import load_named_state, named_state
from clip_train.training.progress import TrainingProgress
from clip_train.training.resume import restore
from clip_train.training.update import Inputs, backward, frozen_running_statistics, train_step
from tokenizer import BPETokenizer

Evaluate = Callable[[TwoTower, BPETokenizer, int], Mapping[str, float]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    finished: bool
    signal: int | None = None
    """The signal that ended it early, after a checkpoint."""


@dataclass
class Run:
    """What the loop works with. Built once; the model, the optimizer and the counters change as it goes."""

    recipe: Recipe
    run_dir: Path
    process: Process
    console: Console
    tokenizer: BPETokenizer
    model: TwoTower
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    stream: Stream
    bad_samples: BadSampleLog
    step: int = 0
    saved_step: int = -1
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def local_batch(self) -> int:
        return self.recipe.data.batch_size // self.process.world


def train(
    recipe: Recipe, run_dir: Path, process: Process, *, resume: str, console: Console, evaluate: Evaluate
) -> Outcome:
    """Train a recipe in `run_dir` to its last step, or to the first SIGTERM or SIGINT.

    `resume` is `auto` (go on from the run's newest checkpoint where there is one), `never`, or a checkpoint's path.
    Raises UserError for everything that a person can mend.
    """
    run = set_up(recipe, run_dir, process, resume=resume, console=console)
    with stop_signals() as stop:
        return loop(run, stop, evaluate)


def set_up(recipe: Recipe, run_dir: Path, process: Process, *, resume: str, console: Console) -> Run:
    """Build everything, prove that a step fits, open the data, restore the newest checkpoint."""
    if recipe.data.batch_size % process.world:
        raise ConfigError(
            f"data.batch_size = {recipe.data.batch_size} is global: make it a multiple of the {process.world} processes"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(recipe)
    torch.manual_seed(recipe.training.seed)
    model = build_model(recipe, tokenizer)
    wrapped = parallelize(model, process, compile=recipe.training.compile)
    optimizer = build_optimizer(recipe, model)
    dry_run(recipe, model, wrapped, process, tokenizer)
    stream = build_stream(recipe, tokenizer, rank=process.rank, world=process.world)
    run = Run(
        recipe=recipe,
        run_dir=run_dir,
        process=process,
        console=console,
        tokenizer=tokenizer,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        stream=stream,
        bad_samples=BadSampleLog(
            run_dir / "bad_samples.jsonl" if process.is_main else None, recipe.data.max_bad_fraction
        ),
    )
    state = restore(
        recipe,
        run_dir,
        resume,
        model=model,
        load_optimizer=lambda tensors: load_named_state(optimizer, model, tensors),
        scaler=process.scaler,
        data_fingerprint=stream.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        notify=console.print if process.is_main else lambda _: None,
    )
    if state is not None:
        run.step = run.saved_step = state.step
        run.bad_samples.bad, run.bad_samples.seen = state.bad_samples, state.samples
    if process.is_main:
        (run_dir / "recipe.toml").write_text(dump_recipe(recipe), encoding="utf-8")
    return run


def dry_run(recipe: Recipe, model: TwoTower, wrapped: nn.Module, process: Process, tokenizer: BPETokenizer) -> None:
    """Forward and backward on a synthetic batch of the largest shapes.

    Out-of-memory and shape errors come now, before the first shard is opened. Changes no weight and no statistic.
    """
    count = recipe.data.batch_size // process.world
    size, cap = recipe.image.image_size, tokenizer.context_length
    inputs = Inputs(
        images=torch.zeros(count, 3, size, size, device=process.device),
        ids=torch.full((count, cap), tokenizer.eot, device=process.device),
        lengths=torch.full((count,), cap),
        groups=torch.arange(count, device=process.device),
    )
    micro = min(recipe.training.micro_batch or count, count)
    try:
        with frozen_running_statistics(model):
            backward(wrapped, build_objective(recipe), inputs, process, step=0, seed=0, micro_batch=micro)
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            f"{micro} pairs of {size} px and {cap} tokens do not fit on {process.device}: set training.micro_batch "
            f"below {micro} (the loss still sees all {recipe.data.batch_size} pairs)"
        ) from error
    model.zero_grad(set_to_none=True)


def loop(run: Run, stop: StopFlag, evaluate: Evaluate) -> Outcome:
    """Update until the last step or a signal."""
    recipe, process = run.recipe, run.process
    steps, every = recipe.training.steps, recipe.logging.every_steps
    objective = build_objective(recipe)
    image_cost = image_flops(run.model.image)
    peak = measured_peak_flops(process.device, recipe.training.precision) * process.world
    metrics = MetricsFile(run.run_dir / "metrics.jsonl", run.step) if process.is_main else None
    trackers = Trackers(
        process.accelerator,
        project=recipe.logging.wandb_project or recipe.name,
        run_dir=run.run_dir,
        config=recipe.model_dump(mode="json"),
    )
    progress = TrainingProgress(run.console, total=steps, done=run.step, enabled=process.is_main)
    interval = Interval.begin()
    if run.step == steps and recipe.evaluation.tasks and not is_evaluated(run):
        evaluate(run.model, run.tokenizer, run.step)  # a run that was cut between its last save and the end
    run.model.train()
    with progress:
        batches = iter(build_loader(recipe, run.stream, run.step, pin_memory=process.device.type == "cuda"))
        while run.step < steps:
            waiting = time.perf_counter()
            batch = next_batch(batches, run)
            interval.waited += time.perf_counter() - waiting
            lr = learning_rate(recipe, run.step)
            try:
                result = train_step(
                    run.wrapped,
                    objective,
                    run.optimizer,
                    to_device(batch, run),
                    process,
                    step=run.step,
                    seed=recipe.training.seed,
                    lr=lr,
                    micro_batch=recipe.training.micro_batch,
                    gradient_clip=recipe.training.gradient_clip,
                )
            except TrainingError as error:
                raise explain_failure(run, batch, error) from None
            run.model.clamp_logit_scale_()
            run.step += 1
            interval.steps += 1
            interval.samples += len(batch)
            interval.tokens += int(batch.ids.numel())
            progress.advance()

            last = run.step == steps
            if run.step % every == 0 or last or run.step == 1:
                names = ["loss", *result.stats]
                values = [result.loss, *result.stats.values()]
                means = collectives.sum_over_processes([float(v) / process.world for v in values], process.device)
                digest = collectives.sum_modulo_2_63(batch.digest_part(), process.device)
                rates = interval.rates(process.world)
                forward = image_cost + text_flops(run.model.text, interval.tokens / interval.samples)
                line: dict[str, Any] = {
                    "step": run.step,
                    **dict(zip(names, means, strict=True)),
                    "logit_scale": result.logit_scale,
                    "lr": lr,
                    "grad_norm": result.grad_norm,
                    **rates,
                    "mfu": 3 * forward * rates["samples_per_second"] / peak,
                    "batch": f"{digest:016x}",
                    "samples": run.step * recipe.data.batch_size,
                    "epoch": run.step * recipe.data.batch_size / run.stream.samples,
                    "bad_samples": run.bad_samples.bad,
                }
                if metrics is not None:
                    metrics.write(line)
                    trackers.log(line, run.step)
                    progress.show(line)
                interval = Interval.begin()

            stopped, due = collectives.any_process([stop.signal is not None, is_save_due(run)], process.device)
            if last or stopped or due:
                save(run)
            if not stopped and should_evaluate(run, last=last):
                figures = evaluate(run.model, run.tokenizer, run.step)
                run.model.train()
                if process.is_main:
                    trackers.log(figures, run.step)
                interval = Interval.begin()
            if stopped:
                break
    if metrics is not None:
        metrics.close()
    trackers.close()
    return Outcome(run.step, finished=run.step >= steps, signal=stop.signal)


def to_device(batch: Batch, run: Run) -> Inputs:
    """Pixels to the device as uint8 and normalised there; captions padded to the batch's longest."""
    device, look = run.process.device, run.recipe.preprocess
    images = batch.images.to(device, non_blocking=True)
    return Inputs(
        images=normalize(images, look.mean, look.std),
        ids=batch.padded_ids(run.tokenizer.pad).to(device, non_blocking=True),
        lengths=batch.lengths.long(),
        groups=batch.groups.to(device, non_blocking=True),
    )


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


def explain_failure(run: Run, batch: Batch, error: TrainingError) -> TrainingError:
    """Keep what is needed to look at a step that failed, and name it."""
    path = run.run_dir / f"failed_step_{run.step}.rank_{run.process.rank}.json"
    path.write_text(json.dumps({"step": run.step, "error": str(error), "keys": batch.keys}, indent=2) + "\n")
    keys = ", ".join(batch.keys[:5])
    return TrainingError(
        f"{error}. Samples of this batch: {keys}, … (all in {path}). The weights are those before this step; try a "
        "lower optimizer.lr, training.gradient_clip = 1.0, a longer schedule.warmup_steps, or precision 'fp32'"
    )


def is_save_due(run: Run) -> bool:
    """By steps, or by this process's clock."""
    policy = run.recipe.checkpoint
    minutes = (time.monotonic() - run.saved_at) / 60
    return (policy.every_steps > 0 and run.step % policy.every_steps == 0) or 0 < policy.every_minutes <= minutes


def should_evaluate(run: Run, *, last: bool) -> bool:
    policy = run.recipe.evaluation
    return bool(policy.tasks) and (last or (policy.every_steps > 0 and run.step % policy.every_steps == 0))


def is_evaluated(run: Run) -> bool:
    """Whether this step's evaluation is on disk; the first process's view counts."""
    path = run.run_dir / "evals.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = any(f'"step": {run.step},' in line or f'"step": {run.step}}}' in line for line in lines)
    return bool(collectives.gather_objects(found)[0])


def save(run: Run) -> None:
    """Write a checkpoint, unless this step has one."""
    run.saved_at = time.monotonic()
    if run.saved_step == run.step:
        return
    run.saved_step = run.step
    failure = ""
    if run.process.is_main:
        scaler = run.process.scaler
        state = State(
            step=run.step,
            samples=run.step * run.recipe.data.batch_size,
            data_fingerprint=run.stream.fingerprint,
            tokenizer_fingerprint=run.tokenizer.fingerprint,
            bad_samples=run.bad_samples.bad,
            scaler={} if scaler is None else scaler.state_dict(),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "accelerate": accelerate.__version__,
            },
        )
        try:
            save_checkpoint(
                run.run_dir / "checkpoints",
                state,
                run.model.state_dict(),
                named_state(run.optimizer, run.model),
                dump_recipe(run.recipe),
                run.tokenizer.save,
                keep_last=run.recipe.checkpoint.keep_last,
            )
        except TrainingError as error:
            failure = str(error)
    # Nobody waits for a process that could not save: all learn of it and stop.
    for message in collectives.gather_objects(failure):
        if message:
            raise TrainingError(message)


@dataclass
class StopFlag:
    """The first signal that asked the run to stop."""

    signal: int | None = None


@contextmanager
def stop_signals() -> Generator[StopFlag]:
    """Inside, SIGTERM and SIGINT ask for a checkpoint and a clean end; a second SIGINT ends at once."""
    flag = StopFlag()

    def ask(number: int, frame: FrameType | None) -> None:
        if flag.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal = number

    handled = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in handled}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
