from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from servers import ShardServer
from tars import BytesTokenizer, write_tar

from clip_train.data.cache import Cache
from clip_train.data.index_files import write_index
from clip_train.data.loader import Loader
from clip_train.data.prefetch import Prefetcher
from clip_train.data.remote import Found, Transfer, base_name, fetch, look_up
from clip_train.data.shards import index, resolve
from clip_train.data.stream import Stream, open_source
from clip_train.data.transforms import Augment
from clip_train.errors import DataError

HASTY = Transfer(timeout=20, attempts=3, backoff=0.01)
IMPATIENT = Transfer(timeout=0.3, attempts=3, backoff=0.01)  # for what never comes
DATA = np.random.default_rng(0).bytes(200_000)


class Memory:
    def __init__(self) -> None:
        self.data, self.restarts = bytearray(), 0

    @property
    def done(self) -> int:
        return len(self.data)

    def write(self, data: bytes) -> None:
        self.data += data

    def restart(self) -> None:
        self.restarts += bool(self.data)
        self.data.clear()


@pytest.fixture
def server() -> Iterator[ShardServer]:
    with ShardServer() as server:
        server.files["a.tar"] = DATA
        yield server


def fetched(server: ShardServer, transfer: Transfer = HASTY) -> Memory:
    url, sink = server.url("a.tar"), Memory()
    fetch(url, sink, look_up(url, HASTY), transfer)
    return sink


def test_look_up(server: ShardServer) -> None:
    found = look_up(server.url("a.tar"), HASTY)
    assert found.size == len(DATA)
    assert found.version.startswith('"')
    server.ranges = server.versions = False
    assert look_up(server.url("a.tar"), HASTY) == Found(len(DATA), "")


def test_a_broken_transfer_goes_on_where_it_broke(server: ShardServer) -> None:
    server.faults.extend(["drop:70000", "503", "stall:50000"])
    patient = Transfer(timeout=5, attempts=4, backoff=0.01)
    sink = fetched(server, patient)
    assert bytes(sink.data) == DATA
    assert sink.restarts == 0
    tag = look_up(server.url("a.tar"), HASTY).version
    assert server.bodies() == [
        ("", ""),
        ("bytes=70000-", tag),
        ("bytes=70000-", tag),
        ("bytes=120000-", tag),
    ]


@pytest.mark.parametrize("lack", ["ranges", "versions", "strong versions"])
def test_without_ranges_or_proof_it_starts_again(server: ShardServer, lack: str) -> None:
    server.ranges, server.versions, server.weak = lack != "ranges", lack != "versions", lack == "strong versions"
    server.faults.extend(["drop:70000"])
    sink = fetched(server)
    assert bytes(sink.data) == DATA
    assert sink.restarts == 1
    if lack != "ranges":
        assert server.bodies() == [("", "")] * 2


def test_a_file_that_changes_is_not_stitched_together(server: ShardServer) -> None:
    server.faults.extend(["change:70000"])
    with pytest.raises(DataError, match=r"a\.tar: changed on the server.*200000 bytes of version"):
        fetched(server)


def test_failures_are_counted_anew_after_progress(server: ShardServer) -> None:
    server.files["a.tar"] = DATA * 40
    server.faults.extend(["drop:2000000"] * 3 + ["503"] * 1)
    assert bytes(fetched(server).data) == DATA * 40


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "3 attempts failed.*503 Service Unavailable"),
        ("stall:1000", r"3 attempts failed.*(only \d+ bytes came in|no answer for) 0\.3 s"),
        ("drip", r"3 attempts failed.*(only \d+ bytes came in|no answer for) 0\.3 s"),
        ("drop:1000", r"3 attempts failed.*ended after \d+ of 200000 bytes"),
    ],
)
def test_lasting_trouble_stops(server: ShardServer, fault: str, message: str) -> None:
    server.faults.extend([fault] * 9)
    url = server.url("a.tar")
    found = look_up(url, HASTY)
    with pytest.raises(DataError, match=message):
        fetch(url, Memory(), found, IMPATIENT if fault in ("stall:1000", "drip") else HASTY)
    # Of hurried requests the server had the time to note perhaps not every one.
    assert len(server.bodies()) <= 3 if fault in ("stall:1000", "drip") else len(server.bodies()) == 3


