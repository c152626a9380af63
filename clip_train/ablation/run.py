"""Run what is missing of a grid: stages as child processes, so many at once; cut anywhere, the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from clip_train.ablation import cells as folders
from clip_train.ablation.cells import Lock, Stage
from clip_train.ablation.grid import Cell, Grid
from clip_train.ablation.plan import Costs, duration
from clip_train.training.signals import exit_code, stop_signals

CLIP_TRAIN = (sys.executable, "-m", "clip_train")
POLL_SECONDS = 0.1
LOCKED_SECONDS = 2.0
"""How often a cell that another process works on is looked at."""
GRACE_SECONDS = 90.0
"""For children to save after a signal."""


@dataclass
class Outcome:
    """How it went, by cell `id`."""

    finished: list[str] = field(default_factory=list[str])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """With the reason."""
    signal: int | None = None

    @property
    def code(self) -> int:
        return exit_code(self.signal) if self.signal is not None else int(bool(self.failed))


@dataclass
class _Active:
    cell: Cell
    stage: Stage
    process: subprocess.Popen[bytes]
    began: float
    lock: Lock
    log: TextIO


def run_cells(
    grid: Grid,
    cells: Sequence[Cell],
    *,
    jobs: int,
    console: Console,
    program: Sequence[str] = CLIP_TRAIN,
    threads: int | None = None,
) -> Outcome:
    """Run the missing stages of `cells`, `jobs` at once, each on `threads` threads (cores // jobs).

    A cell that fails is named, what comes after it is left out, and the rest goes on. A cell that another process has
    locked is waited for. SIGTERM and SIGINT go to the children, which save; then it ends.
    """
    threads = threads or max(1, folders.usable_cores() // jobs)
    outcome, active, pending = Outcome(), list[_Active](), list(cells)
    began = time.monotonic()
    looked_at: dict[str, float] = {}
    left = _left(grid, cells, outcome, jobs)
    with stop_signals() as stop, _progress(console, len(cells)) as progress:
        bar = progress.add_task(grid.file.name, total=len(cells), now="")
        while pending or active:
            if stop.signal is not None:
                _stop_all(grid, active, console)
                outcome.signal = stop.signal
                break
            for one in [one for one in active if one.process.poll() is not None]:
                active.remove(one)
                _settle(grid, one, outcome, pending, console)
                left = _left(grid, cells, outcome, jobs)
                if one.cell.id in outcome.finished:
                    took = duration(folders.seconds_of(grid, one.cell) or 0.0)
                    so_far = f"{len(outcome.finished)} of {len(cells)} in {duration(time.monotonic() - began)}"
                    console.print(f"{one.cell.id}: {took} ({so_far}; {left})", soft_wrap=True)
            while len(active) < jobs:
                started = _start_next(grid, pending, outcome, looked_at, console, program, threads)
                if started is None:
                    break
                active.append(started)
            now = ", ".join(f"{one.cell.id} ({one.stage.name})" for one in active) or "waiting for another process"
            progress.update(bar, completed=len(outcome.finished) + len(outcome.failed), now=f"{left} · {now}")
            if pending or active:
                time.sleep(POLL_SECONDS)
    return outcome


def _start_next(
    grid: Grid,
    pending: list[Cell],
    outcome: Outcome,
    looked_at: dict[str, float],
    console: Console,
    program: Sequence[str],
    threads: int,
) -> _Active | None:
    """Start the first cell that can be; take those that are finished, or cannot be, out of `pending`."""
    for cell in list(pending):
        if cell.after in outcome.failed:
            pending.remove(cell)
            outcome.failed[cell.id] = f"comes after {cell.after}, which failed"
            continue
        if cell.after is not None and not folders.is_finished(grid, grid.cell(cell.after)):
            continue
        if time.monotonic() - looked_at.get(cell.id, -LOCKED_SECONDS) < LOCKED_SECONDS:
            continue
        lock = Lock.take(grid.folder(cell) / "lock")
        if lock is None:
            if cell.id not in looked_at:
                console.print(f"{cell.id}: another process is at work on it", soft_wrap=True)
            looked_at[cell.id] = time.monotonic()
            continue
        todo = folders.unfinished(grid, cell)
        if not todo:
            lock.release()
            pending.remove(cell)
            outcome.finished.append(cell.id)
            continue
        pending.remove(cell)
        try:
            folders.prepare(grid, cell)
            folders.clear(todo[0])
            return _start(grid, cell, todo[0], lock, program, threads)
        except (OSError, ValueError) as error:
            lock.release()
            outcome.failed[cell.id] = str(error)
            console.print(f"[bold red]failed[/] {cell.id}: {error}", soft_wrap=True)
    return None


def _start(grid: Grid, cell: Cell, stage: Stage, lock: Lock, program: Sequence[str], threads: int) -> _Active:
    log = (grid.folder(cell) / f"{stage.name}.log").open("a", encoding="utf-8")
    process = subprocess.Popen(
        [*program, *stage.command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=folders.environment(threads),
        start_new_session=True,  # a terminal's Ctrl-C reaches it through us, once
        pass_fds=(lock.descriptor,),  # as long as it lives, nobody else works in this folder
    )
    return _Active(cell, stage, process, time.monotonic(), lock, log)


def _settle(grid: Grid, one: _Active, outcome: Outcome, pending: list[Cell], console: Console) -> None:
    """Write down how a stage ended; a cell with more stages is next in line."""
    one.log.close()
    seconds, code = time.monotonic() - one.began, one.process.returncode
    folder = grid.folder(one.cell)
    missing = [path for path in one.stage.outputs if not path.exists()]
    finished = code == 0 and not missing
    folders.record(folder, one.stage, seconds, finished)
    one.lock.release()
    if not finished:
        log = folder / f"{one.stage.name}.log"
        why = f"exit code {code}" if code else f"it left no {missing[0].name}"
        outcome.failed[one.cell.id] = f"{one.stage.name}: {why}; see {log}"
        console.print(f"[bold red]failed[/] {one.cell.id}, {one.stage.name}: {why}. {log} ends:", soft_wrap=True)
        console.print(folders.last_words(log), markup=False, soft_wrap=True)
    elif folders.unfinished(grid, one.cell):
        pending.insert(0, one.cell)
    else:
        outcome.finished.append(one.cell.id)


def _stop_all(grid: Grid, active: Sequence[_Active], console: Console) -> None:
    console.print(f"stopping {len(active)} runs; the same command goes on", soft_wrap=True)
    for one in active:
        _signal(one, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        while any(one.process.poll() is None for one in active) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:  # also where a second signal ends the waiting
        for one in active:
            if one.process.poll() is None:
                _signal(one, signal.SIGKILL)
                one.process.wait()
            folders.record(grid.folder(one.cell), one.stage, time.monotonic() - one.began, False)
            one.log.close()
            one.lock.release()


def _signal(one: _Active, number: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(one.process.pid, number)


def _left(grid: Grid, cells: Sequence[Cell], outcome: Outcome, jobs: int) -> str:
    costs = Costs.known(grid)
    waiting = [cell for cell in cells if cell.id not in outcome.finished and cell.id not in outcome.failed]
    seconds = costs.total(waiting)
    return "time left not known yet" if seconds is None else f"about {duration(seconds / jobs)} left"


def _progress(console: Console, total: int) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
