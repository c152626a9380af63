# pyright: reportPrivateUsage=false
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import ShardServer
from tars import write_tar

from clip_train.data import shards
from clip_train.data.cache import Cache
from clip_train.data.files import ShardFiles
from clip_train.data.index_files import ShardIndex, parse_index, write_index
from clip_train.data.prefetch import check_room
from clip_train.data.remote import Transfer
from clip_train.data.shards import data_fingerprint, index, index_all
from clip_train.errors import DataError

HASTY = Transfer(timeout=20, attempts=2, backoff=0.01)


@pytest.fixture
def server() -> Iterator[ShardServer]:
    with ShardServer() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", transfer=HASTY)


def shard(path: Path, samples: int = 3, text: bytes = b"text") -> Path:
    return write_tar(path, [(f"{n:03}.txt", text) for n in range(samples)])


def put(server: ShardServer, *paths: Path) -> None:
    server.files |= {path.name: path.read_bytes() for path in paths}


def texts(one: ShardIndex) -> list[bytes]:
    return [ShardFiles().read(one, *place) for n in range(len(one)) if (place := one.member(n, "txt"))]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a\udcff.jpg", b"1"), ("a\udcff.seg.png", b""), ("ключ.txt", b"333")])
    one = index(str(path))
    written = write_index(one)
    assert written == tmp_path / "x.tar.index.json"
    tree = json.loads(written.read_text())
    assert tree["size"] == path.stat().st_size
    assert tree["keys"] == ["a\udcff", "ключ"]
    raw = path.read_bytes()
    assert raw[tree["offsets"][1][2] :][: tree["sizes"][1][2]] == b"333"
    again = parse_index(written.read_bytes(), str(path))
    assert again.same_listing(one)
    assert data_fingerprint([again]) == data_fingerprint([one])
    assert list(tmp_path.iterdir()) == [path, written] or list(tmp_path.iterdir()) == [written, path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree: tree["sizes"][0].__setitem__(0, 5),
        lambda tree: tree["offsets"][1].__setitem__(0, 10**9),
        lambda tree: tree["keys"].__setitem__(0, "other"),
        lambda tree: tree["keys"].pop(),
        lambda tree: tree.pop("checksum"),
        lambda tree: tree.update(size=1),
        lambda tree: tree.update(format="clip-train shard index 9"),
        lambda tree: tree.update(keys=None),
    ],
)
def test_damaged_index_files_are_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    written = write_index(index(str(shard(tmp_path / "x.tar"))))
    tree = json.loads(written.read_text())
    damage(tree)
    with pytest.raises(DataError, match=r"x\.tar\.index\.json"):
        parse_index(json.dumps(tree).encode(), "x.tar")
    with pytest.raises(DataError, match="damaged"):
        parse_index(written.read_bytes()[:50], "x.tar")


def test_index_files_spare_the_transfer(server: ShardServer, cache: Cache, tmp_path: Path) -> None:
    for n in range(20):
        path = shard(tmp_path / f"{n}.tar", n + 1, str(n).encode())
        put(server, path, write_index(index(str(path))))
    names = [server.url(f"{n}.tar?signature={n}") for n in range(20)]
    indexes = index_all(names, cache)
    assert [len(one) for one in indexes] == list(range(1, 21))
    assert server.bodies() == []
    assert texts(indexes[7]) == [b"7"] * 8
    assert len(server.bodies()) == 1
    asked = len(server.requests)
    again = index_all(names, cache)  # kept in the cache: one look-up each, to see that nothing changed
    assert data_fingerprint(again) == data_fingerprint(indexes)
    assert len(server.requests) == asked + 20


def test_without_an_index_file_the_shard_is_fetched_once(server: ShardServer, cache: Cache, tmp_path: Path) -> None:
    put(server, shard(tmp_path / "x.tar"))
    for _ in range(2):
        assert texts(index(server.url("x.tar"), cache)) == [b"text"] * 3
    assert len(server.bodies()) == 1
    put(server, shard(tmp_path / "x.tar", text=b"news"))  # of the same size
    assert texts(index(server.url("x.tar"), cache)) == [b"news"] * 3


