"""Data that are no shards: what is read, in which order, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture

from clip_train.config import load_recipe
from clip_train.data.collections.base import Collection
from clip_train.data.collections.opening import open_collection
from clip_train.data.columns import BadSampleError
from clip_train.data.decode import decode
from clip_train.dataset_spec import parse_spec
from clip_train.errors import ConfigError, DataError


def contents(collection: Collection) -> list[tuple[str, int | str]]:
    return [(collection.key(i), collection.label(i)) for i in range(len(collection))]


def put(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))
    return path


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("shards-*.tar", "does not begin with one of folder:"),
        ("folder:", "after folder: comes a path"),
        ("captions:x.json?spilt=test", "no option 'spilt'; did you mean split"),
        ("folder:x?split=test", "no option 'split'"),
        ("datasets:x?split=test&split=train", "given twice"),
        ("datasets:x?split", "not of the form option=value"),
    ],
)
def test_names_that_are_refused(text: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        parse_spec(text)


def test_a_name_taken_apart_and_put_together() -> None:
    spec = parse_spec("datasets:user/set?split=test[:50%25]&image=a%26b")
    assert (spec.kind, spec.place, spec.options) == ("datasets", "user/set", {"split": "test[:50%]", "image": "a&b"})
    assert parse_spec(str(spec)) == spec


def test_a_recipes_paths_become_absolute(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    recipe_tree["evaluation"]["tasks"] = {
        "a": {"kind": "zeroshot", "data": "folder:pictures"},
        "b": {"kind": "retrieval", "data": "captions:pictures/x.csv?images=pictures/cat&split=test"},
        "c": {"kind": "knn", "data": "torchvision:CIFAR10?root=pictures&split=test", "train_data": "datasets:pictures"},
        "d": {"kind": "zeroshot", "data": "datasets:user/on-the-hub?split=test"},
    }
    path = write_recipe(recipe_tree)
    monkeypatch.chdir("/")
    tasks: dict[str, Any] = dict(load_recipe(path).evaluation.tasks)
    assert tasks["a"].data == f"folder:{tmp_path}/pictures"
    assert tasks["b"].data == f"captions:{tmp_path}/pictures/x.csv?images={tmp_path}/pictures/cat&split=test"
    assert tasks["c"].data == f"torchvision:CIFAR10?root={tmp_path}/pictures&split=test"
    assert tasks["c"].train_data == f"datasets:{tmp_path}/pictures"
    assert tasks["d"].data == "datasets:user/on-the-hub?split=test"


@pytest.mark.parametrize(
    ("task", "cause"),
    [
        ({"kind": "zeroshot"}, "give one of `shards`"),
        ({"kind": "zeroshot", "shards": "x.tar", "data": "folder:x", "classes": "c"}, "give one of `shards`"),
        ({"kind": "zeroshot", "shards": "x.tar"}, "`classes` is missing"),
        ({"kind": "zeroshot", "data": "folder:x", "label": "json.y"}, "`label` names a member of shards"),
        ({"kind": "retrieval", "data": "captions:x", "caption": "json.y"}, "`caption` names a member of shards"),
        ({"kind": "zeroshot", "data": "foler:x"}, "does not begin with one of"),
        ({"kind": "zeroshot", "data": "folder:x", "severities": [1]}, "need `corruptions`"),
        ({"kind": "zeroshot", "data": "folder:x", "corruptions": ["rain"]}, "'jpeg_compression'"),
        ({"kind": "knn", "data": "folder:x"}, "give one of `train_shards`"),
        ({"kind": "knn", "data": "folder:x", "train_data": "folder:y", "draws": 3}, "`draws` needs `shots`"),
        ({"kind": "knn", "data": "folder:x", "train_data": "folder:y", "shots": [4, 2]}, "smallest first"),
    ],
)
def test_contradictions_are_refused_with_the_recipe(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], task: dict[str, Any], cause: str
) -> None:
    recipe_tree["evaluation"]["tasks"] = {"t": task}
    with pytest.raises(ConfigError, match=cause):
        load_recipe(write_recipe(recipe_tree))


# ------------------------------------------------------------------------------------------ folder


def test_a_folder_of_classes_in_natural_order(tmp_path: Path) -> None:
    for number, name in enumerate(("c10/a.png", "c2/b10.PNG", "c2/b9.png", "c2/deep/a.webp", ".hidden/x.png")):
        put(tmp_path / name, number)
    (tmp_path / "c2" / "notes.txt").write_text("not a picture")
    found = open_collection(f"folder:{tmp_path}")
    assert found.classes == ["c2", "c10"]
    assert contents(found) == [("c2/b9.png", 0), ("c2/b10.PNG", 0), ("c2/deep/a.webp", 0), ("c10/a.png", 1)]
    assert np.array_equal(found.pixels(3), decode(picture(0)))


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        (["a/1.png", "loose.jpg"], r"1 pictures \(loose.jpg\) lie in"),
        (["train/a/1.png", "test/a/1.png"], "are parts of a data set, not classes"),
        (["a/1.png", "b/readme.txt"], "class 'b' has no pictures"),
        (["readme.txt"], "holds no folders"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, files: list[str], cause: str) -> None:
    for name in files:
        put(tmp_path / name, 0)
    with pytest.raises(DataError, match=cause):
        open_collection(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="is no folder"):
        open_collection(f"folder:{tmp_path}/nowhere")


# ---------------------------------------------------------------------------------------- captions


def test_karpathys_form_and_its_splits(tmp_path: Path) -> None:
    put(tmp_path / "val2014" / "2.png", 2)
    put(tmp_path / "1.png", 1)
    images = [
        {"filename": "1.png", "filepath": "val2014", "split": "train", "sentences": [{"raw": "one"}]},
        {"filename": "2.png", "filepath": "val2014", "split": "test", "sentences": [{"raw": "two"}, {"raw": " 2 "}]},
    ]
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"images": images}))
    found = open_collection(f"captions:{file}?split=test")
    assert [(found.key(i), found.captions(i)) for i in range(len(found))] == [("val2014/2.png", ["two", " 2 "])]
    assert np.array_equal(found.pixels(0), decode(picture(2)))
    both = open_collection(f"captions:{file}?split=train,test")
    assert [both.key(i) for i in range(2)] == ["1.png", "val2014/2.png"], "beside the file or below `filepath`"
    for options, cause in (("", r"several splits, train \(1\), test \(1\)"), ("?split=val", "no split 'val'")):
        with pytest.raises(DataError, match=cause):
            open_collection(f"captions:{file}{options}")
    with pytest.raises(DataError, match=r"2 of 2 pictures are not in .*'val2014/1\.png'|no folder of pictures"):
        open_collection(f"captions:{file}?split=train,test&images={tmp_path}/elsewhere")
    with pytest.raises(DataError, match="captions are no classes"):
        found.check(label=True, captions=False)


def test_cocos_form_and_tables(tmp_path: Path) -> None:
    for number in (1, 2):
        put(tmp_path / "p" / f"{number}.png", number)
    expected = [("2.png", ["b", "d"]), ("1.png", ["a, with a comma"])]
    (tmp_path / "coco.json").write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "2.png"}],
                "annotations": [
                    {"image_id": 8, "caption": "b"},
                    {"image_id": 7, "caption": "a, with a comma"},
                    {"image_id": 8, "caption": "d"},
                ],
            }
        )
    )
    (tmp_path / "t.csv").write_text('image,caption\n2.png,b\n1.png,"a, with a comma"\n2.png,d\n')
    (tmp_path / "t.jsonl").write_text(
        '{"file": "2.png", "text": ["b", "d"], "split": "test"}\n'
        '{"file": "1.png", "text": "x", "split": "train"}\n'
        '{"file": "1.png", "text": "a, with a comma", "split": "test"}\n'
    )
    for name in ("coco.json", "t.csv", "t.jsonl?image=file&split=test"):
        place, _, options = name.partition("?")
        found = open_collection(f"captions:{tmp_path}/{place}?images={tmp_path}/p&{options}")
        assert [(found.key(i), found.captions(i)) for i in range(len(found))] == expected, name

    (tmp_path / "t.csv").write_text("image,caption\n2.png,b\n1.png,\n")
    with pytest.raises(DataError, match=r"picture '1\.png': its caption is empty"):
        open_collection(f"captions:{tmp_path}/t.csv?images={tmp_path}/p").check(label=False, captions=True)
    (tmp_path / "coco.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    with pytest.raises(DataError, match=r"not of the form.*file_name"):
        open_collection(f"captions:{tmp_path}/coco.json")
    (tmp_path / "coco.json").write_text("[]")
    with pytest.raises(DataError, match="neither Karpathy's form nor COCO's"):
        open_collection(f"captions:{tmp_path}/coco.json")


# ------------------------------------------------------------------------------------- torchvision


def write_mnist(root: Path, prefix: str, labels: list[int]) -> None:
    """Files of the data set's own form: big-endian headers, then bytes."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2) * 10
    header = struct.pack(">IIII", 0x803, len(labels), 28, 28)
    (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + bytes(labels))


