"""Expansion of grids, and what is refused before anything is trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_train.ablation.cells import share_of, stages
from clip_train.ablation.grid import Grid, load_grid
from clip_train.ablation.grid_file import Probe
from clip_train.ablation.main import check, part_of
from clip_train.cli import main
from clip_train.config import load_recipe
from clip_train.errors import ConfigError, UserError
from clip_train.evaluation.text.commands import add_arguments
from clip_train.evaluation.text.finetune import Settings

GRID = """
name = "tiny-grid"
recipe = "recipe.toml"
seeds = [0, 1]
headline = ["exp1"]
exclude = [{ mask = "causal", pool = "cls" }]

[axes.mask]
causal = ["text.attention=causal"]
bidirectional = ["text.attention=bidirectional"]

[axes.pool]
eot = ["text.pool=eot"]
cls = ["text.pool=cls"]

[arms.again]
levels = { mask = "bidirectional" }
set = ["text.pool=cls"]

[arms.tuned]
after = "again"
set = ["training.init={previous}"]

[budgets.small]
set = ["training.steps=3"]
seeds = [7]
cells = ["causal-*", "tuned"]
"""


@pytest.fixture
def grid_of(tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]) -> Callable[..., Grid]:
    """The grid above, or one that differs from it by a replacement."""
    write_recipe(recipe_tree)

    def make(old: str = "", new: str = "", budget: str | None = None, probes: str | None = None) -> Grid:
        """With `probes`: text probes, and what is given beside them."""
        assert old in GRID
        path = tmp_path / "grid.toml"
        text = (
            GRID if probes is None else GRID.replace("seeds = [0, 1]", f'seeds = [0, 1]\nprobes = ["text"]\n{probes}')
        )
        path.write_text(text.replace(old, new) if old else text)
        return load_grid(path, tmp_path / "out", budget)

    return make


def test_product_arms_and_seeds(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    grid = grid_of()
    assert [cell.id for cell in grid.cells if cell.seed == 1] == [
        f"{name}-seed1" for name in ("causal-eot", "bidirectional-eot", "bidirectional-cls", "again", "tuned")
    ]
    for cell in grid.cells:
        assert cell.recipe.training.seed == cell.seed
    cell = grid.cell("bidirectional-cls-seed0")
    overrides = ["text.attention=bidirectional", "text.pool=cls", "name=bidirectional-cls", "training.seed=0"]
    assert cell.recipe == load_recipe(tmp_path / "recipe.toml", overrides)
    assert cell.levels == {"mask": "bidirectional", "pool": "cls"}


def test_equal_cells_run_once_and_chains_hand_on(grid_of: Callable[..., Grid]) -> None:
    grid = grid_of()
    assert grid.cell("again-seed0").same_as == "bidirectional-cls-seed0"
    assert grid.folder("again-seed0") == grid.folder("bidirectional-cls-seed0")
    tuned = grid.cell("tuned-seed1")
    assert tuned.after == "bidirectional-cls-seed1"
    assert tuned.recipe.training.init == str(grid.folder("bidirectional-cls-seed1"))
    assert len({cell.key for cell in grid.runs}) == len(grid.runs) == 8


def test_hash_knows_what_came_before_and_not_where(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    keys = {cell.id: cell.key for cell in grid_of().cells}
    elsewhere = load_grid(tmp_path / "grid.toml", tmp_path / "other")
    assert keys == {cell.id: cell.key for cell in elsewhere.cells}
    longer = grid_of('set = ["text.pool=cls"]', 'set = ["text.pool=cls", "training.steps=5"]')
    changed = [cell.id for cell in longer.cells if cell.key != keys[cell.id]]
    assert changed == ["again-seed0", "tuned-seed0", "again-seed1", "tuned-seed1"]


def test_a_grid_without_a_generator_leaves_experiment_3_out(
    grid_of: Callable[..., Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, pictures = grid_of(probes=""), grid_of(probes='generator = "small"')
    other = tmp_path / "runs/generator"  # of other work, in the folder that both are run from
    other.mkdir(parents=True)
    (other / "generator.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for grid, drawn in ((plain, None), (pictures, str(grid_of().out / "generator"))):
        command = stages(grid, grid.cells[0])[1].command
        with monkeypatch.context() as patched:
            asked = probed_with(list(command), patched)
        assert asked["generator"] == drawn
        assert {name.split("/")[0] for name in asked["tasks"]} == {"exp1", "exp2"}


def test_a_probe_table_is_what_the_command_is_given(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    def probing(table: str, generator: str = "") -> Grid:
        return grid_of("[axes.mask]", f"[probe]\n{table}\n[axes.mask]" if table else "[axes.mask]", probes=generator)

    def asked(grid: Grid) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patched:
            return probed_with(list(stages(grid, grid.cells[0])[1].command), patched)

    plain, tuned = (
        probing(""),
        probing('finetune = true\nseeds = 2\nlr = 1e-4\ntasks = ["exp1/topic"]\ndevice = "cuda:1"'),
    )
    assert asked(tuned) == {
        "tasks": ["exp1/topic"], "finetune": Settings(epochs=3, lr=1e-4, seeds=2), "device": "cuda:1", "generator": None
    }  # fmt: skip
    drawn = probing('tasks = ["exp2/keywords"]', 'generator = "small"')
    assert asked(drawn)["tasks"] == ["exp2/keywords"] and asked(drawn)["generator"] == str(drawn.out / "generator")

    def keys(grid: Grid) -> list[str]:
        return [stage.key for stage in stages(grid, grid.cells[0])]

    key = plain.cells[0].key
    assert keys(plain) == keys(probing("# none\nfinetune = false")) == [key, key]
    assert keys(probing("", 'generator = "small"')) == [key, f"{key}-small"], "finished cells stay finished"
    others = [keys(tuned), keys(drawn), keys(probing("finetune = true")), keys(probing("finetune = true\nlr = 1e-4"))]
    assert {train for train, _ in others} == {key} and len({probe for _, probe in others} | {key}) == 5

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, field in Probe.model_fields.items():
        default = parser.get_default(name)
        assert (default or []) == field.default if name == "tasks" else default == field.default, name


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("epoch = 2", "unknown key 'probe.epoch'. Did you mean epochs"),
        ("epochs = 2", "epochs does nothing without finetune"),
        ("glue_limit = 2", "glue_limit does nothing without glue"),
        ('device = "gpu"', "'probe.device'"),
        ('tasks = ["exp3"]', "`generator`"),
        ('tasks = ["exp1/topics"]', r"\[probe\].*'exp1/topics'; nearest: exp1/topic"),
        ('sentiment = "gone"', r"\[probe\].*gone"),
        ('glue = "gone:cola"', r"\[probe\].*gone: there is no such folder"),
    ],
)
def test_probe_tables_that_cannot_be(grid_of: Callable[..., Grid], table: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(grid_of("[axes.mask]", f"[probe]\n{table}\n[axes.mask]", probes="\n"))
    with pytest.raises(UserError, match="there are no probes"):
        grid_of("[axes.mask]", "[probe]\nfinetune = true\n[axes.mask]")


def probed_with(command: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a probe's command would measure, and with which generator."""
    asked: dict[str, Any] = {}

    def suite(encoder: object, tasks: Any, *, finetune: Any, pictures: Any, advance: object) -> list[Any]:
        asked.update(tasks=[f"{experiment}/{task.name}" for experiment, task in tasks], finetune=finetune)
        asked.update(generator=None if pictures is None else pictures.generator)
        return []

    monkeypatch.setattr("clip_train.evaluation.text.suite.run_suite", suite)
    monkeypatch.setattr("clip_train.evaluation.text.suite.save_suite", lambda *_: "")
    monkeypatch.setattr(
        "clip_train.evaluation.text.encoder.open_encoder", lambda path, device, weights: asked.update(device=device)
    )
    monkeypatch.setattr("clip_train.evaluation.text_to_image.generator.load_generator", str)
    assert main(command) == 0
    return asked