def test_a_server_that_never_answers(server: ShardServer) -> None:
    server.always = "hang"
    with pytest.raises(DataError, match=r"a\.tar: could not be fetched, 3 attempts.*no answer for 0\.3 s"):
        look_up(server.url("a.tar"), IMPATIENT)
    assert len(server.requests) <= 3  # of those that it had the time to note
    server.server_close()
    with pytest.raises(DataError, match=r"could not be fetched.*refused"):
        look_up("http://127.0.0.1:9/a.tar", HASTY)


@pytest.mark.parametrize(("status", "message"), [("404", "does not exist"), ("403", "may not be read"), ("400", "400")])
def test_final_answers_stop_at_once(server: ShardServer, status: str, message: str) -> None:
    server.always = status
    with pytest.raises(DataError, match=rf"a\.tar: .*{message}"):
        look_up(server.url("a.tar"), HASTY)
    assert len(server.requests) == 1


def test_compressed_on_the_way_is_refused(server: ShardServer) -> None:
    server.always = "gzip"
    with pytest.raises(DataError, match="compresses"):
        look_up(server.url("a.tar"), HASTY)


def test_a_page_instead_of_a_shard_is_not_kept(server: ShardServer, tmp_path: Path) -> None:
    server.always = "page"
    cache = Cache(tmp_path, transfer=HASTY)
    with (
        pytest.warns(UserWarning, match=r"index\.json: is damaged"),
        pytest.raises(DataError, match=r"a\.tar: is not a tar file .*<html>log in") as caught,
    ):
        index(server.url("a.tar"), cache)
    assert str(tmp_path) not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_names_and_patterns(tmp_path: Path) -> None:
    assert resolve("http://h/{0..1}.tar?t=[x]?*") == ["http://h/0.tar?t=[x]?*", "http://h/1.tar?t=[x]?*"]
    assert resolve("pipe:cat x\\ y-{0..1}.tar | awk {p}") == [f"pipe:cat x\\ y-{n}.tar | awk {{p}}" for n in (0, 1)]
    with pytest.raises(DataError, match="web server cannot be searched"):
        resolve("https://h/*.tar")
    with pytest.raises(DataError, match="nosuch"):
        resolve("nosuch://h/*.tar")
    path = write_tar(tmp_path / "l.tar", [("k.txt", b"x")])
    assert resolve(f"file://{path}") == [str(path)]
    assert base_name("s3://b/d/x%20y.tar") == "x y.tar"
    assert base_name("https://h/d/x.tar?signature=a/b.tar") == "x.tar"
    assert base_name("pipe:aws s3 cp 's3://b/x-{000}.tar' - | cat") == "x-{000}.tar"


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def commands(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", transfer=HASTY, commands=True)


def test_a_command(tmp_path: Path, commands: Cache) -> None:
    path = write_tar(tmp_path / "x y.tar", [("1.txt", b"one"), ("2.txt", b"two")])
    [shard] = resolve(f"pipe:cat {tmp_path}/x\\ y.tar | cat")
    one = index(shard, commands)
    assert one.same_listing(index(str(path)))
    assert len(list(commands.folder.glob("*.tar"))) == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {path}; echo no such bucket >&2; exit 3", "3 attempts failed.*status 3: no such bucket"),
        ("cat {path}; kill -PIPE $$", "status -13"),
        ("cat {path}; exit 141", "status 141"),
        ("no-such-program {path}", r"cannot be run \(status 127\).*not found"),
        ("head -c 600 {path}", r"pipe:head .*cut short"),
        ("true", "is empty"),
        ("cat {path}; sleep 100", r"silent for 1\.2 s"),
        ("sleep 100 & cat {path}", r"silent for 1\.2 s"),
    ],
)
def test_commands_that_fail(tmp_path: Path, command: str, message: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("1.txt", b"one")])
    transfer = Transfer(0.3, 1) if "sleep" in command else HASTY
    cache = Cache(tmp_path / "cache", transfer=transfer, commands=True)
    with pytest.raises(DataError, match=message):
        index("pipe:" + command.format(path=path), cache)
    assert not list(cache.folder.glob("*-*"))


