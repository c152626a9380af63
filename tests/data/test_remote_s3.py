"""An S3-compatible server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from tars import BytesTokenizer, write_tar

from clip_train.data import remote_fsspec
from clip_train.data.cache import Cache
from clip_train.data.files import ShardFiles
from clip_train.data.index_files import write_index
from clip_train.data.loader import Loader
from clip_train.data.remote import Transfer
from clip_train.data.shards import index, resolve
from clip_train.data.stream import Stream, open_source
from clip_train.data.transforms import Augment
from clip_train.errors import DataError

pytest.importorskip("s3fs")
boto3: Any = pytest.importorskip("boto3")
server: Any = pytest.importorskip("moto.server")
HASTY = Transfer(timeout=20, attempts=2, backoff=0.01)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer(port=0)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    found = boto3.resource("s3").Bucket("shards")
    found.create()
    found.objects.all().delete()
    return found


def put(bucket: Any, *paths: Path) -> None:
    for path in paths:
        bucket.put_object(Key=f"set/{path.name}", Body=path.read_bytes())


def pairs(path: Path, number: int) -> Path:
    members = [(f"{number}{i}.png", picture(8 * number + i)) for i in range(8)]
    return write_tar(path, members + [(f"{number}{i}.txt", b"text") for i in range(8)])


def test_the_stream_from_s3(bucket: Any, tmp_path: Path) -> None:
    for number in range(3):
        path = pairs(tmp_path / f"{number}.tar", number)
        put(bucket, path)
        if number < 2:  # one has to be fetched to know what it holds
            put(bucket, write_index(index(str(path))))
    assert resolve("s3://shards/set/[01].tar") == ["s3://shards/set/0.tar", "s3://shards/set/1.tar"]
    cache = Cache(tmp_path / "cache", transfer=HASTY)
    found = []
    for pattern, workers in ((f"{tmp_path}/*.tar", 0), ("s3://shards/set/*.tar", 1)):  # a forked worker asks anew
        source = open_source("s", pattern, "png", "txt", cache=cache)
        stream = Stream([source], BytesTokenizer(), Augment(16), seed=1, batch_size=4)
        found.append(
            (
                [one.at_hand() for one in source.indexes],
                stream.fingerprint,
                list(Loader(stream, range(8), workers=workers)),
            )
        )
    (_, fingerprint, local), (at_hand, other, remote) = found
    assert at_hand == [True, False, True]
    assert fingerprint == other
    assert [batch.keys for batch in local] == [batch.keys for batch in remote]
    assert all(torch.equal(a.images, b.images) for a, b in zip(local, remote, strict=True))


def test_long_shards_come_in_ranges(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_fsspec, "_BLOCK", 1000)
    path = write_tar(tmp_path / "x.tar", [("1.txt", bytes(range(256)) * 30)])
    put(bucket, path)
    one = index("s3://shards/set/x.tar", Cache(tmp_path / "cache", transfer=HASTY))
    assert ShardFiles().read(one, 0, one.size) == path.read_bytes()


def test_what_is_wrong_in_a_bucket(bucket: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", transfer=HASTY)
    with pytest.raises(DataError, match=r"s3://shards/set/none\.tar: does not exist"):
        index("s3://shards/set/none.tar", cache)
    with pytest.raises(DataError, match=r"set/\*\.tar' names no file"):
        resolve("s3://shards/set/*.tar")
    path = pairs(tmp_path / "x.tar", 0)
    put(bucket, path, write_index(index(str(path))))
    one = index("s3://shards/set/x.tar", cache)
    put(bucket, pairs(tmp_path / "x.tar", 1))  # as large, but another one
    with pytest.raises(DataError, match=r"set/x\.tar: changed on the server"):
        ShardFiles().read(one, 0, 9)


def test_a_store_that_nobody_answers_for(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    remote_fsspec.fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(DataError, match=r"x\.tar: could not be fetched, 2 attempts failed"):
        index("s3://shards/set/x.tar", Cache(tmp_path, transfer=HASTY))
    remote_fsspec.fsspec.filesystem("s3").clear_instance_cache()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(remote_fsspec.fsspec.core, "url_to_fs", refuse)
    with pytest.raises(DataError, match=r"reads gs:// \(Install gcsfs.*clip-train\[remote\]"):
        index("gs://b/x.tar", Cache(tmp_path))
