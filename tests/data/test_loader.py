# pyright: reportPrivateUsage=false
from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from clip_train.data.loader import Loader
from clip_train.errors import DataError


class Squares:
    def __init__(self, bad: int = -1) -> None:
        self.bad = bad

    def __getitem__(self, number: int) -> int:
        if number == self.bad:
            raise DataError("shard-7.tar: is cut short")
        return number * number


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_items_in_order(workers: int) -> None:
    loader = Loader(Squares(), range(3, 20), workers=workers)
    assert list(loader) == [n * n for n in range(3, 20)]
    assert len(loader) == 17
    assert list(Loader(Squares(), range(5, 5), workers=workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_as_themselves(workers: int) -> None:
    found: list[int] = []
    with pytest.raises(DataError) as caught:
        found.extend(Loader(Squares(bad=5), range(10), workers=workers))
    assert str(caught.value) == "shard-7.tar: is cut short"
    assert type(caught.value) is DataError
    assert found == [0, 1, 4, 9, 16]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes are looked after each half second instead of each 5 s."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))


class Dies:
    def __getitem__(self, number: int) -> int:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


@pytest.mark.usefixtures("impatient")
def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(DataError, match="loader worker was killed"):
        list(Loader(Dies(), range(10), workers=1))


class Pids:
    def __init__(self, kind: Callable[[int], Any]) -> None:
        self.kind = kind

    def __getitem__(self, number: int) -> Any:
        return self.kind(os.getpid())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", [int, lambda pid: torch.full((1000,), pid)], ids=["number", "shared memory"])
def test_a_worker_that_dies_between_batches_is_found_where_the_next_is_waited_for(kind: Callable[[int], Any]) -> None:
    """Not in the middle of an update, which torch's handler of SIGCHLD would break into; and be it that what the
    worker has left cannot be fetched any more.
    """
    iterator = iter(Loader(Pids(kind), range(100), workers=1, prefetch=2))
    pid = next(iterator)
    os.kill(pid if isinstance(pid, int) else int(pid[0]), signal.SIGKILL)
    time.sleep(0.3)  # an update: nothing may be raised here
    with pytest.raises(DataError, match="loader worker was killed, most often for want of memory"):
        list(iterator)
    assert not multiprocessing.active_children()


class Bus:
    def __getitem__(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGBUS)
        return number


@pytest.mark.usefixtures("impatient")
def test_what_shared_memory_does_when_it_is_full_is_told() -> None:
    with pytest.raises(DataError, match=r"/dev/shm is full.*shm-size"):
        list(Loader(Bus(), range(4), workers=1))


def test_stopping_early_leaves_no_process() -> None:
    before = set(multiprocessing.active_children())
    iterator = iter(Loader(Squares(), range(1000), workers=2))
    assert next(iterator) == 0
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    iterator.close()  # type: ignore[attr-defined]
    assert not any(worker.is_alive() for worker in workers)


class Slow:
    def __getitem__(self, number: int) -> int:
        time.sleep(0.05)
        return number


def interrupted() -> None:
    """Run in a process of its own: both signals go to the whole group, and the workers must live on."""
    received: list[int] = []
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda number, _: received.append(number))
    found: list[int] = []
    for item in Loader(Slow(), range(12), workers=2):
        if item in (3, 5):
            os.killpg(0, signal.SIGINT if item == 3 else signal.SIGTERM)
        found.append(item)
    print(found == list(range(12)), received == [signal.SIGINT, signal.SIGTERM])


def test_signals_to_the_group_leave_workers_alive() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import test_loader; test_loader.interrupted()"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_too_little_shared_memory_is_seen_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="shm-size"):
        Loader(Squares(), range(3), workers=2, item_bytes=2**60)
    Loader(Squares(), range(3), workers=0, item_bytes=2**60)
    free = shutil.disk_usage("/dev/shm").free
    Loader(Squares(), range(3), workers=1, prefetch=1, item_bytes=free // 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # as many processes share it
    with pytest.raises(DataError, match="shm-size"):
        Loader(Squares(), range(3), workers=1, prefetch=1, item_bytes=free // 3)
