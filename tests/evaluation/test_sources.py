"""Tasks on data that are no shards: the same figures as on shards of the same pictures, and published protocols."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval  # pyright: ignore
from PIL import Image

from clip_train.config.schema import Knn, LinearProbe, Retrieval, ZeroShot
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.gallery import Album
from clip_train.evaluation.reading import class_places
from clip_train.evaluation.run import evaluate

from .colours import COLOURS, PREPROCESS, Loaded, classified, loaded, picture
from .ranks import run_ranks

SAMPLES = [("red", "red"), ("green", "red"), ("blue", "blue"), ("pink", "pink"), ("pink", "blue"), ("cyan", "cyan")]
"""Colours of pictures, and their classes."""


def folder(path: Path, samples: list[tuple[str, str]] = SAMPLES) -> Path:
    for number, (colour, label) in enumerate(samples):
        (path / label).mkdir(parents=True, exist_ok=True)
        (path / label / f"{number}.png").write_bytes(picture(COLOURS[colour]))
    return path


def test_a_folder_gives_the_figures_of_shards(tmp_path: Path) -> None:
    folder(tmp_path / "f")
    classified(tmp_path / "s.tar", SAMPLES)
    (tmp_path / "classes.txt").write_text("\n".join(sorted({label for _, label in SAMPLES})))
    tasks = {
        "f": ZeroShot(data="folder:f", templates=["{}", "a {}"]),
        "s": ZeroShot(shards="s.tar", classes="classes.txt", templates=["{}", "a {}"]),
    }
    figures = evaluate(loaded(), tasks, relative_to=tmp_path, run_dir=tmp_path / "run")
    # Of the six, the green "red" is nearest to cyan or red, the pink "blue" to pink.
    assert figures["zeroshot/f/top1"] == 4 / 6
    for name in ("top1", "top5", "per_class_mean", "chance", "majority", "samples", "classes"):
        assert figures[f"zeroshot/f/{name}"] == figures[f"zeroshot/s/{name}"], name
    for got in run_ranks(
        3, lambda rank, gather: evaluate(loaded(), tasks, relative_to=tmp_path, rank=rank, world=3, gather=gather)
    ):
        assert got == pytest.approx(figures)

    with np.load(tmp_path / "run" / "eval" / "f.npz", allow_pickle=False) as rows:
        at = rows["keys"].tolist().index("pink/3.png")
        notes: list[str] = []
        shard = str(rows["shards"][rows["shard"][at]])
        shown = Album(tmp_path, notes).picture(shard, "pink/3.png", str(rows["image"]))
    assert shown is not None and shown.getpixel((0, 0)) == COLOURS["pink"], "the report finds its pictures"


def test_names_of_classes_from_a_file(tmp_path: Path) -> None:
    folder(tmp_path / "f", [("red", "n02"), ("green", "n10"), ("blue", "n1")])
    for names, top1 in (("blue\nred\ngreen", 1.0), ("red\nblue\ngreen", 1 / 3)):  # n1, n02, n10: as people count
        (tmp_path / "names.txt").write_text(names)
        task = ZeroShot(data="folder:f", classes="names.txt")
        assert evaluate(loaded(), {"t": task}, relative_to=tmp_path)["zeroshot/t/top1"] == pytest.approx(top1)
    assert class_places(["b", "a"], ["a", "b", "c"], "x", "y") == [1, 0], "by name where all are known"
    assert class_places(["n1", "n2"], ["a", "b"], "x", "y") == [0, 1], "else as the list counts"
    with pytest.raises(ConfigError, match=r"2 classes are not those of y, which has 3: 'n1' is not among"):
        class_places(["n1", "a"], ["a", "b", "c"], "x", "y")


def test_probes_on_folders_whose_tests_have_fewer_classes(tmp_path: Path) -> None:
    folder(tmp_path / "train", [(colour, colour) for colour in COLOURS for _ in range(3)])
    folder(tmp_path / "test", [("red", "red"), ("pink", "pink"), ("pink", "red")])
    same: dict[str, Any] = {"train_data": "folder:train", "data": "folder:test"}
    figures = evaluate(loaded(), {"p": LinearProbe(**same), "k": Knn(**same, neighbours=2)}, relative_to=tmp_path)
    for kind in ("linear_probe/p", "knn/k"):
        assert (figures[f"{kind}/top1"], figures[f"{kind}/classes"]) == (pytest.approx(2 / 3), 6)
    turned = {"p": LinearProbe(train_data="folder:test", data="folder:train")}
    with pytest.raises(ConfigError, match="6 classes are not those of the training data, which has 2"):
        evaluate(loaded(), turned, relative_to=tmp_path)


def test_what_one_rank_cannot_open_stops_all(tmp_path: Path) -> None:
    folder(tmp_path / "f")

    def work(rank: int, gather: Any) -> Any:
        beside = tmp_path if rank else tmp_path / "another machine"
        return evaluate(
            loaded(), {"t": ZeroShot(data="folder:f")}, relative_to=beside, rank=rank, world=2, gather=gather
        )

    assert all(isinstance(error, DataError) and "is no folder" in str(error) for error in run_ranks(2, work))


def test_a_bad_picture_is_named(tmp_path: Path) -> None:
    (folder(tmp_path / "f") / "cyan" / "x.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"sample 'cyan/x\.png' cannot be evaluated: not a readable picture"):
        evaluate(loaded(), {"t": ZeroShot(data="folder:f")}, relative_to=tmp_path)


# --------------------------------------------------------------------------------------- retrieval

OPPOSITE = dict(zip(COLOURS, ["cyan", "pink", "yellow", "blue", "red", "green"], strict=True))


def karpathy(path: Path) -> str:
    """Six pictures of one colour with five captions: its colour three times, its opposite, and one that is too many
    for the protocol. In the file they are of another split too, which does not count."""
    images: list[dict[str, Any]] = []
    for number, colour in enumerate(COLOURS):
        (path / f"{number}.png").write_bytes(picture(COLOURS[colour]))
        captions = [colour, colour.upper(), f" {colour} ", OPPOSITE[colour], OPPOSITE[colour]]
        sentences = [{"raw": one, "tokens": one.split()} for one in captions]
        images.append({"filename": f"{number}.png", "split": "test", "sentences": sentences})
    images.append({"filename": "0.png", "split": "train", "sentences": [{"raw": "x"}]})
    (path / "dataset_made.json").write_text(json.dumps({"images": images, "dataset": "made"}))
    return "captions:dataset_made.json?split=test"


def test_recalls_by_hand(tmp_path: Path) -> None:
    data = karpathy(tmp_path)
    tasks = {
        "each": Retrieval(data=data, equal_captions="each"),
        "three": Retrieval(data=data, equal_captions="each", most_captions=3),
        "one": Retrieval(data=data),
        "folds": Retrieval(data=data, equal_captions="each", folds=3),
    }
    figures = evaluate(loaded(), tasks, relative_to=tmp_path, run_dir=tmp_path / "run")

    def found(name: str) -> list[float]:
        return [figures[f"retrieval/{name}/{way}/r@{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 5)]

    # Of 30 captions 18 find their picture first. The opposite's picture is the very last of the six.
    # Two captions of its opposite say a picture's own colour, and a tie counts against it.
    assert found("each") == pytest.approx([18 / 30, 18 / 30, 0, 1])
    assert figures["retrieval/each/captions"] == 30
    assert found("three") == [1, 1, 1, 1]
    # Equal captions are one: "red" is right for the red picture and for the cyan one, whose caption it is too.
    assert found("one") == [1, 1, 1, 1]
    assert figures["retrieval/one/captions"] == 6
    # Red and green, blue and yellow, cyan and pink: of two pictures the opposite is the second, which is among five;
    # blue and yellow are each other's opposite, cyan's is red, not in its fold.
    assert found("folds") == pytest.approx([18 / 30, 1, 2 / 3, 1])
    with pytest.raises(DataError, match="6 pictures cannot be parted into 4 folds"):
        evaluate(loaded(), {"t": Retrieval(data=data, folds=4)}, relative_to=tmp_path)


class Table(torch.nn.Module):
    """Pictures as their mean colour; the text number n as row n of a table."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts, self.embed_dim, self.pad = texts, 3, 0
        self.table = torch.randn(len(texts), 3, generator=torch.Generator().manual_seed(3))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    def encode_text(self, ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return self.table[ids[:, 0]]

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        return np.array([self.texts.index(one) for one in texts], np.int32), np.ones(len(texts), np.int32)


def test_recalls_are_clip_benchmarks(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    colours = rng.integers(0, 256, (20, 3)).astype(np.uint8)
    texts = [[f"text {number} {k}" for k in range(5)] for number in range(20)]
    lines = ["image,caption"]
    for number, colour in enumerate(colours):
        Image.fromarray(np.tile(colour, (8, 8, 1))).save(tmp_path / f"{number}.png")
        lines += [f"{number}.png,{text}" for text in texts[number]]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    model = Table([text for own in texts for text in own])
    task = Retrieval(data="captions:captions.csv", equal_captions="each", most_captions=5)
    figures = evaluate(Loaded(model, PREPROCESS, model), {"t": task}, relative_to=tmp_path, device=torch.device("cpu"))

    pixels = torch.stack([PREPROCESS(Image.open(tmp_path / f"{number}.png")) for number in range(20)])
    peer: Any = zeroshot_retrieval.evaluate
    theirs = peer(
        model, [(pixels[:8], texts[:8]), (pixels[8:], texts[8:])],
        lambda batch: torch.tensor([[model.texts.index(one)] for one in batch]), "cpu", amp=False,
        recall_k_list=[1, 5, 10],
    )  # fmt: skip
    for k in (1, 5, 10):
        assert figures[f"retrieval/t/text_to_image/r@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
        assert figures[f"retrieval/t/image_to_text/r@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
    assert 0 < figures["retrieval/t/text_to_image/r@1"] < figures["retrieval/t/text_to_image/r@10"] < 1
