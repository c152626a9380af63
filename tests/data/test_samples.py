from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import picture
from tars import write_tar

from clip_train.data.collections.shards import Shards
from clip_train.data.decode import decode
from clip_train.data.samples import read_samples
from clip_train.data.shards import index
from clip_train.data.transforms import Preprocess
from clip_train.errors import DataError

VIEW = Preprocess(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def indexes(tmp_path: Path) -> list:
    paths = []
    for shard, numbers in enumerate((range(5), range(5, 12))):
        members = []
        for n in numbers:
            members += [(f"{n:02}.png", picture(n)), (f"{n:02}.cls", str(n % 3).encode())]
            members += [(f"{n:02}.json", b'{"captions": ["one", "two %d"], "label": "fox"}' % n)]
        paths.append(write_tar(tmp_path / f"{shard}.tar", members))
    return [index(str(path)) for path in paths]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0)])
def test_every_sample_once_in_order(indexes: list, world: int, workers: int) -> None:
    seen: dict[int, tuple[str, object, object]] = {}
    for rank in range(world):
        reader = read_samples(
            Shards(indexes, image="png", label="cls", caption="json.captions"), VIEW, label=True, captions=True,
            batch_size=5, rank=rank, world=world, workers=workers,
        )  # fmt: skip
        numbers: list[int] = []
        for batch in reader:
            assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (3, 16, 16)
            for row, number in enumerate(batch.numbers.tolist()):
                seen[number] = (batch.keys[row], batch.labels[row], batch.captions[row])
                assert torch.equal(batch.images[row], VIEW.pixels(decode(picture(number))))
            numbers += batch.numbers.tolist()
        assert numbers == list(range(rank, 12, world))
    assert seen == {n: (f"{n:02}", n % 3, ["one", f"two {n}"]) for n in range(12)}


def test_columns_not_asked_for_are_not_read(indexes: list) -> None:
    (batch,) = read_samples(Shards(indexes[:1], image="png", label="json.label"), VIEW, label=True)
    assert batch.captions == [] and batch.labels == ["fox"] * 5
    with pytest.raises(DataError, match="`label = 'txt'`"):
        read_samples(Shards(indexes, image="png", label="txt"), VIEW, label=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_not_skipped(tmp_path: Path, workers: int) -> None:
    members = [("1.png", picture(1)), ("1.cls", b"1"), ("2.png", picture(2)[:300]), ("2.cls", b"1")]
    indexes = [index(str(write_tar(tmp_path / "x.tar", members)))]
    with pytest.raises(DataError, match=r"x\.tar: sample '2' cannot be evaluated"):
        list(read_samples(Shards(indexes, image="png", label="cls"), VIEW, label=True, workers=workers))
