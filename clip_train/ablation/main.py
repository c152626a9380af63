"""`clip-train ablate GRID.toml`: check everything, learn the vocabulary, show the plan, run what is missing, report."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from clip_train.ablation import cells as folders
from clip_train.ablation import plan
from clip_train.ablation.cells import Lock
from clip_train.ablation.grid import Cell, Grid, load_grid
from clip_train.ablation.grid_file import PREVIOUS, Probe, Vocabulary
from clip_train.ablation.report import write_report
from clip_train.ablation.run import CLIP_TRAIN, run_cells
from clip_train.ablation.table import write_table
from clip_train.config.load import set_values
from clip_train.data.shards import resolve
from clip_train.errors import ConfigError, UserError
from clip_train.evaluation.text.suite import choose, tasks_from_elsewhere
from clip_train.from_recipe.model import build_model, build_objective, build_tokenizer
from tokenizer.commands import train_from_files


def ablate(
    path: Path,
    out: Path | None,
    *,
    budget: str | None,
    jobs: int | None,
    share: str | None,
    plan_only: bool,
    report_only: bool,
    console: Console,
    program: Sequence[str] = CLIP_TRAIN,
) -> int:
    """Returns the exit code: 0, 1 where cells failed, 128 + a signal that cut it.

    Raises UserError, before anything is trained, for a grid, a recipe or a share that cannot be, and for folders of
    another grid.
    """
    if jobs is None:  # small runs on a CPU gain little from threads; of a GPU there is one
        jobs = 1 if torch.cuda.is_available() else min(4, folders.usable_cores())
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1")
    grid = load_grid(path, out or Path("runs") / "-".join([path.stem, *([budget] if budget else [])]), budget)
    mine = part_of(grid.runs, share)
    if not report_only:
        check(grid)
        learn_vocabulary(grid, console)
        if plan_only:
            if grid.generator is not None and not (grid.out / "generator.json").exists():
                console.print("without experiment 3, whose generator is not trained yet", soft_wrap=True)
                grid = replace(grid, generator=None)
            threads = max(1, folders.usable_cores() // jobs)
            plan.measure(grid, program, threads, console)
        plan.show(grid, mine, jobs, console)
        if plan_only:
            return 0
        make_generator(grid, console, program)
        outcome = run_cells(grid, mine, jobs=jobs, console=console, program=program)
        for name, why in outcome.failed.items():
            console.print(f"[bold red]failed[/] {name}: {why}", soft_wrap=True)
        if outcome.signal is not None:
            return outcome.code
        code = outcome.code
    else:
        code = 0
    missing = [cell.id for cell in grid.runs if not folders.is_finished(grid, cell)]
    if missing and share is not None and not report_only:
        console.print(f"{len(missing)} runs of other shares are missing: the last share writes table and report")
        return code
    if len(missing) == len(grid.runs) and not report_only:  # all have failed, which was said
        return code
    table = write_table(grid)
    console.print(f"table: {table}", soft_wrap=True)
    console.print(f"[bold green]report:[/] {write_report(grid)}", soft_wrap=True)
    if missing:
        console.print(f"without {len(missing)} runs that are not finished: {', '.join(missing)}", soft_wrap=True)
    return code


def check(grid: Grid) -> None:
    """Build every tower and loss without memory, find every shard, look whose folders there are, before any training.

    Raises ConfigError, DataError or UserError with the cell's name.
    """
    if grid.file.probes:
        _check_probe(grid.file.probe)
    elif not any(cell.recipe.evaluation.tasks for cell in grid.runs):
        raise ConfigError("nothing would be measured: give the grid probes = ['text'], or its recipe evaluation.tasks")
    built: set[str] = set()
    for cell in grid.runs:
        try:
            _check_cell(grid, cell, built)
        except UserError as error:
            raise type(error)(f"cell {cell.name!r}: {error}") from error
        folders.check(grid, cell)


def _check_cell(grid: Grid, cell: Cell, built: set[str]) -> None:
    if not folders.is_finished(grid, cell):
        _check_initial(grid, cell)
    recipe = set_values(cell.recipe, ["training.seed=0", "name=cell"])
    if not Path(recipe.tokenizer.path).exists() and _comes_before(grid, cell, recipe.tokenizer.path):
        # It is not learned yet; the shipped one finds the same contradictions.
        recipe = set_values(recipe, ["tokenizer.path=default"])
    text = recipe.model_dump_json()
    if text in built:
        return
    built.add(text)
    tokenizer = build_tokenizer(recipe)
    with torch.device("meta"):
        build_model(recipe, tokenizer)
    build_objective(recipe, tokenizer)
    patterns = [source.shards for source in recipe.data.sources.values()]
    patterns += [task.shards for task in recipe.evaluation.tasks.values()]
    for pattern in patterns:
        if pattern is not None and not any(":" in one and not one.startswith("embedded:") for one in _several(pattern)):
            resolve(pattern)


def _check_probe(probe: Probe) -> None:
    """Raises UserError for tasks that are none, and for data of theirs that is not there or cannot be read."""
    try:
        sentiment = None if probe.sentiment is None else Path(probe.sentiment)
        choose(probe.tasks, tasks_from_elsewhere(sentiment, probe.glue, probe.glue_limit))
    except UserError as error:
        raise type(error)(f"[probe]: {error}") from error


def _check_initial(grid: Grid, cell: Cell) -> None:
    """Raises ConfigError for a run to start from that is not there, and is not the one that `after` names."""
    for key in ("init", "init_text", "init_image"):
        value = getattr(cell.recipe.training, key)
        if value is None or Path(value).exists() or _comes_before(grid, cell, value):
            continue
        raise ConfigError(
            f"training.{key} = {value!r}: there is no such run or checkpoint; for a cell of this grid give the arm "
            f"`after`, and {PREVIOUS} for its folder"
        )


def _comes_before(grid: Grid, cell: Cell, path: str) -> bool:
    """Whether a file is made before the cell is run: the grid's vocabulary, or what a cell it comes after writes."""
    earlier = cell.after
    while earlier is not None:
        if Path(path).is_relative_to(grid.folder(earlier)):
            return True
        earlier = grid.cell(earlier).after
    return path == str(grid.vocabulary)


