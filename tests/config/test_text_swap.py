"""One line swaps a recipe's text tower, whatever the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clip_train.config.load import load_recipe, parse_recipe, set_values
from clip_train.config.schema import BertText
from clip_train.errors import ConfigError
from clip_train.from_recipe.model import build_model, build_text_tower
from tokenizer import BPETokenizer

RECIPES = sorted(Path("configs").glob("*.toml"))
KINDS = {
    "transformer": ["text.attention=bidirectional", "text.pool=mean"],
    "bert": ["text.kind=bert", "text.pool=mean"],
    "t5": ["text.kind=t5", "text.width=64", "text.layers=1"],
    "modern": ["text.kind=modern", "text.attention=bidirectional", "text.pool=max"],
}


@pytest.fixture(scope="module")
def vocabulary() -> BPETokenizer:
    return BPETokenizer.default()


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_bidirectional_and_mean_on_every_recipe(path: Path, vocabulary: BPETokenizer) -> None:
    before = load_recipe(path)
    if getattr(before, "image", None) is None or before.text.kind != "transformer":
        pytest.skip("this recipe has another text tower, or no pictures")
    after = load_recipe(path, ["text.attention=bidirectional", "text.pool=mean"])
    unlike = {"attention": "bidirectional", "pool": "mean"}
    assert after == before.model_copy(update={"text": before.text.model_copy(update=unlike)})
    with torch.device("meta"):
        tower = build_text_tower(after, vocabulary)
    assert (tower.causal, tower.pool, tower.width) == (False, "mean", before.text.width)
    with torch.device("meta"):
        other = build_text_tower(before, vocabulary)
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    assert {name: parameter.shape for name, parameter in tower.named_parameters()} == shapes


@pytest.mark.parametrize("kind", list(KINDS))
def test_another_kind_of_tower(kind: str, vocabulary: BPETokenizer) -> None:
    recipe = load_recipe("debug", KINDS[kind])
    assert recipe.text.kind == kind
    with torch.device("meta"):
        assert build_model(recipe, vocabulary).text.pool == recipe.text.pool


@pytest.mark.parametrize("kind", ["bert", "t5", "modern"])
def test_another_kind_is_of_the_same_size_and_keeps_what_was_given_beside_it(kind: str) -> None:
    before = load_recipe("debug")
    size = (before.text.width, before.text.layers, before.text.heads)
    first, last = (load_recipe("debug", sets) for sets in (
        [f"text.kind={kind}", "text.pool=max"], ["text.pool=max", f"text.kind={kind}"]
    ))  # fmt: skip
    assert first == last
    assert (first.text.width, first.text.layers, first.text.heads) == size
    assert first.text.pool == "max"
    # What only the old kind knows is refused, not dropped.
    with pytest.raises(ConfigError, match="padding"):
        load_recipe("debug", ["text.padding=attended", f"text.kind={kind}"])


def test_what_is_given_of_a_table_as_a_whole_stays_before_its_parts() -> None:
    task = ["evaluation.tasks.held.kind=retrieval", "evaluation.tasks.held.shards=embedded:pictograms/train-000000.tar"]
    recipe = load_recipe("debug", ["evaluation.tasks=none", *task, "evaluation.tasks.held.image=webp"])
    assert list(recipe.evaluation.tasks) == ["held"]
    assert load_recipe("debug", ["text.kind=t5", "text.pool=max", "text.kind=bert"]).text.kind == "bert"
    assert load_recipe("debug", ['text={kind="t5", width=64}', "text.kind=bert"]).text.kind == "bert"


def test_to_transformers_and_back_no_size_is_carried_along() -> None:
    there = ["text.kind=transformers", "text.name=bert"]
    assert load_recipe("debug", there).text.kind == "transformers"
    again = set_values(load_recipe("debug", there), ["text.kind=bert"])
    assert again.text == BertText()


def test_an_own_kind_named_again_keeps_the_sizes() -> None:
    assert load_recipe("debug", ["text.kind=transformer"]) == load_recipe("debug")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text.pool=cls"], "attention='causal' contradicts pool='cls'"),
        (["text.padding=attended"], "padding='attended' contradicts attention='causal'"),
        (["text.kind=transformers"], "give either name"),
        (
            ["text.kind=t5", "text.width=64", "text.heads=6", "text.head_dim=8", "text.pool=map"],
            "heads that divide the width: 6 do not divide 64",
        ),
        (["text.kind=modern", "text.pool=cls"], "attention='causal' contradicts pool='cls'"),
    ],
)
def test_contradictions_are_refused_before_anything_is_trained(
    overrides: list[str], message: str, vocabulary: BPETokenizer
) -> None:
    recipe = load_recipe("debug", overrides)
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build_model(recipe, vocabulary)


def test_keys_of_another_kind_are_named_by_the_users_key(recipe_tree: dict[str, dict[str, object]]) -> None:
    recipe_tree["text"] = {"kind": "bert", "attention": "causal"}
    with pytest.raises(ConfigError, match=r"unknown key 'text\.attention'"):
        parse_recipe(recipe_tree)
    recipe_tree["text"] = {"kind": "gpt"}
    with pytest.raises(ConfigError, match="'transformer', 'bert', 't5', 'modern', 'transformers'"):
        parse_recipe(recipe_tree)
