"""Threads in a loader process change nothing but the time."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import caption, picture
from tars import BytesTokenizer, write_tar

from clip_train.data.batch import Batch
from clip_train.data.files import ShardFiles
from clip_train.data.loader import Loader
from clip_train.data.stream import Stream, open_source
from clip_train.data.threads import Threads
from clip_train.data.transforms import Augment

VIEW = Augment(16, crop_scale=(0.5, 1.0), flip=0.5, rotate=10, zoom_out=1.2, brightness=0.2)


def same(one: Batch, other: Batch) -> bool:
    return (
        one.keys == other.keys
        and one.skipped == other.skipped
        and torch.equal(one.images, other.images)
        and torch.equal(one.ids, other.ids)
    )


@pytest.mark.parametrize("threads", [2, 5])
def test_batches_do_not_depend_on_threads(tmp_path: Path, threads: int) -> None:
    """Nor do the substitutes of bad samples and their list."""
    bad = (3, 4, 11)
    write_tar(
        tmp_path / "0.tar",
        [
            (f"{n:02}.{kind}", (b"broken" if n in bad else picture(n, 20)) if kind == "png" else caption(n).encode())
            for n in range(24)
            for kind in ("png", "txt")
        ],
    )

    def stream(count: int) -> Stream:
        source = open_source("s", f"{tmp_path}/0.tar", "png", "txt")
        return Stream([source], BytesTokenizer(), VIEW, seed=1, batch_size=12, threads=count)

    expected = list(Loader(stream(1), range(5)))
    assert {one.key for batch in expected for one in batch.skipped} == {f"{n:02}" for n in bad}
    one = stream(threads)
    assert same(one[0], expected[0])
    forked = Loader(one, range(5), workers=2)  # this process's threads do not come along
    assert all(same(a, b) for a, b in zip(forked, expected, strict=True))


def test_errors_arrive_and_order_stays() -> None:
    pool = Threads(3)
    assert pool.map(lambda n: n * n, range(100)) == [n * n for n in range(100)]
    assert pool.map(lambda n: n, range(0)) == []
    with pytest.raises(ZeroDivisionError):
        pool.map(lambda n: 1 // (n - 50), range(100))


def test_a_shard_that_another_thread_reads_is_not_closed_under_it(tmp_path: Path) -> None:
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", [(f"{n}.txt", f"{shard} {n}".encode()) for n in range(50)])
    indexes = open_source("s", f"{tmp_path}/*.tar", "txt", "txt").indexes
    files = ShardFiles(most_open=1)  # every other read closes a shard

    def read(number: int) -> bytes:
        shard, sample = number % 4, number % 50
        place = indexes[shard].member(sample, "txt")
        assert place is not None
        return files.read(indexes[shard], *place)

    expected = [f"{n % 4} {indexes[n % 4].key(n % 50)}".encode() for n in range(2000)]
    assert Threads(8).map(read, range(2000)) == expected


def test_the_threads_of_tensor_operations_stay_as_many() -> None:
    """Setting them in one thread would set them for all that start later, autograd's among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Threads(2).map(lambda n: torch.ones(n).sum(), range(10))
        counts: list[int] = []
        later = Thread(target=lambda: counts.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert counts == [2]