def test_a_budget_takes_part_of_it_with_what_that_needs(grid_of: Callable[..., Grid]) -> None:
    grid = grid_of(budget="small")
    assert [cell.id for cell in grid.cells] == ["causal-eot-seed7", "again-seed7", "tuned-seed7"]
    assert {cell.steps for cell in grid.cells} == {3}


def test_shares_are_a_partition_that_keeps_chains(grid_of: Callable[..., Grid]) -> None:
    runs = grid_of().runs
    for count in (1, 2, 3, 20):
        parts = [share_of(runs, number, count) for number in range(1, count + 1)]
        assert sorted(cell.id for part in parts for cell in part) == sorted(cell.id for cell in runs)
        for part in parts:
            ids = [cell.id for cell in part]
            assert all(cell.after is None or cell.after in ids[: ids.index(cell.id)] for cell in part)
    assert max(len(share_of(runs, number, 2)) for number in (1, 2)) <= 5
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="I/N"):
            part_of(runs, wrong)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seeds = [0, 1]", "sedes = [0, 1]", "unknown key 'sedes'. Did you mean seeds"),
        ("after = ", "afer = ", "Did you mean after"),
        ("exclude = [{ mask", "exclude = [{ musk", "unknown axis 'musk'. Did you mean mask"),
        ('{ mask = "causal",', '{ mask = "casual",', "no level 'casual'. Did you mean causal"),
        ('after = "again"', 'after = "agian"', "no cell 'agian'. Did you mean again"),
        ('after = "again"', 'after = "tuned"', "circle: tuned → tuned"),
        ('after = "again"\n', "", r"no `after` that says which"),
        ('cells = ["causal-*", "tuned"]', 'cells = ["masked-*"]', r"no cell 'masked-\*'"),
        ("text.pool=eot", "text.pol=eot", "cell 'causal-eot'.*unknown key"),
        ("[arms.again]", "[arms.causal-eot]", "called as a combination"),
        ("[budgets.small]", "[budgets.tiny]", "no budget 'small'"),
        ('recipe = "recipe.toml"', 'recipe = "recip.toml"', "no recipe"),
        ("training.steps=3", "training.epochs=1", "equal steps"),
        (
            "[budgets.small]",
            '[comparisons.c]\nquestion = "?"\nfirst = ["again"]\nsecond = ["tuned", "again"]\n[budgets.small]',
            "as many of both",
        ),
        (
            "[budgets.small]",
            '[comparisons.c]\nquestion = "?"\nfirst = ["again"]\nsecond = ["tuned"]\ncontrol = ["d"]\n[budgets.small]',
            "no control 'd'",
        ),
        (
            "[budgets.small]",
            '[comparisons.c]\nquestion = "?"\nfirst = ["again"]\nsecond = ["tuned"]\nexpect = { exp = "first" }\n'
            "[budgets.small]",
            "expect speaks of 'exp'. Did you mean exp1",
        ),
        ('headline = ["exp1"]', 'headline = ["exp3"]', "no mean: name exp3/caption"),
        (
            "[budgets.small]",
            '[means.exp1]\ntitle = "x"\nof = ["exp1/topic"]\n[budgets.small]',
            "called as an experiment",
        ),
        ("[budgets.small]", '[means.a]\ntitle = "x"\nof = ["exp1/topic"]\n[budgets.small]', "not in headline"),
        (
            'headline = ["exp1"]',
            'headline = ["exp1", "a"]\nmeans = { a = { title = "x", of = ["exp1/topics"] } }',
            "no task 'topics' in exp1. Did you mean topic",
        ),
    ],
)
def test_what_cannot_be_is_refused(grid_of: Callable[..., Grid], old: str, new: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        grid_of(old, new, budget="small")


def test_contradictions_are_found_before_training(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    grid = grid_of('exclude = [{ mask = "causal", pool = "cls" }]', "")
    with pytest.raises(UserError, match=r"cell 'causal-cls'.*cls"):
        check(grid)
    assert not (tmp_path / "out").exists()


def test_losses_and_beginnings_are_checked_before_training(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    merges = tmp_path / "merges.txt"  # as OpenAI's vocabulary: no mask token
    merges.write_text("#version: 0.2\n" + "".join(f"{a} {b}</w>\n" for a in "abcdefgh" for b in "abcdefgh"))
    masked = '"loss.kind=mlm", "image=none", "model=none", "evaluation.tasks=none", "text.pool=mean"'
    last = '[arms.tuned]\nafter = "again"\nset = ["training.init={previous}"]'
    assert last in GRID
    text = '[arms.tuned]\nlevels = {{ mask = "bidirectional" }}\nset = [{}]'
    grid = grid_of(last, text.format(f'{masked}, "tokenizer.path={merges}"'))
    with pytest.raises(ConfigError, match=r"cell 'tuned'.*mask token"):
        check(grid)
    check(grid_of(last, text.format(masked)))
    check(grid_of())  # {previous} is not there yet
    check(grid_of("training.init={previous}", "tokenizer.path={previous}/checkpoints/latest/tokenizer.json"))
    for key in ("init", "init_text", "init_image"):
        grid = grid_of(last, text.format(f'"text.pool=cls", "training.{key}=runs/gone"'))
        with pytest.raises(ConfigError, match=rf"cell 'tuned'.*training.{key} = .*runs/gone"):
            check(grid)
    with pytest.raises(ConfigError, match=r"cell 'tuned'.*gone\.json"):
        check(grid_of(last, text.format('"text.pool=cls", "tokenizer.path=gone.json"')))


def test_shipped_grid_is_whole() -> None:
    grid = load_grid(Path(__file__).parents[2] / "configs/ablations/text-tower.toml", Path("runs/none"))
    names = {cell.name for cell in grid.cells}
    product = {f"{mask}-{pool}" for mask in ("causal", "bidirectional") for pool in ("eot", "mean", "max", "map")}
    assert product < names
    assert {"bidirectional-cls", "mlm", "clm", "random-causal", "random-bidirectional"} < names
    assert len({cell.seed for cell in grid.cells}) == 3
    one_seed = [cell for cell in grid.cells if cell.seed == 0 and cell.name in product]
    alike = {cell.recipe.model_dump_json(exclude={"name": True, "text": {"attention", "pool"}}) for cell in one_seed}
    assert len(alike) == 1, "the cells of the product differ by mask and pool alone"
