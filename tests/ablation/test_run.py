"""Running a grid: resuming, locks, failures, shares, signals; table and report of what came out."""

from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from clip_train.ablation import main, report, results, summary
from clip_train.ablation.cells import Lock
from clip_train.ablation.grid import load_grid
from clip_train.ablation.main import ablate
from clip_train.errors import ConfigError, UserError
from clip_train.evaluation.comparison import interval
from clip_train.evaluation.text.tasks import load_embedded, things_of

MASKS = ("causal", "bidirectional")
STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in.py")))
GRID = """
name = "tiny-grid"
recipe = "recipe.toml"
seeds = [0, 1]
probes = ["text"]
headline = ["zeroshot/style/top1", "exp1", "exp2", "topics"]

[means.topics]
title = "what texts are about"
of = ["exp1/topic"]

[axes.mask]
causal = ["text.attention=causal"]
bidirectional = ["text.attention=bidirectional"]

[axes.pool]
eot = ["text.pool=eot"]
mean = ["text.pool=mean"]

[arms.tuned]
after = "causal-eot"
set = ["training.init={previous}"]

[comparisons.mask]
question = "Is looking back enough?"
first = ["bidirectional-eot", "bidirectional-mean"]
second = ["causal-eot", "causal-mean"]
expect = { exp1 = "first", exp2 = "second" }
control = ["pool", "learned"]

[comparisons.learned]
question = "Is anything learned?"
first = ["bidirectional-eot"]
second = ["causal-eot"]
expect = { topics = "first" }
control = ["pool"]

[comparisons.backwards]
question = "Is it the other way round?"
first = ["causal-eot"]
second = ["bidirectional-eot"]
expect = { topics = "second" }
control = ["backwards"]

[comparisons.pool]
question = "Is the mean better?"
first = ["causal-mean"]
second = ["causal-eot"]
expect = { exp1 = "first" }
"""


