"""Text tasks from elsewhere, in small: the sentiment archive's layout, GLUE's columns; fine-tuning on a toy task."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_train.cli import main
from clip_train.errors import DataError
from clip_train.evaluation.text.encoder import PooledEncoder
from clip_train.evaluation.text.finetune import Settings, finetune_task
from clip_train.evaluation.text.glue import GLUE, read_glue
from clip_train.evaluation.text.our_tower import OurTower
from clip_train.evaluation.text.sentiment import CORPORA, read_sentiment
from clip_train.evaluation.text.tasks import TextTask, split_of
from clip_train.models.text import TextTransformer
from tokenizer import BPETokenizer


def ratings(stem: str) -> str:
    lines = [f"{i}_1\t{(i % 9 - 4) / 2}\t{stem} says: number  {i}, it's so-so" for i in range(90)]
    return "\n".join([*lines, f"again\t4.0\t{stem} says: number 3, it's so-so", ""])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The published nesting: an archive of text files in a source package."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for stem in CORPORA.values():
            for name in (f"hutto_ICWSM_2014/{stem}_GroundTruth.txt", f"hutto_ICWSM_2014/._{stem}_GroundTruth.txt"):
                content = ratings(stem).encode() if "._" not in name else b"\x00\x05"
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(tmp_path / "vaderSentiment-0.5.zip", "w") as outer:
        outer.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
        outer.writestr("vaderSentiment-0.5/setup.py", "")
    (tmp_path / "inner.tar.gz").write_bytes(inner.getvalue())
    return tmp_path


def test_sentiment_is_read_from_package_archive_and_folder(package: Path, tmp_path: Path) -> None:
    found = read_sentiment(package)  # the folder that pip filled
    assert [task.name for task in found[:2]] == ["sentiment_tweets", "rating_tweets"] and len(found) == 8
    for source in (package / "vaderSentiment-0.5.zip", package / "inner.tar.gz"):
        assert [task.splits["test"].first for task in read_sentiment(source)] == [t.splits["test"].first for t in found]
    rated, polar = found[1].splits, found[0].splits
    texts = [text for part in rated.values() for text in part.first]
    assert len(set(texts)) == len(texts) <= 90  # once each, on one side
    assert all("number " in text and "  " not in text for text in texts)
    by_text = {t: a for part in rated.values() for t, a in zip(part.first, part.answers, strict=True)}
    assert by_text.get("tweets says: number 3, it's so-so", -0.5) == -0.5  # the first rating of a text stands
    for name, part in polar.items():
        assert set(part.first) == {text for text in rated[name].first if abs(by_text[text]) > 0.5}
        assert part.answers.tolist() == [float(by_text[text] > 0) for text in part.first]


def test_sentiment_that_is_not_there(package: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such"):
        read_sentiment(tmp_path / "absent")
    (tmp_path / "cut.tar.gz").write_bytes((package / "inner.tar.gz").read_bytes()[:300])
    with pytest.raises(DataError, match="no whole archive"):
        read_sentiment(tmp_path / "cut.tar.gz")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="GroundTruth"):
        read_sentiment(empty)
    (empty / "tweets_GroundTruth.txt").write_text("1\tgood\ttext\n")
    with pytest.raises(DataError, match="line 1"):
        read_sentiment(empty)


def glue_rows(name: str, n: int, offset: int = 0) -> list[dict[str, object]]:
    one = GLUE[name]
    return [
        {**{column: f"{column} number {i + offset} of {name}" for column in one.columns},
         "label": i % len(one.classes) if one.classes else (i % 11) / 2, "idx": i}
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nine in the hub's columns: most as JSON lines, one each as parquet, tsv and a saved DatasetDict."""
    from datasets import Dataset, DatasetDict

    folder = tmp_path_factory.mktemp("glue")
    for name, one in GLUE.items():
        (folder / name).mkdir()
        parts = {"train": glue_rows(name, 60), one.validation: glue_rows(name, 24, 1000)}
        if name == "cola":
            DatasetDict({split: Dataset.from_list(rows) for split, rows in parts.items()}).save_to_disk(folder / name)
            continue
        for split, rows in parts.items():
            if name == "rte":
                Dataset.from_list(rows).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
            elif name == "sst2":
                lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
                (folder / name / f"{split}.tsv").write_text("\n".join(lines) + "\n")
            else:
                (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_all_nine_tasks_of_glue(glue: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    tasks = {task.name: task for task in read_glue(str(glue), limit=40)}
    assert set(tasks) == {f"glue_{name}" for name in GLUE} and len(tasks) == 9
    for name, one in GLUE.items():
        task = tasks[f"glue_{name}"]
        assert task.pairs == (len(one.columns) == 2)
        assert [len(task.splits[split]) for split in ("train", "dev", "test")] == [40, 6, 24]
        want = {
            tuple(str(row[column]) for column in one.columns): float(row["label"]) for row in glue_rows(name, 24, 1000)
        }  # type: ignore[arg-type]
        test = task.splits["test"]
        assert dict(zip(zip(*filter(None, (test.first, test.second)), strict=True), test.answers, strict=True)) == want
        assert not set(task.splits["train"].first) & set(task.splits["dev"].first)
    assert (tasks["glue_cola"].metric, tasks["glue_stsb"].metric, tasks["glue_stsb"].also) == (
        "matthews", "pearson", ("spearman",)
    )  # fmt: skip
    assert (tasks["glue_stsb"].kind, len(tasks["glue_mnli"].classes)) == ("ratings", 3)


def test_glue_that_cannot_be_read(glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="no task 'cool'"):
        read_glue(str(glue), ["cool"])
    with pytest.raises(DataError, match="holds no task"):
        read_glue(str(tmp_path))
    (tmp_path / "rte").mkdir()
    with pytest.raises(DataError, match="neither dataset_dict"):
        read_glue(str(tmp_path))
    (tmp_path / "rte/train.jsonl").write_text('{"sentence1": "a", "label": 0}\n')
    (tmp_path / "rte/validation.jsonl").write_text('{"sentence1": "a", "label": 0}\n')
    with pytest.raises(DataError, match="no column sentence2"):
        read_glue(str(tmp_path))
    one_class = "".join(json.dumps({"sentence1": f"a{i}", "sentence2": "b", "label": 1}) + "\n" for i in range(30))
    for split in ("train", "validation"):
        (tmp_path / f"rte/{split}.jsonl").write_text(one_class)
    with pytest.raises(DataError, match="one class"):
        read_glue(str(tmp_path))
    # The command says so before it opens, let alone asks, an encoder.
    assert main(["probe", str(tmp_path / "no-encoder"), "--glue", str(tmp_path)]) == 2


def test_fine_tuning_learns_what_the_frozen_tower_hides() -> None:
    tokenizer = BPETokenizer.default(context_length=16)
    torch.manual_seed(0)
    tower = TextTransformer(
        tokenizer.vocab_size, 16, width=32, layers=1, heads=2, attention="bidirectional", pool="cls"
    )
    encoder = PooledEncoder("tiny", OurTower(tower, tokenizer))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    rows = [[f"{'red' if i % 2 else 'blue'} thing {i}", i % 2] for i in range(140)]
    task = TextTask(
        "colour", "labels",
        {"train": split_of(rows[:80]), "dev": split_of(rows[80:100]), "test": split_of(rows[100:])}, ("blue", "red"),
    )  # fmt: skip
    settings = Settings(epochs=3, lr=1e-2, batch_size=16, seeds=2)
    result = finetune_task(encoder, task, settings)
    assert result.name == "exp1/colour/finetuned"
    assert set(result.more["dev_by_pool"]) == {"own", "eot", "mean", "max"}, "cls is the own one, last is eot"
    assert result.value == 1.0 and result.more["by_seed"] == [1.0, 1.0]
    assert result.items[""].shape == (2, 40) and result.items[""].mean() == pytest.approx(result.value)
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    rated = TextTask(
        "heat", "ratings", {name: split_of([[t, a + 5.0] for t, a in zip(one.first, one.answers, strict=True)])
                            for name, one in task.splits.items()}, metric="pearson",
    )  # fmt: skip
    assert finetune_task(encoder, rated, Settings(epochs=3, lr=1e-2, batch_size=16, seeds=1)).value > 0.9
    head_only = finetune_task(encoder, task, Settings(epochs=2, lr=0.0, head_lr=2e-3, batch_size=16, seeds=1))
    tried = head_only.more["dev_by_pool"]
    assert tried[head_only.pool] == max(tried.values()) > min(tried.values()) >= 0
    untrained = finetune_task(encoder, task, Settings(epochs=1, lr=0.0, head_lr=0.0, seeds=1))
    assert untrained.value == np.mean(task.splits["test"].answers == 0)  # a head of zeros says class 0
