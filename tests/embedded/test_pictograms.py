"""The data that ships obeys what its README promises. Read with tarfile, json and Pillow alone."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

import clip_train.embedded

FOLDER = Path(clip_train.embedded.__file__).parent / "pictograms"
SPLITS = ("train", "unseen_style", "openclipart_test")
LICENSES = {
    "noto": "Apache-2.0",
    "noto-v1": "Apache-2.0",
    "fxemoji": "Apache-2.0",
    "fluent-emoji": "MIT",
    "fluent-emoji-flat": "MIT",
    "twemoji": "CC-BY-4.0",
    "openclipart": "CC-PDDC",
}


@dataclass(frozen=True)
class Entry:
    key: str
    picture: bytes
    pixels: bytes
    fields: dict


def read(shard: Path) -> Iterator[Entry]:
    with tarfile.open(shard, "r:gz") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(members) % 2 == 0
    for name, content in members.items():
        key, extension = name.split(".")  # exactly one dot
        if extension == "webp":
            with Image.open(io.BytesIO(content)) as image:
                assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB"), name
                pixels = image.tobytes()
            yield Entry(key, content, pixels, json.loads(members[f"{key}.json"]))
        else:
            assert extension == "json" and f"{key}.webp" in members, name


@cache
def split(name: str) -> list[Entry]:
    return [entry for shard in sorted(FOLDER.glob(f"{name}-*.tar.gz")) for entry in read(shard)]


@cache
def summary() -> dict:
    return json.loads((FOLDER / "summary.json").read_text("utf-8"))


@pytest.mark.parametrize("name", SPLITS)
def test_counts_are_those_of_the_summary(name: str) -> None:
    entries, said = split(name), summary()["splits"][name]
    assert len(entries) == said["samples"] > 0
    assert len(list(FOLDER.glob(f"{name}-*.tar.gz"))) == said["shards"]
    assert Counter(entry.fields["source"] for entry in entries) == said["by_source"]
    assert sum(len(entry.fields["captions"]) for entry in entries) == said["captions"]
    assert len({entry.fields["label"] for entry in entries if "label" in entry.fields}) == said["labels"]


def test_shards_are_numbered_without_gaps_and_hold_at_most_1000() -> None:
    for name in SPLITS:
        shards = sorted(path.name for path in FOLDER.glob(f"{name}-*"))
        assert shards == [f"{name}-{number:06d}.tar.gz" for number in range(len(shards))]
        for shard in shards:
            with tarfile.open(FOLDER / shard) as tar:
                assert len(tar.getnames()) <= 2000


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 20_000_000


@pytest.mark.parametrize("name", SPLITS)
def test_every_sample_has_words_a_source_and_its_license(name: str) -> None:
    for entry in split(name):
        captions = entry.fields["captions"]
        assert isinstance(captions, list) and captions, entry.key
        assert all(isinstance(caption, str) and caption.strip() == caption != "" for caption in captions)
        assert len(set(captions)) == len(captions), entry.key
        assert entry.fields["license"] == LICENSES[entry.fields["source"]]
        assert entry.key.startswith(entry.fields["source"] + "-")
        if entry.fields["source"] == "openclipart":
            assert "label" not in entry.fields
        else:
            assert captions[0] == entry.fields["label"]
            assert "skin tone" not in entry.fields["label"]


def test_keys_are_unique_across_splits() -> None:
    keys = Counter(entry.key for name in SPLITS for entry in split(name))
    assert [key for key, times in keys.items() if times > 1] == []


def test_the_unseen_style_is_not_in_training() -> None:
    assert "twemoji" not in {entry.fields["source"] for entry in (*split("train"), *split("openclipart_test"))}
    assert {entry.fields["source"] for entry in split("unseen_style")} == {"twemoji"}


def test_every_unseen_class_is_asked_once_and_was_trained_under_its_name() -> None:
    classes = (FOLDER / "unseen_style.classes.txt").read_text("utf-8").splitlines()
    asked = [entry.fields["label"] for entry in split("unseen_style")]
    assert len(classes) >= 1200
    assert classes == sorted(set(classes)) == sorted(asked)
    trained = {entry.fields.get("label") for entry in split("train")}
    assert set(classes) <= trained


def test_no_picture_is_in_two_splits_or_twice_in_one() -> None:
    # As stored: pictures that differed before encoding may, very rarely, come out equal.
    counts = Counter(entry.pixels for name in SPLITS for entry in split(name))
    test = {entry.pixels for name in SPLITS[1:] for entry in split(name)}
    assert max(counts[pixels] for pixels in test) == 1
    assert sum(times - 1 for times in counts.values()) <= 5


def test_no_test_picture_is_a_near_copy_of_a_training_picture() -> None:
    """Measured anew on the stored pictures, by Pillow; a tenth of slack for the encoding."""
    numpy = pytest.importorskip("numpy")

    def ink(name: str):
        grids = [
            numpy.asarray(Image.frombytes("RGB", (64, 64), entry.pixels).reduce(4), dtype=numpy.float64)
            for entry in split(name)
        ]
        return 255.0 - numpy.stack(grids).reshape(len(grids), -1)

    train = ink("train")
    for name in SPLITS[1:]:
        test = ink(name)
        squared = (test**2).sum(1)[:, None] + (train**2).sum(1)[None] - 2 * test @ train.T
        norms = numpy.linalg.norm(test, axis=1)[:, None] + numpy.linalg.norm(train, axis=1)[None]
        nearest = (2 * numpy.sqrt(numpy.maximum(squared, 0)) / norms).min(axis=1)
        assert nearest.min() > 0.9 * summary()["near_threshold"], split(name)[int(nearest.argmin())].key


def test_retrieval_captions_tell_pictures_apart() -> None:
    names = Counter(entry.fields["captions"][0].lower() for entry in split("openclipart_test"))
    assert max(names.values()) == 1


def test_each_training_shard_is_a_mixture() -> None:
    overall = Counter(entry.fields["source"] for entry in split("train"))
    for shard in sorted(FOLDER.glob("train-*.tar.gz")):
        part = Counter(entry.fields["source"] for entry in read(shard))
        for source, times in overall.items():
            share = part[source] / part.total()
            assert share == pytest.approx(times / overall.total(), rel=0.5), (shard.name, source)


def test_every_source_is_attributed() -> None:
    text = (FOLDER / "ATTRIBUTION.md").read_text("utf-8")
    for source, license in LICENSES.items():
        assert f"`{source}`" in text and license in text
    for package, version in summary()["sources"].items():
        assert package in text and version in text
    assert "Unicode-3.0" in text


def test_path_unpacks_into_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shard = clip_train.embedded.path("pictograms/unseen_style-000000.tar")
    assert tmp_path in shard.parents
    assert shard.read_bytes() == gzip.decompress((FOLDER / "unseen_style-000000.tar.gz").read_bytes())
    before = shard.stat().st_mtime_ns
    assert clip_train.embedded.path("pictograms/unseen_style-000000.tar") == shard
    assert shard.stat().st_mtime_ns == before
    assert [path.name for path in shard.parent.iterdir()] == ["unseen_style-000000.tar"]  # nothing half done


def test_path_of_a_pattern_unpacks_all_that_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pattern = clip_train.embedded.path("pictograms/unseen_style-*.tar")
    found = sorted(path.name for path in pattern.parent.glob(pattern.name))
    assert found == [f"unseen_style-{n:06d}.tar" for n in range(summary()["splits"]["unseen_style"]["shards"])]


def test_path_falls_back_where_the_cache_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # not a folder
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert tmp_path in clip_train.embedded.path("pictograms/openclipart_test-000000.tar").parents


def test_path_gives_plain_files_as_they_are() -> None:
    assert clip_train.embedded.path("pictograms/summary.json") == FOLDER / "summary.json"


@pytest.mark.parametrize("wrong", ["pictograms/train-999999.tar", "pictograms/trian-*.tar", "pictogram/x.tar"])
def test_path_names_what_there_is(wrong: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"pictograms|train-000000\.tar") as error:
        clip_train.embedded.path(wrong)
    assert wrong in str(error.value)