@pytest.fixture
def grid(tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]) -> Path:
    recipe_tree["evaluation"]["tasks"] = {  # what the stand-in makes of it is a classification
        "style": {"kind": "retrieval", "shards": recipe_tree["data"]["sources"]["s"]["shards"], "image": "png"}
    }
    write_recipe(recipe_tree)
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stand-ins say what they did; they leave empty files, and no report is drawn of them."""
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("STAND_IN_LOG", str(path))
    monkeypatch.setenv("STAND_IN_EMPTY", "1")
    monkeypatch.setattr(main, "write_table", lambda grid: None)
    monkeypatch.setattr(main, "write_report", lambda grid: (grid.out / "report.html").touch())
    return path


def run(grid: Path, *, jobs: int = 4, program: tuple[str, ...] = STAND_IN, **options: Any) -> int:
    chosen = {"budget": None, "share": None, "plan_only": False, "report_only": False, **options}
    return ablate(grid, grid.parent / "out", jobs=jobs, console=Console(quiet=True), program=program, **chosen)


def stages(log: Path) -> list[str]:
    return [f"{line.split()[0]} {Path(line.split()[1]).name}" for line in log.read_text().splitlines()]


def test_runs_what_is_missing_and_no_more(grid: Path, log: Path) -> None:
    assert run(grid) == 0
    first = stages(log)
    assert len(first) == len(set(first)) == 2 * 10
    assert first.index("train causal-eot-seed1") < first.index("train tuned-seed1")
    out = grid.parent / "out"
    (out / "cells/causal-eot-seed1/probe/text.json").unlink()
    (out / "cells/causal-mean-seed0/stages.json").unlink()
    assert run(grid) == 0
    again = stages(log)[len(first) :]
    assert sorted(again) == ["probe causal-eot-seed1", "probe causal-mean-seed0", "train causal-mean-seed0"]


def test_other_options_of_probes_probe_again(grid: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(grid) == 0
    before = len(stages(log))
    grid.write_text(GRID.replace("[means.topics]", "[probe]\nfinetune = true\n[means.topics]"))
    monkeypatch.setenv("STAND_IN_FAILS", "causal-eot")
    assert run(grid) == 1
    assert not (grid.parent / "out/cells/causal-eot-seed0/probe/text.json").exists(), (
        "figures of other options are gone"
    )
    monkeypatch.delenv("STAND_IN_FAILS")
    assert run(grid) == 0
    again = stages(log)[before:]
    assert len(again) == len(set(again)) == 10 and {line.split()[0] for line in again} == {"probe"}


def test_another_grid_in_the_folder_is_refused(grid: Path, log: Path) -> None:
    assert run(grid) == 0
    before = len(stages(log))
    grid.write_text(GRID.replace("text.pool=mean", "text.pool=map"))
    with pytest.raises(UserError, match=r"mean.*another recipe"):
        run(grid)
    assert len(stages(log)) == before


def test_a_failure_is_named_and_the_rest_goes_on(
    grid: Path, log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "causal-eot")
    code = ablate(
        grid, grid.parent / "out", budget=None, jobs=4, share=None, plan_only=False, report_only=False,
        console=Console(width=200), program=STAND_IN,
    )  # fmt: skip
    assert code == 1
    said = capsys.readouterr().out
    assert "failed causal-eot-seed0" in said
    assert "it broke" in said
    assert "tuned-seed1: comes after causal-eot-seed1" in said
    assert len(stages(log)) == 2 * 6
    monkeypatch.delenv("STAND_IN_FAILS")
    assert run(grid) == 0
    assert len(stages(log)) == 2 * 10


def test_shares_together_are_the_whole(grid: Path, log: Path) -> None:
    report = grid.parent / "out/report.html"
    for number in (1, 2, 3):
        assert not report.exists()
        assert run(grid, share=f"{number}/3") == 0
    assert len(stages(log)) == len(set(stages(log))) == 2 * 10
    assert report.exists(), "the last share writes it"


def test_a_lock_keeps_others_out_until_its_holder_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "cell/lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom pathlib import Path\nfrom clip_train.ablation.cells import Lock\n"
         "lock = Lock.take(Path(sys.argv[1]))\nprint(lock is not None, flush=True)\nsys.stdin.read()", str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    assert Lock.take(path) is None
    holder.kill()
    holder.wait()
    again = Lock.take(path)
    assert again is not None
    again.release()


def test_two_processes_share_the_work(grid: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_SECONDS", "0.2")
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=lambda: sys.exit(run(grid, jobs=2))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(240)
    assert [one.exitcode for one in both] == [0, 0]
    assert len(stages(log)) == len(set(stages(log))) == 2 * 10


@pytest.mark.timeout(600)
def test_a_cut_run_goes_on_with_real_training(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    """SIGTERM reaches the training, which saves and ends; the same command goes on from there."""
    recipe_tree["training"]["steps"] = 3000
    recipe_tree["checkpoint"]["every_steps"] = 5
    recipe = write_recipe(recipe_tree)
    grid = tmp_path / "grid.toml"
    grid.write_text('name = "cut"\nrecipe = "recipe.toml"\nseeds = [0]\n[arms.only]\n')
    command = [sys.executable, "-m", "clip_train", "ablate", str(grid), "--out", str(tmp_path / "out")]
    folder = tmp_path / "out/cells/only-seed0"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (folder / "checkpoints/latest").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 128 + signal.SIGTERM
    step = json.loads((folder / "checkpoints/latest/state.json").read_text())["step"]
    assert 0 < step < 3000
    assert json.loads((folder / "stages.json").read_text())["train"]["finished"] is False
    # Shorter, so that the test is: a run's length may change, the grid's note of the old recipe is taken away.
    recipe.write_text(recipe.read_text().replace("steps = 3000", f"steps = {step + 2}"))
    (folder / "stages.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "1 of 1" in done.stdout, done.stdout + done.stderr
    assert f"at step {step}" in (folder / "train.log").read_text()
    assert json.loads((folder / "checkpoints/latest/state.json").read_text())["step"] == step + 2


def test_plan_counts_and_measures(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"budget": None, "jobs": 1, "share": None, "plan_only": True, "report_only": False}
    assert ablate(grid, grid.parent / "out", console=Console(width=200), program=STAND_IN, **options) == 0  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "10 of 10 runs to go" in said
    assert f"{10 * 12:,} steps, {10 * 12 * 8:,} samples" in said
    timing = json.loads((grid.parent / "out/timing.json").read_text())
    assert timing["infonce"]["step"] == pytest.approx(8 / 100)
    assert not (grid.parent / "out/cells").exists()


def test_a_vocabulary_of_other_settings_is_refused(grid: Path, tmp_path: Path, log: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a red fox\na blue fox\n" * 50)
    text = GRID + f'\n[vocabulary]\ncaptions = "{captions}"\nsize = 530\n'
    grid.write_text(text)
    assert run(grid) == 0
    shutil.rmtree(tmp_path / "out/cells")
    grid.write_text(text.replace("530", "540"))
    with pytest.raises(ConfigError, match=r"vocabulary\.json was learned with .*530"):
        run(grid)


def test_items_about_one_thing_are_one_group() -> None:
    # Picture 0 has captions 0 and 1, picture 1 shares caption 1, picture 2 has caption 2 alone.
    images, captions = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
    a, b, c = results.groups_of_pairs(images, captions, "image_to_text").tolist()
    assert a == b != c
    assert results.groups_of_pairs(images, captions, "text_to_image").tolist() == [a, a, c]
    split = load_embedded("same_picture").splits["test"]
    things = things_of("exp2/same_picture/centred", len(split))
    assert things is not None and things.shape == (len(split), 2) and split.second is not None
    texts: dict[int, str] = {}
    for pair, numbers in zip(zip(split.first, split.second, strict=True), things.tolist(), strict=True):
        for text, number in zip(pair, numbers, strict=True):
            words = " ".join(sorted(text.split()))
            assert texts.setdefault(number, words) == words
    assert len(texts) == len({" ".join(sorted(text.split())) for text in [*split.first, *split.second]})
    near = things_of("exp2/same_picture_near", len(load_embedded("same_picture_near").splits["test"]))
    assert near is not None and set(near.flatten().tolist()) & texts.keys(), "tasks share what they ask about"
    topic = things_of("exp1/topic", len(load_embedded("topic").splits["test"]))
    assert topic is not None and topic.shape[1] == 1
    assert things_of("exp1/sentiment", 10) is None


def test_table_and_report(grid: Path) -> None:
    import pyarrow.parquet

    grid.write_text(GRID.replace("seeds = [0, 1]", "seeds = [0, 1, 2]"))
    assert run(grid) == 0
    out = grid.parent / "out"
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 * 8
    assert {row["axis_mask"] for row in rows if row["cell"] == "bidirectional-mean"} == {"bidirectional"}
    one = next(row for row in rows if (row["cell"], row["seed"], row["metric"]) == ("causal-eot", "1", "exp1/topic"))
    with np.load(out / "cells/causal-eot-seed1/probe/text.npz") as arrays:
        assert float(one["value"]) == pytest.approx(arrays["exp1/topic"].mean())
    assert (one["measure"], one["chance"], one["n"]) == ("accuracy", "0.5", "300")
    table = pyarrow.parquet.read_table(out / "table.parquet").to_pylist()
    assert [float(row["value"]) for row in rows] == [row["value"] for row in table]

    said = (out / "report.md").read_text()
    tests = [line.split(" | ") for line in said.splitlines() if line.startswith("| Is ")]
    assert len(tests) == 16
    assert all(line[6] == "3" for line in tests)
    by_question = {(line[0].strip("| "), line[2]): line for line in tests}
    # The stand-in's bidirectional cells are better, by how much is known; pools make no difference.
    mask = by_question["Is looking back enough?", "general text (exp. 1)"]
    hits = [
        [read_hits(out, f"{m}-{p}", s) for p in ("eot", "mean") for s in range(3)] for m in ("bidirectional", "causal")
    ]
    assert float(mask[3].split()[0]) == pytest.approx(100 * (np.mean(hits[0]) - np.mean(hits[1])) / 0.5, abs=0.06)
    assert mask[7].strip(" |") == "reproduced"
    cosines = by_question["Is looking back enough?", "vision-centric text (exp. 2)"]
    assert cosines[7].strip(" |") == "refuted"
    areas = [[area(out, f"{m}-{p}", s) for p in ("eot", "mean") for s in range(3)] for m in ("bidirectional", "causal")]
    assert float(cosines[3].split()[0]) == pytest.approx(100 * (np.mean(areas[0]) - np.mean(areas[1])) / 0.5, abs=0.06)
    assert by_question["Is the mean better?", "general text (exp. 1)"][7].strip(" |") == "undecided"
    assert by_question["Is anything learned?", "what texts are about"][7].strip(" |") == "not testable"
    # What is worse than untrained has learned nothing.
    assert by_question["Is it the other way round?", "what texts are about"][7].strip(" |") == "not testable"
    whole = results.Results(load_grid(grid, out))
    learned = whole.grid.file.comparisons["learned"]
    accurate, alike = (whole.difference(learned, f"exp1/{name}/finetuned") for name in ("topic", "mood"))
    assert accurate is not None and alike is not None
    for seed in range(3):
        with (
            np.load(out / f"cells/bidirectional-eot-seed{seed}/probe/text.npz") as one,
            np.load(out / f"cells/causal-eot-seed{seed}/probe/text.npz") as other,
        ):
            name = "exp1/topic/finetuned"
            assert accurate.by_seed[seed] == pytest.approx(one[name].mean() - other[name].mean(), abs=1e-6)
            first, second = (
                [
                    np.corrcoef(line, file["exp1/mood/finetuned:label"])[0, 1]
                    for line in file["exp1/mood/finetuned:score"]
                ]
                for file in (one, other)
            )
            assert alike.by_seed[seed] == pytest.approx(np.mean(first) - np.mean(second), abs=1e-6)
    assert accurate.items == alike.items == 300
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 2 * 5
    assert {path.stem for path in (out / "report").iterdir()} == {
        "headline", "heatmaps", "differences", "tasks", "learning",
    }  # fmt: skip


def test_held_out_losses_are_compared_over_seeds(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.stats import ttest_rel

    shards = recipe_tree["data"]["sources"]["s"]["shards"]
    recipe_tree["evaluation"]["tasks"] = {"held": {"kind": "language", "shards": shards}}
    recipe_tree["text"] |= {"pool": "mean", "attention": "bidirectional"}
    del recipe_tree["image"], recipe_tree["model"]
    write_recipe(recipe_tree | {"loss": {"kind": "mlm"}})
    monkeypatch.setattr(report, "draw_charts", lambda *_: {})
    path = tmp_path / "grid.toml"
    path.write_text("""