def test_torchvision_by_name(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", [3, 1, 4])
    write_mnist(tmp_path, "train", [9])
    found = open_collection(f"torchvision:MNIST?root={tmp_path}&split=test")
    assert contents(found) == [("0", 3), ("1", 1), ("2", 4)]
    assert found.classes is not None and found.classes[3] == "3 - three"
    assert found.pixels(2).tolist() == np.full((28, 28, 3), 20).tolist()
    assert len(open_collection(f"torchvision:MNIST?root={tmp_path}&train=true")) == 1
    with pytest.raises(DataError, match=r"first sample .* is a int \(3\): a text"):
        found.check(label=False, captions=True)


def test_torchvisions_captions(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 1)
    (tmp_path / "results.token").write_text("a.png#0\tone\na.png#1\ttwo\n")
    found = open_collection(f"torchvision:Flickr30k?root={tmp_path}&ann_file={tmp_path}/results.token")
    assert found.captions(0) == ["one", "two"]
    assert np.array_equal(found.pixels(0), decode(picture(1)))
    with pytest.raises(DataError, match="its target is a list"):
        found.check(label=True, captions=False)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("CIFAR11?root=.", "did you mean CIFAR10"),
        ("CIFAR10?split=test", r"\?root=FOLDER"),
        ("CIFAR10?root=.", r"several parts: say which, \?split=test"),
        ("CIFAR10?root=.&split=val", "splits train and test, not 'val'"),
        ("CIFAR10?root=.&split=test&shuffle=true", "no option 'shuffle'; it has root, train, download"),
        ("CIFAR10?root=nowhere&split=test", r"cannot be opened.*\?download=true fetches it"),
        ("FakeData?root=.", "has no root"),
    ],
)
def test_torchvision_sets_that_are_refused(text: str, cause: str) -> None:
    with pytest.raises(DataError, match=cause):
        open_collection(f"torchvision:{text}")
    assert not Path("nowhere").exists(), "nothing was downloaded"


