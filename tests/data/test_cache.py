from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import ShardServer

from clip_train.data import cache as cache_module
from clip_train.data.cache import Cache, default_folder
from clip_train.data.remote import Found, Transfer, look_up
from clip_train.errors import DataError

HASTY = Transfer(timeout=20, attempts=2, backoff=0.01)
IMPATIENT = Transfer(timeout=0.1, attempts=1, backoff=0.01)  # for what never comes
fork = multiprocessing.get_context("fork")


@pytest.fixture
def server() -> Iterator[ShardServer]:
    with ShardServer() as server:
        server.files = {f"{n}.tar": bytes([n]) * 10_000 for n in range(9)}
        yield server


def anything(path: Path) -> None:
    pass


def read(cache: Cache, url: str, hold: float = 0) -> bytes:
    with cache.opened(url, look_up(url, HASTY), anything) as descriptor:
        time.sleep(hold)
        return os.pread(descriptor, 1 << 20, 0)


def held(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in folder.glob("*-*"))


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.01)


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().folder == tmp_path / "clip-train" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "clip-train" / "shards"


def test_many_processes_fetch_once(server: ShardServer, tmp_path: Path) -> None:
    cache, barrier = Cache(tmp_path, max_bytes=50_000, transfer=HASTY), fork.Barrier(6)

    def work() -> None:
        barrier.wait()
        for number in range(3):
            assert read(cache, server.url(f"{number}.tar")) == server.files[f"{number}.tar"]

    processes = [fork.Process(target=work) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert sorted(path for path, wanted, _ in server.requests if not wanted) == ["0.tar", "1.tar", "2.tar"]
    assert held(tmp_path) == ["0.tar", "1.tar", "2.tar"]


def test_what_was_read_longest_ago_goes(server: ShardServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=35_000, transfer=HASTY)
    (tmp_path / "mine.tar").write_bytes(bytes(100_000))  # nothing of the cache's: it neither counts nor goes
    for number in range(3):
        read(cache, server.url(f"{number}.tar"))
    for path in tmp_path.glob("*-*.tar"):  # as if long ago, 0 longest
        os.utime(path, (0, 1000 + int(path.stem[-1])))
    read(cache, server.url("0.tar"))
    read(cache, server.url("3.tar"))
    assert held(tmp_path) == ["0.tar", "2.tar", "3.tar"]
    read(cache, server.url("4.tar"))
    assert held(tmp_path) == ["0.tar", "3.tar", "4.tar"]
    assert (tmp_path / "mine.tar").exists()


def test_what_is_in_use_stays(server: ShardServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=25_000, transfer=HASTY)
    url = server.url("0.tar")
    with cache.opened(url, look_up(url, HASTY), anything) as descriptor:
        for path in tmp_path.glob("*-0.tar"):
            os.utime(path, (0, 0))
        for number in range(1, 6):
            read(cache, server.url(f"{number}.tar"))
        assert held(tmp_path) == ["0.tar", "5.tar"]
        assert os.pread(descriptor, 1 << 20, 0) == server.files["0.tar"]
    read(cache, server.url("6.tar"))
    assert held(tmp_path) == ["5.tar", "6.tar"]


def test_room_is_waited_for(server: ShardServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=15_000, transfer=HASTY)
    reader = threading.Thread(target=read, args=(cache, server.url("0.tar"), 0.3))
    reader.start()
    until(lambda: held(tmp_path) == ["0.tar"])
    assert read(cache, server.url("1.tar")) == server.files["1.tar"]
    reader.join()
    assert held(tmp_path) == ["1.tar"]


def test_no_room(server: ShardServer, tmp_path: Path) -> None:
    cache, hurried = (Cache(tmp_path, max_bytes=15_000, transfer=transfer) for transfer in (HASTY, IMPATIENT))
    url = server.url("0.tar")
    with (
        cache.opened(url, look_up(url, HASTY), anything),
        pytest.raises(DataError, match=r"1\.tar.*is in use.*cache_gib"),
    ):
        read(hurried, server.url("1.tar"))
    server.files["big.tar"] = bytes(20_000)
    with pytest.raises(DataError, match=r"big\.tar.*20000 bytes.*more than the whole cache.*data\.cache_gib"):
        read(cache, server.url("big.tar"))
    assert held(tmp_path) == ["0.tar"]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_fetching_process_that_dies_or_stops(server: ShardServer, tmp_path: Path, stopped: bool) -> None:
    server.faults.append("stall:5000")
    patient = Cache(tmp_path, transfer=Transfer(timeout=60))
    process = fork.Process(target=read, args=(patient, server.url("0.tar")))
    process.start()
    until(lambda: any(path.read_bytes()[:1] == b"\0" for path in tmp_path.glob("*.part")) and len(server.requests) == 2)
    cache = Cache(tmp_path, transfer=HASTY)
    assert process.pid is not None
    if stopped:
        with pytest.raises(DataError, match=r"another process has been fetching it without progress.*fuser .*\.part"):
            read(Cache(tmp_path, transfer=IMPATIENT), server.url("0.tar"))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert held(tmp_path) == ["0.tar.part"]
    assert read(cache, server.url("0.tar")) == server.files["0.tar"]
    assert held(tmp_path) == ["0.tar"]


def test_what_a_dead_process_left_can_go(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / ("0" * 20 + "-x.tar.part")).write_bytes(bytes(20_000))
    read(Cache(tmp_path, max_bytes=25_000, transfer=HASTY), server.url("0.tar"))
    assert held(tmp_path) == ["0.tar"]


def test_a_lock_does_not_outlive_its_use_in_a_forked_process(server: ShardServer, tmp_path: Path) -> None:
    cache, url = Cache(tmp_path, max_bytes=15_000, transfer=HASTY), server.url("0.tar")
    with cache.opened(url, look_up(url, HASTY), anything):
        process = fork.Process(target=time.sleep, args=(60,))  # has the descriptor, and the lock that belongs to it
        process.start()
    read(cache, server.url("1.tar"))
    assert held(tmp_path) == ["1.tar"]
    process.kill()
    process.join()


def test_damage_in_the_cache_is_mended(server: ShardServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path, transfer=HASTY)
    read(cache, server.url("0.tar"))
    [path] = tmp_path.glob("*-0.tar")
    path.write_bytes(b"short")
    assert read(cache, server.url("0.tar")) == server.files["0.tar"]


def test_what_fails_the_check_is_not_kept(server: ShardServer, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise DataError("no")

    cache, url = Cache(tmp_path, transfer=HASTY), server.url("0.tar")
    with pytest.raises(DataError, match="no"), cache.opened(url, look_up(url, HASTY), refuse):
        pass
    assert held(tmp_path) == []
    found = look_up(url, HASTY)
    with pytest.raises(DataError, match="changed"), cache.opened(url, Found(9999, found.version), anything):
        pass
    assert held(tmp_path) == []


def test_another_version_is_another_shard(server: ShardServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path, transfer=HASTY)
    read(cache, server.url("0.tar"))
    server.files["0.tar"] = b"x" * 10_000
    assert read(cache, server.url("0.tar")) == b"x" * 10_000


def test_a_folder_that_cannot_be_used(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache cannot be used.*data\.cache_dir"):
        read(Cache(tmp_path / "file" / "cache", transfer=HASTY), server.url("0.tar"))


def test_a_full_disk_makes_room_first(server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, transfer=HASTY)
    for number in range(3):
        read(cache, server.url(f"{number}.tar"))
    write, room = os.pwrite, 1

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if len(list(tmp_path.glob("*-*.tar"))) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(cache_module.os, "pwrite", full)
    assert read(cache, server.url("3.tar")) == server.files["3.tar"]
    assert held(tmp_path) == ["2.tar", "3.tar"]
    room = -1
    with pytest.raises(DataError, match=r"is full, and nothing in it can go \(No space left.*data\.cache_dir"):
        read(cache, server.url("4.tar"))
    assert held(tmp_path) == []


def test_a_write_that_fails(server: ShardServer, tmp_path: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        cache = Cache(tmp_path, transfer=HASTY)
        with pytest.raises(DataError, match=r"cannot be used \(File too large\).*data\.cache_dir"):
            read(cache, server.url("0.tar"))

    process = fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert held(tmp_path) == []


def test_a_folder_that_may_only_be_read_serves(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, url = Cache(tmp_path, transfer=HASTY), server.url("0.tar")
    read(cache, url)
    [path] = tmp_path.glob("*-0.tar")
    os.utime(path, (0, 0))

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(cache_module.os, "utime", refuse)
    assert read(cache, url) == server.files["0.tar"]


def test_readers_share(server: ShardServer, tmp_path: Path) -> None:
    cache, url = Cache(tmp_path, transfer=HASTY), server.url("0.tar")
    found = look_up(url, HASTY)
    with cache.opened(url, found, anything) as one, cache.opened(url, found, anything) as other:
        assert os.path.sameopenfile(one, other)
        with pytest.raises(BlockingIOError):
            fcntl.flock(os.open(next(tmp_path.glob("*-0.tar")), os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
