"""GLUE (Wang et al. 2019), all nine tasks, from the hub or from a folder, through `datasets`.

Answers of GLUE's own test sets are not public. Test is therefore its validation set (the matched one of MNLI), and dev
a part of its training set, chosen by hash: nothing is tuned on what is reported, unlike in Chen et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clip_train.data.hashing import text_hash
from clip_train.errors import DataError
from clip_train.evaluation.text.tasks import Split, TextTask, check_task, split_of

HUB = "hub"
"""Where to read when no folder is meant."""
DEV_SHARE = 0.1
LARGEST_DEV = 2000


@dataclass(frozen=True)
class Glue:
    """One of the nine."""

    columns: tuple[str, ...]
    metric: str
    classes: tuple[str, ...]
    """In the order of their numbers; none for ratings."""
    also: tuple[str, ...] = ()
    validation: str = "validation"

    @property
    def kind(self) -> Literal["labels", "ratings"]:
        return "labels" if self.classes else "ratings"


_ENTAILS = ("entailment", "not_entailment")
GLUE = {
    "cola": Glue(("sentence",), "matthews", ("unacceptable", "acceptable"), ("accuracy",)),
    "sst2": Glue(("sentence",), "accuracy", ("negative", "positive")),
    "mrpc": Glue(("sentence1", "sentence2"), "accuracy", ("not_equivalent", "equivalent"), ("f1",)),
    "stsb": Glue(("sentence1", "sentence2"), "pearson", (), ("spearman",)),
    "qqp": Glue(("question1", "question2"), "accuracy", ("not_duplicate", "duplicate"), ("f1",)),
    "mnli": Glue(("premise", "hypothesis"), "accuracy", ("entailment", "neutral", "contradiction"), (),
                 "validation_matched"),
    "qnli": Glue(("question", "sentence"), "accuracy", _ENTAILS),
    "rte": Glue(("sentence1", "sentence2"), "accuracy", _ENTAILS),
    "wnli": Glue(("sentence1", "sentence2"), "accuracy", ("not_entailment", "entailment")),
}  # fmt: skip


def read_glue(source: str, names: Sequence[str] = (), *, limit: int = 10_000) -> list[TextTask]:
    """Tasks of GLUE.

    Args:
        source: `hub`, or a folder with one folder a task: what `DatasetDict.save_to_disk` wrote, or `train` and
            `validation` (`validation_matched`) as .parquet, .jsonl, .csv or .tsv, in the columns that the hub's have.
        names: all that are there by default.
        limit: training texts of a task at most, chosen by hash.

    Raises:
        DataError: `datasets` is not installed; an unknown task; nothing to read; columns or labels are others.
    """
    if unknown := [name for name in names if name not in GLUE]:
        raise DataError(f"GLUE has no task {unknown[0]!r}: choose of {', '.join(GLUE)}")
    if source != HUB:
        folder = Path(source)
        if not folder.is_dir():
            raise DataError(f"{source}: there is no such folder; give one, or {HUB!r}")
        names = names or [name for name in GLUE if (folder / name).is_dir()]
        if not names:
            raise DataError(f"{source}: holds no task of GLUE: folders {', '.join(GLUE)} are looked for")
    tasks = [_task(name, _load(source, name), limit) for name in names or GLUE]
    for task in tasks:
        check_task(task)
    return tasks


def _load(source: str, name: str) -> Any:
    try:
        import datasets as library
    except ImportError:
        raise DataError("GLUE needs datasets: pip install 'clip-train[probe]'") from None
    datasets: Any = library
    try:
        if source == HUB:
            return datasets.load_dataset("nyu-mll/glue", name)
        folder = Path(source) / name
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))
        files = {
            split: str(found[0])
            for split in ("train", GLUE[name].validation)
            if (found := [one for one in sorted(folder.glob(f"{split}[.-]*")) if one.suffix.strip(".") in _READERS])
        }
        if not files:
            raise DataError(f"{folder}: neither dataset_dict.json nor train and validation files are there")
        suffix = Path(files[next(iter(files))]).suffix.strip(".")
        more = {"delimiter": "\t"} if suffix == "tsv" else {}
        return datasets.load_dataset(_READERS[suffix], data_files=files, **more)
    except DataError:
        raise
    except Exception as error:  # the library raises of its own, of its readers' and of the network's
        raise DataError(
            f"GLUE's {name} cannot be read from {source}: {type(error).__name__}: {str(error)[:300]}"
        ) from error


_READERS = {"parquet": "parquet", "jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv"}


def _task(name: str, found: Any, limit: int) -> TextTask:
    glue = GLUE[name]
    for split in ("train", glue.validation):
        if split not in found:
            raise DataError(f"GLUE's {name} has no split {split!r}: {', '.join(found)}")
        columns = {*glue.columns, "label"}
        if missing := columns - {*found[split].column_names}:
            raise DataError(
                f"GLUE's {name}, {split}: no column {', '.join(sorted(missing))}: {found[split].column_names}"
            )
    train = _rows(found["train"], glue)
    train.sort(key=lambda row: text_hash("\t".join(row[:-1])))
    dev = train[: min(LARGEST_DEV, max(1, int(len(train) * DEV_SHARE)))]
    inside = {tuple(row[:-1]) for row in dev}
    rest = [row for row in train[len(dev) :] if tuple(row[:-1]) not in inside][:limit]
    splits: dict[str, Split] = {
        "train": split_of(rest), "dev": split_of(dev), "test": split_of(_rows(found[glue.validation], glue))
    }  # fmt: skip
    return TextTask(f"glue_{name}", glue.kind, splits, glue.classes, glue.metric, "GLUE", glue.also)


def _rows(split: Any, glue: Glue) -> list[list[Any]]:
    columns = [split[column] for column in (*glue.columns, "label")]
    return [[str(text) for text in row[:-1]] + [row[-1]] for row in zip(*columns, strict=True)]
