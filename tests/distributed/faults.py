"""`clip-train train …` where things go wrong in one process only: `FAULT` says what.

torchrun --nproc-per-node=2 tests/distributed/faults.py train RECIPE --run-dir DIR
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing import active_children
from pathlib import Path

from clip_train.cli import main
from clip_train.data.batch import Batch
from clip_train.data.stream import Stream
from clip_train.errors import DataError
from clip_train.training import trainer

FAULT, FOLDER = os.environ["FAULT"], Path(os.environ["FOLDER"])


def own_folder(rank: int) -> None:
    """Each process has shards of its own, as on nodes with disks of their own."""
    source = f"data.sources.s.shards={FOLDER}/rank{rank}/*.tar"
    sys.argv += ["--set", source]


def fails_at(step_of_fault: int) -> None:
    read = Stream.__getitem__

    def failing(self: Stream, step: int) -> Batch:
        if step == step_of_fault:
            raise DataError("x.tar: cannot be read any more")
        return read(self, step)

    Stream.__getitem__ = failing


def loses_a_worker() -> None:
    next_batch = trainer.next_batch

    def killing(batches: object, run: trainer.Run) -> Batch:
        batch = next_batch(batches, run)  # type: ignore[arg-type]
        if run.step == 3:
            for worker in active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
        return batch

    trainer.next_batch = killing  # type: ignore[assignment]


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    if FAULT == "other shards":
        own_folder(rank)
    elif rank == 1:
        {"read": lambda: fails_at(3), "worker": loses_a_worker}[FAULT]()
    sys.exit(main())
