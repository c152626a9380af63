"""Worker processes: a map from numbers to items, read ahead of time, in order.

torch's DataLoader with the sharp edges off: an error in a worker arrives as itself, a killed worker is an
error and not a riddle, and Ctrl-C or a scheduler's SIGTERM, which reach every process of the group, leave the
workers to the trainer, who finishes its step first.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from clip_train.data.waiting import SlowNotice
from clip_train.errors import DataError, UserError
from clip_train.heartbeat import alive

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)
_SHARED = Path("/dev/shm")
_FULL_MEMORY = (
    f"a loader worker cannot go on because {_SHARED} is full: lower data.workers or data.batch_size, or give the "
    "container more (docker run --shm-size=8g), then run again to go on."
)


class Map(Protocol[Item_co]):
    """What a loader reads: number -> item."""

    def __getitem__(self, number: int, /) -> Item_co: ...


class Loader(Generic[Item]):
    """Iterates over `items[n] for n in numbers`, computed by worker processes.

    Args:
        items: a map from numbers to items.
        numbers: which, in order; `range(first_step, last_step)`.
        workers: processes; 0 computes in this one.
        prefetch: items that each worker computes ahead.
        pin_memory: hand out page-locked tensors, for faster copies to a GPU.
        item_bytes: about how large an item is, to see in time that it will not fit into shared memory.

    Raises (while iterating):
        UserError: as `items` raised it; `DataError` where a worker died.
    """

    def __init__(
        self,
        items: Map[Item],
        numbers: Sequence[int],
        *,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        item_bytes: int = 0,
    ) -> None:
        _check_shared_memory(workers * prefetch * item_bytes)
        self._numbers = numbers
        self._workers = workers
        self._loader: DataLoader[Item | UserError] = DataLoader(
            _Caught(items),
            sampler=numbers,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_set_up_worker,
            multiprocessing_context="fork" if workers else None,  # shares the index without copying it
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Item]:
        iterator = _started(self._loader)
        notice = SlowNotice()
        stop = partial(_shutdown, iterator)
        if self._workers:
            # An error that nobody catches keeps this generator alive to the end, where multiprocessing would wait for
            # ever for workers that ignore its SIGTERM. What is registered last comes first.
            atexit.register(stop)
        try:
            for number in self._numbers:
                with notice.waiting_for(f"item {number} of the data"):
                    item = self._next(iterator)
                if isinstance(item, UserError):
                    raise item
                alive()
                yield item
        finally:
            notice.close()
            if self._workers:  # also where the consumer stops early or fails: leave no process behind
                atexit.unregister(stop)
                stop()

    def _next(self, iterator: Iterator[Item | UserError]) -> Item | UserError:
        try:
            return next(iterator)
        except (RuntimeError, OSError, EOFError) as error:  # OSError: a batch whose memory went with its worker
            codes = _exit_codes(iterator)
            if not codes and "DataLoader worker" not in str(error):
                raise
            raise DataError(f"{_cause_of_death(codes)} ({type(error).__name__}: {error})") from error


class _Caught(Dataset[Item | UserError], Generic[Item]):
    """Errors as items: DataLoader would pass them on with another message, or as another type."""

    def __init__(self, items: Map[Item]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Item | UserError:
        try:
            item = self.items[index]
            if get_worker_info() is not None:
                _share(item)
            return item
        except UserError as error:
            return error


def _share(item: object) -> None:
    """Move an item's tensors to shared memory here. Else a thread of the queue would, whose failure is an item that
    never comes: the trainer would wait for it for ever.
    """
    try:
        for one in (item, *getattr(item, "__dict__", {}).values()):
            if isinstance(one, Tensor):
                one.share_memory_()
    except RuntimeError as error:
        raise DataError(f"{_FULL_MEMORY} ({error})") from error


def _started(loader: DataLoader[Item]) -> Iterator[Item]:
    """The loader's iterator, without the handler of SIGCHLD that torch installs: it raises wherever the trainer
    happens to be, in the middle of an update too. A worker's death is found where its item is waited for, within 5 s.
    """
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _shutdown(iterator: Any) -> None:
    iterator._shutdown_workers()  # DataLoader has no public way


def _exit_codes(iterator: Iterator[Any]) -> list[int]:
    """Of the workers that failed; one that is being killed closes its connections a moment before it has a code."""
    until = time.monotonic() + 2
    while True:
        codes = [worker.exitcode for worker in getattr(iterator, "_workers", []) if worker.exitcode]
        if codes or time.monotonic() > until:
            return codes
        time.sleep(0.01)


def _cause_of_death(codes: list[int]) -> str:
    if -signal.SIGBUS in codes:
        return _FULL_MEMORY
    return (
        "a loader worker was killed, most often for want of memory: lower data.workers or data.batch_size, or turn "
        "data.cache_decoded off. Then run again to go on."
    )


def _as_it_is(item: Item) -> Item:
    return item


def _set_up_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a worker whose trainer is gone ends by itself
    torch.set_num_threads(1)


def _check_shared_memory(needed: int) -> None:
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # all processes of the node fill it
    if needed and _SHARED.is_dir() and (free := shutil.disk_usage(_SHARED).free) < needed:
        raise DataError(
            f"batches in flight need about {needed >> 20} MiB of {_SHARED}, which has {free >> 20} MiB: "
            "lower data.workers or data.batch_size, or give the container more (docker run --shm-size=8g)"
        )
