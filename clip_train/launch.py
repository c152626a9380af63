"""From a recipe to a finished run: processes up, training, evaluation, processes down."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clip_train.config.load import set_values
from clip_train.config.schema import Language, Recipe
from clip_train.errors import CheckpointError, ConfigError
from clip_train.evaluation.embed import embed
from clip_train.evaluation.language import evaluate_language
from clip_train.evaluation.run import evaluate
from clip_train.from_recipe.data import build_cache, build_preprocess
from clip_train.from_recipe.model import build_objective
from clip_train.loading import LoadedLanguageModel, LoadedModel, load_any, load_checkpoint, read_recipe
from clip_train.models.base import Model
from clip_train.models.language import LanguageModel
from clip_train.models.two_tower import TwoTower
from clip_train.objectives.base import PerSample
from clip_train.runtime import collectives
from clip_train.runtime.parallel import unsharded
from clip_train.runtime.process import Process, launched
from clip_train.training.checkpoint import read_checkpoint
from clip_train.training.signals import exit_code, mark_interrupted
from clip_train.training.trainer import train
from tokenizer import BPETokenizer


def run_recipe(
    recipe: Recipe, run_dir: Path, *, resume: str, console: Console, allow_changed: Sequence[str] = ()
) -> int:
    """Train a recipe and evaluate it. Returns the exit code: 0, or `exit_code` of the signal that ended it."""
    trackers = ["wandb"] * bool(recipe.logging.wandb_project) + ["tensorboard"] * recipe.logging.tensorboard
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise ConfigError(f"logging to {tracker} was asked for, but it is not installed: pip install {tracker}")
    with launched(
        recipe.training.precision,
        deterministic=recipe.training.deterministic,
        trackers=trackers,
        logging_dir=run_dir,
        timeout_minutes=recipe.faults.stall_minutes + 5,  # the watchdog knows more, so it speaks first
    ) as process:
        if process.is_main:
            console.print(
                f"[bold]{recipe.name}[/] on {process.world} × {process.device.type} → {run_dir}", soft_wrap=True
            )
            say_arithmetic(process, recipe.training.precision, console)

        run_dir.mkdir(parents=True, exist_ok=True)
        if process.is_main:
            write_environment(run_dir / "environment.json", process)
            mark_interrupted(run_dir, None, 0)

        def evaluate_now(model: Model, tokenizer: BPETokenizer, step: int) -> Mapping[str, float]:
            collectives.broadcast_buffers(model)
            loaded = loaded_of(model, tokenizer, recipe, step)
            with unsharded(model):
                return evaluate_loaded(loaded, run_dir, process, console)

        outcome = train(
            recipe,
            run_dir,
            process,
            resume=resume,
            console=console,
            evaluate=evaluate_now,
            allow_changed=allow_changed,
        )
        if process.is_main and outcome.signal is not None:
            console.print(f"stopped by signal {outcome.signal} at step {outcome.step}, saved: run again to go on")
    return exit_code(outcome.signal)


def say_arithmetic(process: Process, asked: str, console: Console) -> None:
    """A notice where the process does not compute in what was asked for."""
    if process.precision != asked:
        console.print(f"this CPU has no {asked} products of its own: computing in {process.precision}", soft_wrap=True)


def write_environment(path: Path, process: Process) -> None:
    """What a run ran on, for its report."""
    device = torch.cuda.get_device_name() if process.device.type == "cuda" else platform.processor() or "CPU"
    environment = {
        "processes": str(process.world),
        "device": f"{device} ({os.cpu_count()} CPU cores)",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm", "webdataset", "accelerate", "clip-train")},
    }
    path.write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def loaded_of(model: Model, tokenizer: BPETokenizer, recipe: Recipe, step: int) -> LoadedModel | LoadedLanguageModel:
    """A model in training, as evaluation takes it."""
    if isinstance(model, LanguageModel):
        return LoadedLanguageModel(model, tokenizer, recipe, step)
    assert isinstance(model, TwoTower)
    return LoadedModel(model, build_preprocess(recipe), tokenizer, recipe, step)


def evaluate_loaded(
    loaded: LoadedModel | LoadedLanguageModel, out: Path, process: Process, console: Console
) -> Mapping[str, float]:
    """Every task of the recipe, on all processes; the first writes `eval.json` and prints the figures."""
    if isinstance(loaded, LoadedLanguageModel):
        objective = build_objective(loaded.recipe, loaded.tokenizer)
        assert isinstance(objective, PerSample)
        return evaluate_language(
            loaded.model,
            objective,
            loaded.tokenizer,
            {name: task for name, task in loaded.recipe.evaluation.tasks.items() if isinstance(task, Language)},
            run_dir=out,
            step=loaded.step,
            batch_size=loaded.recipe.evaluation.batch_size,
            cache=build_cache(loaded.recipe, commands=False),
            device=process.device,
            precision=process.precision,
            rank=process.rank,
            world=process.world,
            gather=collectives.gather_objects,
            console=console if process.is_main else None,
        )
    return evaluate(
        loaded,
        loaded.recipe.evaluation.tasks,
        run_dir=out,
        step=loaded.step,
        batch_size=loaded.recipe.evaluation.batch_size,
        workers=loaded.recipe.data.workers,
        cache=build_cache(loaded.recipe, commands=False),
        device=process.device,
        precision=process.precision,
        rank=process.rank,
        world=process.world,
        gather=collectives.gather_objects,
        console=console if process.is_main else None,
    )


def run_embedding(
    path: Path, shards: Sequence[str], out: Path, *, image: str, caption: str | None, dtype: str, precision: str | None,
    batch_size: int, workers: int, console: Console,
) -> int:  # fmt: skip
    """Embed shards with a checkpoint, on all processes."""
    loaded = load_checkpoint(read_checkpoint(path))
    usual = loaded.recipe.training.precision if torch.cuda.is_available() else "fp32"
    with launched(precision or usual) as process:
        if process.is_main:
            say_arithmetic(process, precision or usual, console)
        loaded.model.to(process.device)
        with Progress(
            TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"), console=console, transient=True, disable=not process.is_main,
        ) as progress:  # fmt: skip
            bar, began, samples = progress.add_task("", total=None, rate=""), time.monotonic(), 0

            def advance(done: int, left: int) -> None:
                nonlocal samples
                samples += done
                rate = samples / (time.monotonic() - began)
                shown = f"{rate * process.world:,.0f} samples/s"
                progress.update(bar, advance=1, total=progress.tasks[0].completed + 1 + left, rate=shown)

            count = embed(
                loaded, shards, out, image=image, caption=caption, batch_size=batch_size, workers=workers,
                precision=process.precision, dtype=dtype, rank=process.rank, world=process.world, advance=advance,
            )  # fmt: skip
        process.barrier()
        total = sum(collectives.gather_objects(count))
        if process.is_main:
            console.print(f"{out}: {total:,} samples embedded in {time.monotonic() - began:.0f} s", soft_wrap=True)
    return 0


def run_evaluation(path: Path, overrides: Sequence[str], out: Path | None, console: Console) -> int:
    """Evaluate a run folder or a checkpoint by its recipe's tasks, as overridden."""
    checkpoint = read_checkpoint(path)
    recipe = set_values(read_recipe(checkpoint), overrides)
    loaded = replace(load_any(checkpoint, weights=recipe.evaluation.weights), recipe=recipe)
    if not recipe.evaluation.tasks:
        raise CheckpointError(
            f"{path}: its recipe has no [evaluation.tasks.NAME]; add one with --set evaluation.tasks…"
        )
    # A checkpoint of a run lies in RUN/checkpoints/step_N, any other wherever it was put.
    of_run = checkpoint.path.parent.name == "checkpoints"
    run_dir = out or (checkpoint.path.parent.parent if of_run else checkpoint.path)
    # What was trained in fp16 on a GPU can be evaluated without one.
    with launched("fp32" if not torch.cuda.is_available() else recipe.training.precision) as process:
        loaded.model.to(process.device)
        evaluate_loaded(loaded, run_dir, process, console)
    return 0
