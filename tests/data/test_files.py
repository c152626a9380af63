"""What happens to a run whose shards are changed under its hands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tars import write_tar

from clip_train.data.files import ShardFiles
from clip_train.data.index_files import ShardIndex
from clip_train.data.shards import index
from clip_train.errors import DataError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "x.tar", [(f"{n}.txt", b"%02d" % n * 1000) for n in range(20)])


def read(files: ShardFiles, one: ShardIndex, sample: int = 7) -> bytes:
    place = one.member(sample, "txt")
    assert place is not None
    return files.read(one, *place)


def other(path: Path, first: str = "a") -> Path:
    """Another shard of the same size."""
    return write_tar(path, [(f"{first}{n % 10}.txt", b"%02d" % n * 1000) for n in range(10)]
                     + [(f"b{n}.txt", b"%02d" % n * 1000) for n in range(10)])  # fmt: skip


@pytest.mark.parametrize("opened", [False, True], ids=["not yet open", "open"])
def test_deleted(shard: Path, opened: bool) -> None:
    files, one = ShardFiles(), index(str(shard))
    if opened:
        read(files, one)
    shard.unlink()
    if opened:  # the bytes are there as long as somebody has them open
        assert read(files, one) == b"07" * 1000
    else:
        with pytest.raises(DataError, match=r"x\.tar: cannot be read any more \(No such file.*Put it back and resume"):
            read(files, one)


def test_replaced_by_another_of_the_same_size(shard: Path, tmp_path: Path) -> None:
    one, new = index(str(shard)), other(tmp_path / "new.tar")
    assert new.stat().st_size == one.size
    files = ShardFiles()
    assert read(files, one) == b"07" * 1000
    new.rename(shard)
    assert read(files, one) == b"07" * 1000  # the old one, still open
    with pytest.raises(DataError, match=r"x\.tar: does not hold what its index lists.*put the old one back"):
        read(ShardFiles(), one)


def test_written_over_in_place(shard: Path, tmp_path: Path) -> None:
    files, one = ShardFiles(), index(str(shard))
    read(files, one)
    shutil.copyfile(other(tmp_path / "new.tar"), shard)
    for _ in range(2):
        with pytest.raises(DataError, match=r"x\.tar: does not hold what its index lists"):
            read(files, one)


def test_cut_short_in_place(shard: Path) -> None:
    files, one = ShardFiles(), index(str(shard))
    read(files, one)
    os.truncate(shard, 5000)
    with pytest.raises(DataError, match=r"x\.tar: changed after it was indexed"):
        read(files, one)


def test_the_same_put_back_or_touched_is_the_same(shard: Path, tmp_path: Path) -> None:
    files, one = ShardFiles(), index(str(shard))
    read(files, one)
    os.utime(shard, (1, 1))
    assert read(files, one) == b"07" * 1000
    shutil.copyfile(shard, tmp_path / "copy.tar")
    shard.unlink()
    (tmp_path / "copy.tar").rename(shard)
    assert read(ShardFiles(), one) == b"07" * 1000


def test_looking_again_is_done_once(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, one, calls = ShardFiles(), index(str(shard)), list[Path]()
    monkeypatch.setattr("clip_train.data.files.verify", lambda index, path: calls.append(path))
    os.utime(shard, (1, 1))
    for sample in range(5):
        read(files, one, sample)
    assert len(calls) == 1
