"""The end of a process group."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from clip_train.runtime.teardown import wait_for_gloo

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are seen in /proc")


def start(work: threading.Event, name: str) -> threading.Thread:
    """A thread that the system knows by `name`: busy until `work` is set."""
    named = threading.Event()

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        named.set()
        while not work.is_set():
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert named.wait(10)
    return thread


def test_waits_for_a_thread_of_gloo_that_works() -> None:
    done = threading.Event()
    thread = start(done, "pt_gloo_runloop")
    timer = threading.Timer(0.5, done.set)
    timer.start()
    wait_for_gloo(seconds=60)
    assert done.is_set()
    thread.join(10)


def test_but_not_for_ever_and_not_for_others() -> None:
    done = threading.Event()
    thread = start(done, "pt_gloo_runloop")
    wait_for_gloo(seconds=0.2)
    assert not done.is_set(), "gave up"
    done.set()
    thread.join(10)
    done.clear()
    other = start(done, "another")
    before = time.monotonic()
    wait_for_gloo(seconds=60)
    assert time.monotonic() - before < 30, "another thread is none of gloo's"
    done.set()
    other.join(10)