# ---------------------------------------------------------------------------------------- datasets


def test_datasets_from_disk_parquet_and_a_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"]), "said": datasets.Value("string")}
    )
    rows = {
        "img": [{"bytes": picture(n), "path": None} for n in range(3)],
        "kind": [1, 0, -1],
        "said": ["x", "y", "z"],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"test": made, "train": made.select([0])}).save_to_disk(str(tmp_path / "disk"))
    made.to_parquet(str(tmp_path / "rows.parquet"))
    for text in (f"{tmp_path}/disk?split=test", f"{tmp_path}/rows.parquet?caption=said&cache_dir={tmp_path}/cache"):
        found = open_collection(f"datasets:{text}")
        assert list(found.classes or []) == ["cat", "dog"]
        assert [found.label(i) for i in range(2)] == [1, 0]
        assert np.array_equal(found.pixels(1), decode(picture(1)))
        with pytest.raises(BadSampleError, match="its kind is -1"):
            found.label(2)
    assert found.captions(2) == ["z"]
    for text, cause in (
        ("disk", r"splits test \(3\), train \(1\)"),
        ("disk?split=val", "no split 'val'"),
        ("disk?split=test&image=imh", "Did you mean 'img'"),
    ):
        with pytest.raises(DataError, match=cause):
            open_collection(f"datasets:{text}", tmp_path)
    with pytest.raises(DataError, match=r"which column holds a caption.*img \(Image\)"):
        open_collection("datasets:disk?split=test", tmp_path).check(label=True, captions=True)

    for name in ("test/cat/0.png", "test/dog/1.png"):
        put(tmp_path / "images" / name, int(name[-5]))
    found = open_collection(f"datasets:{tmp_path}/images?split=test&cache_dir={tmp_path}/cache")
    assert (list(found.classes or []), found.label(1)) == (["cat", "dog"], 1)
    assert np.array_equal(found.pixels(1), decode(picture(1)))
