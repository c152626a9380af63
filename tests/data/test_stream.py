from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import caption, picture
from tars import BytesTokenizer, write_tar

import clip_train.data.stream
from clip_train.data.batch import Batch
from clip_train.data.decode import Pixels, decode
from clip_train.data.loader import Loader
from clip_train.data.stream import CaptionChoice, Stream, groups, open_source
from clip_train.data.transforms import Augment
from clip_train.errors import DataError

FULL = Augment(16, crop_scale=(0.5, 1.0), flip=0.5, rotate=10, zoom_out=1.2, brightness=0.2, contrast=0.2, hue=0.05)


def samples(numbers: range) -> list[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    for n in numbers:
        texts = {"captions": [caption(n), f"picture {n}", "a picture"]}
        members += [(f"s{n:03}.png", picture(n, 20)), (f"s{n:03}.json", json.dumps(texts).encode())]
    return members


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of uneven sizes: 7, 20, 13 and 3 samples."""
    path = tmp_path_factory.mktemp("shards")
    first = 0
    for shard, count in enumerate((7, 20, 13, 3)):
        write_tar(path / f"{shard}.tar", samples(range(first, first + count)))
        first += count
    return path


def stream(folder: Path, **changes: object) -> Stream:
    arguments: dict[str, object] = {"seed": 1, "batch_size": 8, "lanes": 3, "window": 8}
    source = open_source("s", f"{folder}/*.tar", "png", "json.captions", "random")
    return Stream([source], BytesTokenizer(), FULL, **{**arguments, **changes})  # type: ignore[arg-type]


def joined(parts: list[Batch]) -> dict[str, object]:
    """What a global batch is, whoever computed it."""
    return {
        "keys": [key for part in parts for key in part.keys],
        "rows": torch.cat([part.rows for part in parts]).tolist(),
        "images": torch.cat([part.images for part in parts]),
        "ids": torch.cat([part.ids for part in parts]).tolist(),
        "digest": sum(part.digest_part() for part in parts) % 2**63,
    }


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[dict[str, object]]:
    """12 steps (two epochs and a bit) by one process without workers."""
    return [joined([batch]) for batch in Loader(stream(folder), range(12))]


def same(found: dict[str, object], wanted: dict[str, object]) -> None:
    assert torch.equal(found.pop("images"), wanted["images"])  # type: ignore[arg-type]
    assert found == {name: value for name, value in wanted.items() if name != "images"}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 2), (4, 1)])
def test_global_batches_do_not_depend_on_ranks_and_workers(
    folder: Path, expected: list[dict[str, object]], ranks: int, workers: int
) -> None:
    """Keys, rows, ids, digests, and every pixel."""
    loaders = [Loader(stream(folder, rank=r, world=ranks), range(12), workers=workers) for r in range(ranks)]
    steps = list(zip(*loaders, strict=True))
    assert len(steps) == 12
    for step, parts in enumerate(steps):
        same(joined(list(parts)), expected[step])


@pytest.mark.parametrize("pictures", [0, 9, 43])
def test_decoded_pictures_are_kept_up_to_a_bound(folder: Path, monkeypatch: pytest.MonkeyPatch, pictures: int) -> None:
    """What there is room for is decoded once, the rest once an epoch; the pixels are the same."""
    decoded: list[int] = []

    def counting(data: bytes) -> Pixels:
        decoded.append(len(data))
        return decode(data)

    monkeypatch.setattr(clip_train.data.stream, "decode", counting)
    room = pictures * 20 * 20 * 3 + 1
    one, plain = (stream(folder, batch_size=43, cache_decoded=size) for size in (room, 0))
    for step in range(3):
        assert torch.equal(one[step].images, plain[step].images)
    assert len(decoded) == pictures + 3 * (43 - pictures)


def test_resuming_elsewhere_gives_the_tail(folder: Path, expected: list[dict[str, object]]) -> None:
    loaders = [Loader(stream(folder, rank=r, world=2, cache_decoded=20_000), range(7, 12), workers=1) for r in (0, 1)]
    for step, parts in enumerate(zip(*loaders, strict=True), start=7):
        same(joined(list(parts)), expected[step])


def test_epochs_cover_the_shards(folder: Path, expected: list[dict[str, object]]) -> None:
    keys = [key for batch in expected for key in batch["keys"]]  # type: ignore[attr-defined]
    assert sorted(keys[:43]) == sorted(keys[43:86]) == [f"s{n:03}" for n in range(43)]
    assert keys[:43] != keys[43:86]
    assert stream(folder).keys(3) == keys[24:32]


def test_digest_tells_order_and_rows_apart(expected: list[dict[str, object]]) -> None:
    assert len({batch["digest"] for batch in expected}) == len(expected)
    empty = torch.zeros(0)

    def digest(*keys: str) -> int:
        return Batch(empty, empty, empty, empty, torch.arange(len(keys)), list(keys), [], []).digest_part()

    assert digest("a", "b") != digest("b", "a")


def test_captions_and_ids(folder: Path) -> None:
    batch = stream(folder)[0]
    texts = {k: [caption(int(k[1:])), f"picture {int(k[1:])}", "a picture"] for k in batch.keys}
    padded = batch.padded_ids(pad=9)
    chosen: list[str] = []
    for row, (key, length) in enumerate(zip(batch.keys, batch.lengths.tolist(), strict=True)):
        assert padded[row, 0] == 1 and padded[row, length - 1] == 2
        assert (padded[row, length:] == 9).all()
        chosen.append(bytes(padded[row, 1 : length - 1].tolist()).decode())
        assert chosen[-1] in texts[key]
    assert padded.shape == (8, int(batch.lengths.max())) and padded.dtype == torch.int64
    # Drawn anew each epoch, and equal captions are one group.
    later = dict.fromkeys(batch.keys, 0)
    for step in range(40):
        for key, group in zip((b := stream(folder)[step]).keys, b.groups.tolist(), strict=True):
            if key in later:
                later[key] |= 1 << (group % 61)
    assert any(bin(seen).count("1") > 1 for seen in later.values())
    for a in range(8):
        for b_ in range(8):
            assert (batch.groups[a] == batch.groups[b_]) == (chosen[a] == chosen[b_])


def chosen(batch: Batch) -> list[tuple[str, str]]:
    """Keys and captions, by `BytesTokenizer`."""
    ids = batch.padded_ids(pad=0).tolist()
    texts = [bytes(row[1 : n - 1]).decode() for row, n in zip(ids, batch.lengths.tolist(), strict=True)]
    return list(zip(batch.keys, texts, strict=True))


def with_choice(folder: Path, choice: CaptionChoice, **changes: object) -> Stream:
    source = open_source("s", f"{folder}/*.tar", "png", "json.captions", choice)
    return Stream([source], BytesTokenizer(), FULL, seed=1, batch_size=43, **changes)  # type: ignore[arg-type]


def test_all_captions_come_in_turn(folder: Path) -> None:
    """Three captions each: every three epochs, beginning anywhere, show each pair once."""
    one = with_choice(folder, "all")
    epochs = [chosen(one[step]) for step in range(5)]
    every = sorted((f"s{n:03}", text) for n in range(43) for text in (caption(n), f"picture {n}", "a picture"))
    for first in range(3):
        assert sorted(pair for epoch in epochs[first : first + 3] for pair in epoch) == every
    assert len({text == "a picture" for _, text in epochs[0]}) == 2, "samples begin with different ones"
    first = with_choice(folder, "first")
    assert sorted(chosen(first[1])) == sorted((f"s{n:03}", caption(n)) for n in range(43))


@pytest.mark.parametrize("choice", ["first", "random", "all"])
def test_captions_on_paper_are_those_of_the_batch(folder: Path, choice: CaptionChoice) -> None:
    one = with_choice(folder, choice)
    for step in (0, 3):
        assert one.captions(step) == [text for _, text in chosen(one[step])]


def test_drawn_with_replacement(folder: Path) -> None:
    one = with_choice(folder, "random", sampling="replacement")
    batches = [one[step] for step in range(6)]
    keys = [key for batch in batches for key in batch.keys]
    assert keys == [key for step in range(6) for key in one.keys(step)]
    assert len(set(keys[:43])) < 40, "some came twice"
    twice = next((a, b) for a in range(43) for b in range(a) if keys[a] == keys[b])
    assert not torch.equal(batches[0].images[twice[0]], batches[0].images[twice[1]]), "each time in another view"
    halves = [with_choice(folder, "random", sampling="replacement", rank=0, world=1)[5]]
    same(joined(halves), joined([batches[5]]))


def test_a_source_may_have_its_own_views(folder: Path) -> None:
    """Its pixels are those of a stream that has this view for all, and the others' are untouched by it."""
    plain = Augment(16, crop_scale=(1.0, 1.0))

    def mixture(own: Augment | None, shared: Augment) -> Batch:
        one = open_source("one", f"{folder}/0.tar", "png", "json.captions", augment=own)
        two = open_source("two", f"{folder}/1.tar", "png", "json.captions")
        return Stream([one, two], BytesTokenizer(), shared, seed=0, batch_size=16)[0]

    found, all_plain, all_full = mixture(plain, FULL), mixture(None, plain), mixture(None, FULL)
    assert set(found.sources) == {"one", "two"}
    for row, name in enumerate(found.sources):
        assert torch.equal(found.images[row], (all_plain if name == "one" else all_full).images[row])
        assert not torch.equal(all_plain.images[row], all_full.images[row])


def test_groups_ignore_case_and_space_only() -> None:
    a, b, c, d = groups(["A  red\tDot ", "a red dot", "a red dots", ""]).tolist()
    assert a == b and len({a, c, d}) == 3
    assert all(0 <= group < 2**63 for group in (a, c, d))


def test_mixture_names_its_sources(folder: Path) -> None:
    one = open_source("one", f"{folder}/0.tar", "png", "json.captions", weight=3)
    two = open_source("two", f"{folder}/1.tar", "png", "json.captions", weight=1)
    batch = Stream([one, two], BytesTokenizer(), FULL, seed=0, batch_size=8)[0]
    assert sorted(batch.sources) == ["one"] * 6 + ["two"] * 2
    for key, name in zip(batch.keys, batch.sources, strict=True):
        assert name == ("one" if int(key[1:]) < 7 else "two")
    other = open_source("other", f"{folder}/1.tar", "png", "json.captions")
    with pytest.raises(DataError, match=r"data\.sources other has none"):
        Stream([one, other], BytesTokenizer(), FULL, seed=0, batch_size=8)


def test_batch_must_fit_ranks_and_data(folder: Path) -> None:
    with pytest.raises(DataError, match="8 cannot be shared by 3 processes"):
        stream(folder, world=3)
    with pytest.raises(DataError, match="44, but there are only 43 samples"):
        stream(folder, batch_size=44)


BAD = {
    "broken.png": b"no picture",
    "cut.png": picture(1, 20)[:200],
    "empty.png": b"",
}


def bad_folder(tmp_path: Path, good: int) -> Path:
    members = samples(range(good))
    for name, content in BAD.items():
        members += [(name, content), (name.replace("png", "json"), b'{"captions": ["x"]}')]
    members += [("alone.png", picture(0, 20)), ("latin.png", picture(0, 20)), ("latin.json", b'{"captions": "\xe9"}')]
    members += [
        ("mute.png", picture(0, 20)),
        ("mute.json", b'{"captions": [" "]}'),
        ("text.json", b'{"captions": ["x"]}'),
    ]
    write_tar(tmp_path / "x.tar", members)
    return tmp_path


def test_bad_samples_are_replaced_counted_and_named(tmp_path: Path) -> None:
    one = stream(bad_folder(tmp_path, 20))
    skipped, keys = {}, []
    for batch in Loader(one, range(4)):
        keys += batch.keys
        skipped |= {bad.key: bad for bad in batch.skipped}
        assert len(batch.keys) == 8 and len(batch.lengths) == 8
    causes = {key: bad.cause for key, bad in skipped.items()}
    assert set(causes) == {"broken", "cut", "empty", "alone", "latin", "mute", "text"}
    assert "not a readable picture" in causes["broken"]
    assert causes["empty"] == "its png member is empty"
    assert causes["alone"] == "it has no json member, only png"
    assert "UTF-8" in causes["latin"]
    assert causes["mute"] == "its caption is empty"
    assert causes["text"] == "it has no png member, only json"
    assert all(bad.shard.endswith("x.tar") for bad in skipped.values())
    assert set(keys) <= {f"s{n:03}" for n in range(20)}
    # The substitutes too are the same for everybody.
    again = [stream(tmp_path, rank=r, world=2) for r in (0, 1)]
    assert [key for step in range(4) for half in again for key in half[step].keys] == keys


def test_rubbish_stops_the_run(tmp_path: Path) -> None:
    members = [(f"{n}.{e}", b"no") for n in range(40) for e in ("png",)]
    members += [(f"{n}.txt", b"fine") for n in range(40)]
    write_tar(tmp_path / "x.tar", members)
    source = open_source("web", f"{tmp_path}/x.tar", "png", "txt")
    with pytest.raises(DataError, match=r"16 samples of source 'web'.*x\.tar: \d+: not a readable picture"):
        Stream([source], BytesTokenizer(), FULL, seed=0, batch_size=8)[0]


def test_a_shard_that_changes_or_vanishes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", samples(range(10)))
    one = stream(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"0\.tar: changed after it was indexed"):
        one[0]
    path.unlink()
    with pytest.raises(DataError, match=r"0\.tar: cannot be read any more"):
        one[0]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_files_are_closed(tmp_path: Path) -> None:
    for shard in range(80):
        write_tar(tmp_path / f"{shard:02}.tar", samples(range(shard, shard + 1)))
    before = open_files()
    one = stream(tmp_path, lanes=80)
    for step in range(30):
        one[step]
    assert open_files() <= before + 64
    one._files.close()  # pyright: ignore[reportPrivateUsage]
    assert open_files() <= before
