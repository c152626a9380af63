from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


class Dies:
    def __getitem__(self, number: int) -> int:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(DataError, match="loader worker was killed"):
        list(Loader(Dies(), range(10), workers=1))


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


def test_too_little_shared_memory_is_seen_in_time() -> None:
    with pytest.raises(DataError, match="shm-size"):
        Loader(Squares(), range(3), workers=2, item_bytes=2**60)
    Loader(Squares(), range(3), workers=0, item_bytes=2**60)