name = "losses"
recipe = "recipe.toml"
seeds = [0, 1, 2]
headline = ["language/held/loss", "language/held/perplexity"]
[arms.masked]
[arms.next]
set = ["text.attention=causal", "loss.kind=clm"]
[comparisons.c]
question = "Which is better?"
first = ["masked"]
second = ["next"]
""")
    assert run(path) == 0
    found = results.Results(load_grid(path, tmp_path / "out"))
    losses = {(row.cell, row.seed): row for row in found.rows if row.metric == "language/held/loss"}
    assert len(losses) == 6 and {row.n for row in losses.values()} == {1000}
    comparison = found.grid.file.comparisons["c"]
    difference = found.difference(comparison, "language/held/loss")
    assert difference is not None
    first, second = ([losses[name, seed].value for seed in range(3)] for name in ("masked", "next"))
    np.testing.assert_allclose(difference.by_seed, np.subtract(second, first))  # less is better
    assert interval(difference).p == pytest.approx(ttest_rel(first, second).pvalue)
    said = (tmp_path / "out/report.md").read_text()
    assert "Not measured" not in said and "over seeds alone" in said
    path.write_text(path.read_text().replace("seeds = [0, 1, 2]", "seeds = [0]"))
    one = results.Results(load_grid(path, tmp_path / "out"))
    assert one.difference(comparison, "language/held/loss") is None, "one seed tells nothing of others"
    assert "In no test" in " ".join(summary.limits(one, []))


def test_a_report_of_nothing_leaves_the_table_there(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no cell is finished"):
        run(grid, report_only=True)
    assert not (grid.parent / "out").exists()
    monkeypatch.setattr(main, "write_report", lambda grid: None)
    grid.write_text(GRID.replace("seeds = [0, 1]", "seeds = [0]"))
    assert run(grid) == 0
    table = (grid.parent / "out/table.csv").read_bytes()
    grid.write_text(grid.read_text().replace("seeds = [0]", "seeds = [7]"))
    with pytest.raises(ConfigError, match="no cell is finished"):
        run(grid, report_only=True)
    monkeypatch.setenv("STAND_IN_FAILS", ",".join(f"{m}-{p}" for m in MASKS for p in ("eot", "mean")))
    assert run(grid) == 1
    assert (grid.parent / "out/table.csv").read_bytes() == table


def read_hits(out: Path, cell: str, seed: int) -> float:
    with np.load(out / f"cells/{cell}-seed{seed}/probe/text.npz") as arrays:
        return float(np.mean([arrays["exp1/topic"].mean(), arrays["exp1/order"].mean()]))


def area(out: Path, cell: str, seed: int) -> float:
    """Of centred cosines, which comparisons are read from."""
    from sklearn.metrics import roc_auc_score  # pyright: ignore

    with np.load(out / f"cells/{cell}-seed{seed}/probe/text.npz") as arrays:
        return float(roc_auc_score(arrays["exp2/same/centred:label"], arrays["exp2/same/centred:score"]))
