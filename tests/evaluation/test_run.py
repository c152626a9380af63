from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from clip_train.config.schema import Retrieval, ZeroShot
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.run import evaluate, read_templates

from .colours import COLOURS, captioned, classified, loaded
from .ranks import run_ranks


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, ZeroShot | Retrieval]:
    classified(tmp_path / "z-0.tar", [("red", "red"), ("green", "blue")])
    classified(tmp_path / "z-1.tar", [("pink", "5")])
    captioned(tmp_path / "r.tar", [("red", ["red", "a red one"]), ("green", ["green"])])
    (tmp_path / "classes.txt").write_text("\n".join(COLOURS) + "\n\n")
    (tmp_path / "templates.txt").write_text("{}\na {} thing\n")
    return {
        "colours": ZeroShot(shards="z-{0..1}.tar", classes="classes.txt", templates="templates.txt"),
        "words": Retrieval(shards="r.tar", caption="json.captions"),
    }


def test_figures_and_files(tmp_path: Path, tasks: dict[str, ZeroShot | Retrieval]) -> None:
    run_dir, screen = tmp_path / "run", io.StringIO()
    figures = evaluate(
        loaded(), tasks, relative_to=tmp_path, run_dir=run_dir, step=30, console=Console(file=screen, width=200)
    )
    assert figures["zeroshot/colours/top1"] == pytest.approx(2 / 3)
    assert figures["zeroshot/colours/chance"] == pytest.approx(1 / 6)
    assert figures["retrieval/words/text_to_image/r@1"] == 1.0
    assert {"retrieval/words/image_to_text/r@10", "retrieval/words/image_to_text/chance_r@10"} <= figures.keys()

    written = json.loads((run_dir / "eval.json").read_text())
    assert written == figures
    assert list(written) == sorted(written)
    assert json.loads((run_dir / "evals.jsonl").read_text()) == {"step": 30, **figures}
    assert not list(run_dir.rglob("*.part"))
    with np.load(run_dir / "eval" / "colours.npz", allow_pickle=False) as rows:
        assert rows["labels"].tolist() == [0, 2, 5]
        assert rows["shard"].tolist() == [0, 0, 1]
        assert [Path(str(name)).name for name in rows["shards"]] == ["z-0.tar", "z-1.tar"]
    with np.load(run_dir / "eval" / "words.npz", allow_pickle=False) as rows:
        assert rows["captions"].tolist() == ["red", "a red one", "green"]
    assert "colours: top-1 66.7%" in screen.getvalue()


def test_evaluations_during_training_add_up(tmp_path: Path, tasks: dict[str, ZeroShot | Retrieval]) -> None:
    for step in (10, 20):
        evaluate(loaded(), tasks, relative_to=tmp_path, run_dir=tmp_path / "run", step=step)
    lines = (tmp_path / "run" / "evals.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_only_the_first_rank_writes_and_all_know(tmp_path: Path, tasks: dict[str, ZeroShot | Retrieval]) -> None:
    alone = evaluate(loaded(), tasks, relative_to=tmp_path)
    results = run_ranks(
        2,
        lambda rank, gather: evaluate(
            loaded(),
            tasks,
            relative_to=tmp_path,
            rank=rank,
            world=2,
            gather=gather,
            run_dir=tmp_path / f"rank{rank}",
            step=1,
        ),
    )
    assert results == [pytest.approx(alone)] * 2
    assert (tmp_path / "rank0" / "eval.json").exists()
    assert not (tmp_path / "rank1").exists()


def test_paths_that_are_not_there_are_named(tmp_path: Path) -> None:
    classified(tmp_path / "z.tar", [("red", "red")])
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        evaluate(loaded(), {"t": ZeroShot(shards="z.tar", classes="nowhere.txt")}, relative_to=tmp_path)
    with pytest.raises(DataError, match=r"none-\*\.tar"):
        evaluate(loaded(), {"t": Retrieval(shards="none-*.tar")}, relative_to=tmp_path)


def test_task_names_stay_inside_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.\./x"):
        evaluate(loaded(), {"../x": Retrieval(shards="a.tar")}, relative_to=tmp_path)


def test_templates_in_place_or_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a {}\nthe {}\n")
    for given, expected in (
        ("a photo of a {}", ["a photo of a {}"]),
        ("t.txt", ["a {}", "the {}"]),
        (["{}", "{} b"], ["{}", "{} b"]),
    ):
        task = ZeroShot(shards="x", classes="c", templates=given)
        assert read_templates(task, tmp_path) == expected
