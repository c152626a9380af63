"""Before the first step: build everything, prove that a step fits, open the data, restore the newest checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from clip_train.config.load import dump_recipe
from clip_train.config.schema import Recipe
from clip_train.data.bad_samples import BadSampleLog
from clip_train.data.stream import Stream
from clip_train.errors import ConfigError, DataError, UserError
from clip_train.from_recipe.data import build_stream
from clip_train.from_recipe.model import build_model, build_objective, build_tokenizer
from clip_train.from_recipe.update import build_average, build_optimizer, build_parallel, total_steps
from clip_train.models.base import Model
from clip_train.objectives.base import Inputs, PerSample
from clip_train.runtime import collectives
from clip_train.runtime.parallel import separate_shards
from clip_train.runtime.process import Process
from clip_train.runtime.recompute import frozen_running_statistics
from clip_train.training.average import PREFIX, WeightAverage
from clip_train.training.faults import FaultLog
from clip_train.training.initial import load_initial, load_initial_tower
from clip_train.training.lock import lock_
from clip_train.training.optimizer import load_named_state
from clip_train.training.resume import restore
from clip_train.training.update import Objective, backward
from tokenizer import BPETokenizer


@dataclass
class Run:
    """What the loop works with. Built once; the model, the optimizer and the counters change as it goes."""

    recipe: Recipe
    run_dir: Path
    process: Process
    console: Console
    tokenizer: BPETokenizer
    objective: Objective
    model: Model
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    stream: Stream
    bad_samples: BadSampleLog
    faults: FaultLog
    step: int = 0
    captions_cut: int = 0
    """Captions longer than the tokenizer's cap, in this process; what came before a resume is in the first one."""
    changes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What was accepted to be other than at the beginning, and since when (see `changes`)."""
    saved_step: int = -1
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return total_steps(self.recipe, self.stream.order)

    @property
    def samples(self) -> int:
        """Consumed so far: the number of the sample that comes next."""
        return self.stream.order.first(self.step)


def set_up(
    recipe: Recipe, run_dir: Path, process: Process, *, resume: str, allow_changed: Sequence[str], console: Console
) -> Run:
    """Build everything, prove that a step fits, open the data, restore the newest checkpoint."""
    if recipe.data.batch_size % process.world:
        raise ConfigError(
            f"data.batch_size = {recipe.data.batch_size} is global: make it a multiple of the {process.world} processes"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(recipe)
    torch.manual_seed(recipe.training.seed)
    objective = build_objective(recipe, tokenizer)
    model = build_model(recipe, tokenizer)
    prepare_weights(recipe, model, tokenizer, console.print if process.is_main else lambda _: None)
    wrapped = build_parallel(recipe, model, process)
    optimizer = build_optimizer(recipe, model)
    separate_shards(optimizer)
    average = build_average(recipe, model)
    dry_run(recipe, objective, model, wrapped, process, tokenizer)
    stream = agreed_stream(recipe, tokenizer, process)
    limits = recipe.faults.model_dump(exclude={"stall_minutes"})
    run = Run(
        recipe=recipe,
        run_dir=run_dir,
        process=process,
        console=console,
        tokenizer=tokenizer,
        objective=objective,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        average=average,
        stream=stream,
        bad_samples=BadSampleLog(run_dir / "bad_samples.jsonl", recipe.data.max_bad_fraction, write=process.is_main),
        faults=FaultLog(None, **limits),
    )
    state = restore(
        recipe,
        run_dir,
        resume,
        model=model,
        load_optimizer=lambda tensors: load_state(run, tensors),
        scaler=process.scaler,
        stream=stream,
        tokenizer_fingerprint=tokenizer.fingerprint,
        allow_changed=allow_changed,
        notify=console.print if process.is_main else lambda _: None,
    )
    if state is not None:
        run.step = run.saved_step = state.step
        run.bad_samples.bad, run.bad_samples.seen = state.bad_samples, state.samples + state.bad_samples
        run.changes = state.changes
        run.captions_cut = state.captions_cut if process.is_main else 0
        if run.steps < run.step:
            raise ConfigError(
                f"the recipe ends with step {run.steps}, but the checkpoint is at {run.step}: train longer"
            )
    faults_path, kept = run_dir / "faults.jsonl" if process.is_main else None, state.faults if state else {}
    run.faults = FaultLog(faults_path, **limits, step=run.step, kept=kept)
    if process.is_main:
        (run_dir / "recipe.toml").write_text(dump_recipe(recipe), encoding="utf-8")
    return run


def prepare_weights(recipe: Recipe, model: Model, tokenizer: BPETokenizer, notify: Callable[[str], Any]) -> None:
    """What the first step starts from, and what of it stays as it is."""
    training = recipe.training
    if training.init is not None:
        load_initial(model, Path(training.init), recipe=recipe, tokenizer=tokenizer, notify=notify)
    for prefix, path in (("text", training.init_text), ("image", training.init_image)):
        if path is not None:
            load_initial_tower(model, prefix, Path(path), recipe=recipe, tokenizer=tokenizer, notify=notify)
    if training.lock is not None:
        for prefix, tower in model.towers.items():
            lock_(tower, getattr(training.lock, prefix), key=f"training.lock.{prefix}")


def agreed_stream(recipe: Recipe, tokenizer: BPETokenizer, process: Process) -> Stream:
    """The training data, the same for all processes: nobody waits for one that cannot read it, and none sees other
    shards than the rest (a pattern on disks of their own), which would repeat samples and lose others.

    Raises UserError in all processes where one fails, or where they differ.
    """
    stream, failure = None, None
    try:
        stream = build_stream(recipe, tokenizer, rank=process.rank, world=process.world)
    except UserError as error:
        failure = error
    views = collectives.gather_objects((str(failure or ""), "" if stream is None else stream.fingerprint))
    if failure is not None:
        raise failure
    for rank, (message, fingerprint) in enumerate(views):
        if message:
            raise DataError(f"process {rank} cannot read its data: {message}")
        if fingerprint != views[0][1]:
            raise DataError(
                f"process {rank} sees other shards than process 0 (fingerprints {fingerprint} and {views[0][1]}): "
                "`shards` must name the same files everywhere. Put them on a shared disk, or copy all to each node."
            )
    assert stream is not None
    return stream


def load_state(run: Run, tensors: dict[str, Tensor]) -> None:
    """The optimizer's tensors of a checkpoint, and the average's, to where they belong."""
    averaged = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    load_named_state(run.optimizer, run.model, {k: tensor for k, tensor in tensors.items() if k not in averaged})
    if run.average is not None:
        run.average.load(averaged)


def dry_run(
    recipe: Recipe,
    objective: Objective,
    model: Model,
    wrapped: nn.Module,
    process: Process,
    tokenizer: BPETokenizer,
) -> None:
    """Forward and backward on a synthetic batch of the largest shapes.

    Out-of-memory and shape errors come now, before the first shard is opened, and so does a weight that would never
    be trained. Changes no weight and no statistic.
    """
    count = recipe.data.batch_size // process.world
    cap, size = tokenizer.context_length, None if recipe.image is None else recipe.image.image_size
    specials = set(tokenizer.vocabulary.special_ids.values())
    ids = torch.full((count, cap), next(i for i in range(tokenizer.vocab_size) if i not in specials))
    ids[:, -1] = tokenizer.eot
    inputs = Inputs(
        images=None if size is None else torch.zeros(count, 3, size, size),
        ids=ids,
        lengths=torch.full((count,), cap),
        groups=torch.arange(count),
        rows=torch.arange(count),
    )
    if isinstance(objective, PerSample):
        inputs = objective.prepare(inputs, seed=0, step=0)
    micro = min(recipe.training.micro_batch or count, count)
    try:
        with frozen_running_statistics(model):
            backward(wrapped, objective, inputs.to(process.device), process, step=0, seed=0, micro_batch=micro)
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            f"{micro} samples of {f'{size} px and ' if size else ''}{cap} tokens do not fit on {process.device}: set "
            f"training.micro_batch below {micro} (the loss still sees all {recipe.data.batch_size} samples)"
        ) from error
    untrained = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
    if untrained:
        raise ConfigError(
            f"no gradient reaches {', '.join(untrained[:3])}{' …' if untrained[3:] else ''}: these weights would never "
            "be trained. Choose a pool or a loss that uses them"
        )
    model.zero_grad(set_to_none=True)
