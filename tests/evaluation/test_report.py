from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from clip_train.config.schema import Retrieval, ZeroShot
from clip_train.errors import UserError
from clip_train.evaluation import plots
from clip_train.evaluation.page import STYLE
from clip_train.evaluation.report import write_report
from clip_train.evaluation.run import evaluate

from .colours import COLOURS, captioned, classified, loaded

RECIPE = """name = "colours"
description = "Colours & their <b>names</b>"

[data]
batch_size = 32

[data.sources.paint]
shards = "{shards}"
image = "png"
caption = "json.captions"

[evaluation.tasks.seen]
kind = "zeroshot"
"""


def test_no_rule_of_the_style_sheet_undoes_another() -> None:
    plain = re.sub(r"/\*.*?\*/", "", STYLE, flags=re.DOTALL)
    # In print and on dark screens rules are meant to differ.
    plain = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", plain)
    selectors = [" ".join(one.split()) for one in re.findall(r"([^{}]+)\{", plain)]
    assert len(selectors) > 20
    assert [one for one in set(selectors) if selectors.count(one) > 1] == []


class Page(HTMLParser):
    """What a browser would fetch or run, which sections there are, the text, and tags left open."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.links.append(value or "")
            if tag == "section" and name == "id":
                self.sections.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are composed but not painted, which is what takes the time."""
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "PNG")
    monkeypatch.setattr(plots, "png", lambda *_, **__: dot.getvalue())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with all its parts."""
    names = list(COLOURS)
    classified(tmp_path / "z.tar", [(c, c if i % 3 else names[-1 - i % 6]) for i, c in enumerate(names * 4)])
    train = captioned(tmp_path / "r.tar", [(c, [c, f"a {c} <script>alert(1)</script>"]) for c in names * 2])
    (tmp_path / "classes.txt").write_text("\n".join(names))
    run_dir = tmp_path / "run"
    tasks = {
        "seen": ZeroShot(shards="z.tar", classes="classes.txt"),
        "words": Retrieval(shards="r.tar", caption="json.captions"),
    }
    for step in (10, 30):
        evaluate(loaded(), tasks, relative_to=tmp_path, run_dir=run_dir, step=step)
    (run_dir / "recipe.toml").write_text(RECIPE.format(shards=train))
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, 31):
            line = {"step": step, "loss": 3 - step / 20, "logit_scale": 14, "samples_per_second": 100, "data_wait": 0.1}
            file.write(json.dumps(line | {"grad_norm": 1.0, "lr": 1e-3, "mfu": 0.3, "batch": "x"}) + "\n")
    return run_dir


def test_every_section_is_there_and_nothing_comes_from_elsewhere(run_dir: Path) -> None:
    out = write_report(run_dir)
    assert out == run_dir / "report.html"
    source = out.read_text(encoding="utf-8")
    page = Page(source)
    assert page.sections == [
        "accuracy",
        "names-seen",
        "pictures-for-words-words",
        "words-for-pictures-words",
        "confusions-seen",
        "curves",
        "data",
        "figures",
        "recipe",
        "environment",
    ]
    assert not page.open
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", source)
    assert "alert(1)" in page.words  # captions are shown, not run
    assert "Colours & their <b>names</b>" in page.words
    top1 = json.loads((run_dir / "eval.json").read_text())["zeroshot/seen/top1"]
    assert f"{100 * top1:.1f} % of 6 concepts" in page.words
    assert "batch_size = 32" in page.words
    for link in set(page.links):  # and every picture in it is whole
        with Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2], validate=True))) as image:
            image.load()
    written = {path.stem for path in (run_dir / "report").glob("*.png")}
    assert written == {
        "accuracy",
        "accuracy_over_training",
        "confusions_seen",
        "curves",
        "data",
        "names_seen",
        "retrieval_words",
    }


@pytest.mark.parametrize(
    ("gone", "note"),
    [
        ("eval.json", "was not evaluated"),
        ("metrics.jsonl", "no curves"),
        ("recipe.toml", "no recipe.toml"),
        ("../z.tar", "Pictures are missing"),
        ("../r.tar", "Samples of source 'paint'"),
        ("evals.jsonl eval/seen.npz", None),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_is_left_out_with_a_note(run_dir: Path, gone: str, note: str | None) -> None:
    for name in gone.split():
        (run_dir / name).unlink()
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert not page.open
    assert ("notes" in page.sections) == (note is not None)
    assert note is None or note in page.words


@pytest.mark.usefixtures("undrawn")
def test_shards_that_moved_are_found_by_their_patterns(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = write_report(run_dir).read_bytes()
    elsewhere = run_dir.parent / "elsewhere"
    elsewhere.mkdir()
    (run_dir.parent / "z.tar").rename(elsewhere / "z.tar")
    monkeypatch.chdir(elsewhere)
    assert write_report(run_dir).read_bytes() == drawn


@pytest.mark.usefixtures("undrawn")
def test_damaged_parts_are_left_out_with_a_note(run_dir: Path) -> None:
    (run_dir / "eval" / "seen.npz").write_bytes(b"PK\x03\x04 not a zip")
    (run_dir / "recipe.toml").write_text("name = ")
    (run_dir / "eval.json").write_text("[1, 2]")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": NaN}\n{"step": 32, "lo')
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "seen.npz cannot be read" in page.words
    assert "recipe.toml cannot be read" in page.words
    assert "eval.json cannot be read" in page.words
    assert "1 line(s) of metrics.jsonl" in page.words


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_only_just_began(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": math.log(32)}) + "\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.sections == ["curves", "environment", "notes"]


def test_steps_that_a_resumed_run_repeats_count_once(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 4.0}, {"step": 3, "loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    from clip_train.evaluation.run_folder import read_run

    steps, loss = read_run(tmp_path).curves["loss"]
    assert (steps.tolist(), loss.tolist()) == ([1, 2, 3], [5, 4, 3])


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_stands_for_its_run(run_dir: Path) -> None:
    of_run = write_report(run_dir).read_bytes()
    checkpoint = run_dir / "checkpoints" / "step_30"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "recipe.toml").write_text("")
    of_checkpoint = write_report(checkpoint)
    assert of_checkpoint.resolve() == (run_dir / "report.html").resolve()
    assert of_checkpoint.read_bytes() == of_run  # and nothing in it depends on when it is written


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.usefixtures("undrawn")
def test_arrays_that_hold_objects_are_not_unpickled(run_dir: Path) -> None:
    import numpy as np

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("a report ran code from a file",))

    np.savez(run_dir / "eval" / "seen.npz", predictions=np.array([Bomb()], dtype=object))
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "seen.npz cannot be read" in page.words
