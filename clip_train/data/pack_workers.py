"""Processes that pack or inspect shards side by side, and the bar that shows how far they are."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def worker_pool(workers: int) -> Generator[ProcessPoolExecutor | None]:
    """Worker processes, started at once; None where there are to be none."""
    if workers == 0:
        yield None
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), _set_up_worker, (os.getpid(),))
    try:
        pool.submit(os.getpid).result()  # with `fork` this starts them all
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _set_up_worker(parent: int) -> None:
    """Ctrl-C is the parent's business; a worker whose parent was killed ends, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def progress_bar(console: Console | None, total: int | None) -> Progress:
    """A bar with the fields `total` and `skipped`; shown where there is a console."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    left = [TimeRemainingColumn()] if total else []
    skipped = TextColumn("{task.fields[skipped]} skipped")
    return Progress(*columns, *left, skipped, console=console, disable=console is None)
