"""Sizes by step, and captions cut to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clip_train.config.load import parse_recipe
from clip_train.config.schema import Recipe
from clip_train.data.stages import Shortened, Stage, stage_at
from clip_train.errors import ConfigError
from clip_train.from_recipe.data import build_stream
from clip_train.from_recipe.model import build_tokenizer


class Letters:
    """SOT 1, letters, EOT 2."""

    def encode_counting_cuts(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        coded = [[1, *(ord(letter) for letter in text), 2] for text in texts]
        return np.concatenate(coded).astype(np.int32), np.array([len(one) for one in coded], dtype=np.int32), 0


def test_a_stage_is_a_function_of_the_step() -> None:
    stages = [Stage(3, 16, 8), Stage(5, 24, 8)]
    assert [stage_at(stages, step) for step in range(7)] == [*stages[:1] * 3, *stages[1:] * 2, None, None]


def test_long_captions_keep_their_beginning_and_their_end() -> None:
    ids, lengths, cut = Shortened(Letters(), 4).encode_counting_cuts(["", "ab", "abc", "abcdef"])
    assert cut == 2
    assert lengths.tolist() == [2, 4, 4, 4]
    assert ids.tolist() == [1, 2, 1, 97, 98, 2, 1, 97, 98, 2, 1, 97, 98, 2]


def staged(tree: dict[str, Any], *stages: dict[str, int]) -> Recipe:
    tree["training"]["stages"] = list(stages)
    return parse_recipe(tree)


def test_the_stream_gives_a_stages_sizes_and_the_same_samples(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["data"]["augment"] = {"crop_scale": [0.5, 1.0], "flip": 0.5, "color": {"brightness": 0.3}}
    recipe_tree["data"]["sources"]["s"]["augment"] = {"crop_scale": [0.3, 1.0]}
    full = parse_recipe(recipe_tree)
    recipe = staged(recipe_tree, {"until_step": 2, "image_size": 8, "context_length": 4})
    tokenizer = build_tokenizer(recipe)
    stream, plain = build_stream(recipe, tokenizer), build_stream(full, tokenizer)
    recipe_tree["image"]["image_size"] = 8
    small = build_stream(staged(recipe_tree), tokenizer)
    for step in range(4):
        batch, expected = stream[step], (small if step < 2 else plain)[step]
        assert torch.equal(batch.images, expected.images)
        assert batch.keys == expected.keys
        assert batch.digest_part() == plain[step].digest_part()
        assert int(batch.lengths.max()) == (4 if step < 2 else int(plain[step].lengths.max()))
        assert batch.ids[-1] == tokenizer.eot
        assert len(batch.ids) == batch.lengths.sum()
    assert int(plain[0].lengths.max()) > 4


@pytest.mark.parametrize(
    ("stages", "image", "message"),
    [
        ([{"until_step": 4}], {}, "changes nothing"),
        ([{"until_step": 12, "image_size": 8}], {}, "end before 12"),
        ([{"until_step": 4, "image_size": 8}, {"until_step": 4, "image_size": 8}], {}, "longer than 0 steps"),
        ([{"until_step": 4, "image_size": 12}], {}, "image_size = 12 is not a multiple of image.patch_size = 8"),
        ([{"until_step": 4, "image_size": 24}], {}, "up to image.image_size = 16"),
        ([{"until_step": 4, "image_size": 8}], {"kind": "timm", "name": "resnet10t", "image_size": 32}, "'timm' takes"),
    ],
)
def test_stages_that_cannot_be_are_refused(
    recipe_tree: dict[str, Any], stages: list[dict[str, int]], image: dict[str, Any], message: str
) -> None:
    if image:
        recipe_tree["image"] = image
    with pytest.raises(ConfigError, match=message):
        staged(recipe_tree, *stages)


def test_a_stages_captions_are_no_longer_than_the_runs(recipe_tree: dict[str, Any]) -> None:
    recipe = staged(recipe_tree, {"until_step": 2, "context_length": 100})
    with pytest.raises(ConfigError, match="context_length = 100 is above the run's own, 76"):
        build_stream(recipe, build_tokenizer(recipe))