def part_of(runs: Sequence[Cell], share: str | None) -> list[Cell]:
    """The runs of share `I/N` (I from 1); all without one. Raises UserError for a share that is none."""
    if share is None:
        return list(runs)
    found = re.fullmatch(r"(\d+)/(\d+)", share)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--share {share}: give I/N with I from 1 to N, as 3/8")
    return folders.share_of(runs, int(found[1]), int(found[2]))


def learn_vocabulary(grid: Grid, console: Console) -> None:
    """The grid's own vocabulary, once, whoever of several processes comes first."""
    wanted, out = grid.file.vocabulary, grid.vocabulary
    if wanted is None or out is None:
        return
    grid.out.mkdir(parents=True, exist_ok=True)
    settings, told = wanted.model_dump_json() + "\n", grid.out / "vocabulary.settings.json"
    lock = Lock.take(grid.out / "vocabulary.lock", wait=True)
    assert lock is not None
    try:
        known = told.read_text(encoding="utf-8") if told.exists() else settings
        if out.exists() and known != settings:
            raise UserError(f"{out} was learned with {known.strip()}: choose another --out, or remove it")
        if not out.exists():
            console.print(f"a vocabulary of {wanted.size:,} from {wanted.captions}", soft_wrap=True)
            aside = grid.out / "vocabulary.part.json"
            train_from_files(_caption_files(wanted), aside, vocab_size=wanted.size)
            told.write_text(settings, encoding="utf-8")
            aside.replace(out)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the vocabulary cannot be learned: {error}") from error
    finally:
        lock.release()


def make_generator(grid: Grid, console: Console, program: Sequence[str]) -> None:
    """The picture generator of experiment 3, once, on all cores; a training that was cut goes on.

    Raises UserError where the folder holds one of another size, or where its training fails.
    """
    if grid.generator is None:
        return
    folder, done = grid.out / "generator", grid.out / "generator.json"
    lock = Lock.take(grid.out / "generator.lock", wait=True)
    assert lock is not None
    try:
        size = json.loads(done.read_text(encoding="utf-8"))["size"] if done.exists() else None
        if size not in (None, grid.generator):
            raise UserError(
                f"{folder} holds a generator of size {size!r}, not {grid.generator!r}: choose another --out"
            )
        if size is None:
            console.print(f"a picture generator ({grid.generator}) for experiment 3 → {folder}", soft_wrap=True)
            began = time.monotonic()
            arguments = ["generator", "train", "--out", str(folder), "--budget", grid.generator]
            plan.run_command(program, arguments, folders.usable_cores(), grid.out / "generator.log")
            seconds = round(time.monotonic() - began, 1)
            done.write_text(json.dumps({"size": grid.generator, "seconds": seconds}) + "\n", encoding="utf-8")
            console.print(f"generator: {plan.duration(seconds)}", soft_wrap=True)
    finally:
        lock.release()


def _caption_files(wanted: Vocabulary) -> list[Path]:
    return [Path(file) for file in resolve(wanted.captions)]


def _several(pattern: str | Sequence[str]) -> Sequence[str]:
    return [pattern] if isinstance(pattern, str) else pattern