def test_commands_are_not_run_for_others(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="commands are run for the training data of a recipe only"):
        index(f"pipe:touch {tmp_path}/ran", Cache(tmp_path))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------- the whole stream


def local_shards(folder: Path) -> str:
    for shard in range(4):
        members = [
            (f"{shard}{i}.{e}", picture(8 * shard + i) if e == "png" else b"text")
            for i in range(8)
            for e in ("png", "txt")
        ]
        write_index(index(str(write_tar(folder / f"{shard}.tar", members))))
    return f"{folder}/{{0..3}}.tar"


def batches(pattern: str, cache: Cache, workers: int, first: int = 0) -> list[tuple[list[str], torch.Tensor]]:
    source = open_source("s", pattern, "png", "txt", cache=cache)
    stream = Stream([source], BytesTokenizer(), Augment(16, flip=0.5), seed=1, batch_size=4, lanes=2, window=8)
    return [(batch.keys, batch.images) for batch in Loader(stream, range(first, 12), workers=workers)]


def same(one: list[tuple[list[str], torch.Tensor]], other: list[tuple[list[str], torch.Tensor]]) -> bool:
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_from_a_server(tmp_path: Path, workers: int) -> None:
    with ShardServer() as server:
        expected = batches(local_shards(tmp_path), Cache(tmp_path / "none"), 0)
        server.files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        cache = Cache(tmp_path / "cache", transfer=HASTY)
        pattern = server.url("{0..3}.tar")
        server.faults.extend(["503", "drop:3000"])
        assert same(expected, batches(pattern, cache, workers))
        assert {path for path, _, _ in server.requests if path.endswith(".tar")} == {f"{n}.tar" for n in range(4)}
        assert len(server.bodies()) == 4 + 2  # once each, whatever the number of workers, and the two that failed
        assert same(expected[5:], batches(pattern, cache, workers, first=5))
        assert len(server.bodies()) == 4 + 2


def test_a_shard_that_vanishes_from_the_server(tmp_path: Path) -> None:
    with ShardServer() as server:
        local_shards(tmp_path)
        server.files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        source = open_source(
            "s", server.url("{0..3}.tar"), "png", "txt", cache=Cache(tmp_path / "cache", transfer=HASTY)
        )
        stream = Stream([source], BytesTokenizer(), Augment(16), seed=1, batch_size=4)
        del server.files["2.tar"]
        with pytest.raises(DataError, match=r"2\.tar: does not exist .*404.*Put it back and resume"):
            list(Loader(stream, range(8), workers=1))


def test_prefetching(tmp_path: Path) -> None:
    with ShardServer() as server:
        local_shards(tmp_path)
        server.files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        cache = Cache(tmp_path / "cache", transfer=HASTY)
        indexes = open_source("s", server.url("{0..3}.tar"), "png", "txt", cache=cache).indexes
        assert [one.at_hand() for one in indexes] == [True, False, False, False]  # the first one's captions were read
        server.faults.append("404")  # not the prefetcher's business: it tries when it is asked again
        prefetcher, pause = Prefetcher(), threading.Event()
        while not all(one.at_hand() for one in indexes):
            prefetcher.want(indexes)
            pause.wait(0.01)
        assert len(server.bodies()) == 5