def test_a_shard_that_changes_after_it_was_indexed(server: ShardServer, cache: Cache, tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar")
    put(server, path, write_index(index(str(path))))
    one = index(server.url("x.tar"), cache)
    put(server, shard(tmp_path / "x.tar", text=b"news"))
    with pytest.raises(DataError, match=r"x\.tar: changed on the server"):
        texts(one)


@pytest.mark.parametrize("other", ["size", "damage"])
def test_a_stale_index_file_is_not_used(server: ShardServer, cache: Cache, tmp_path: Path, other: str) -> None:
    path = shard(tmp_path / "x.tar", 30)
    beside = write_index(index(str(path)))
    put(server, beside, shard(path, 3))
    if other == "damage":
        server.files[beside.name] = server.files[beside.name][:-9]
    with pytest.warns(UserWarning, match=r"x\.tar\.index\.json: .*Write it again|or write it again"):
        one = index(server.url("x.tar"), cache)
    assert texts(one) == [b"text"] * 3


def test_an_index_file_of_another_shard_of_the_same_size(server: ShardServer, cache: Cache, tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", 3)
    beside = write_index(index(str(path)))
    put(server, beside, write_tar(path, [(f"{n}-other.txt", b"text") for n in range(3)]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"does not hold what its index lists.*x\.tar\.index\.json"):
            texts(index(server.url("x.tar"), cache))
    put(server, write_index(index(str(path))))  # as the message says
    assert index(server.url("x.tar"), cache).key(0) == "0-other"


def test_listings_of_local_shards_are_kept(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, listed = shard(tmp_path / "x.tar", 300), list[str]()
    listing = shards._list
    monkeypatch.setattr(shards, "_list", lambda name, file: listed.append(name) or listing(name, file))
    first = index(str(path), cache)
    shards._index_local.cache_clear()  # as a new process
    again = index(str(path), cache)
    assert listed == [str(path)]
    assert again.same_listing(first)
    assert (again.version, again.cache) == (str(path.stat().st_mtime_ns), None)
    shard(path, 301)
    assert len(index(str(path), cache)) == 301
    os.utime(path, ns=(0, 12345))
    assert len(index(str(path), cache)) == 301
    assert len(listed) == 3


def test_local_index_files(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "x.tar")
    first, listed = index(str(path)), list[str]()
    beside = write_index(first)
    listing = shards._list
    monkeypatch.setattr(shards, "_list", lambda name, file: listed.append(name) or listing(name, file))
    shards._index_local.cache_clear()
    assert index(str(path), cache).same_listing(first)
    assert listed == []
    stat = beside.stat()
    os.utime(path, ns=(stat.st_mtime_ns + 1, stat.st_mtime_ns + 1))  # written anew since: its index file is no proof
    assert index(str(path), cache).same_listing(first)
    assert listed == [str(path)]
    shard(path, 30)
    os.utime(path, ns=(0, 0))
    with pytest.warns(UserWarning, match=r"was written for \d+ bytes"):
        assert len(index(str(path), cache)) == 30


def test_a_cache_that_cannot_hold_what_is_read_together(server: ShardServer, tmp_path: Path) -> None:
    put(server, *(shard(tmp_path / f"{n}.tar", 5) for n in range(6)))
    size = (tmp_path / "0.tar").stat().st_size
    names = [server.url(f"{n}.tar") for n in range(6)]
    for room, lanes, window, fits in [(4, 2, 5, True), (3, 2, 5, False), (6, 6, 100, True), (5, 6, 100, False)]:
        indexes = index_all(names, Cache(tmp_path / "cache", max_bytes=room * size, transfer=HASTY))
        if fits:
            check_room(indexes, lanes, window)
        else:
            with pytest.raises(DataError, match=r"data\.cache_gib.*data\.lanes"):
                check_room(indexes, lanes, window)
