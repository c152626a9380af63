"""From `[loss]` of a recipe to a model and an objective that fit each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from clip_train.config import schema as config
from clip_train.config.load import parse_recipe
from clip_train.errors import ConfigError
from clip_train.export.open_clip_keys import from_open_clip, to_open_clip
from clip_train.from_recipe.model import build_contrastive, build_tokenizer, build_two_tower
from clip_train.objectives.base import Features
from clip_train.objectives.contrastive import InfoNCE
from clip_train.objectives.sigmoid import Sigmoid


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_every_parameter_of_the_built_model_gets_a_gradient(recipe_tree: dict[str, Any], kind: str, impl: str) -> None:
    recipe_tree["loss"] = {"kind": kind, "impl": impl}
    recipe = parse_recipe(recipe_tree)
    assert isinstance(recipe.loss, config.InfoNCE | config.Sigmoid)
    tokenizer, objective = build_tokenizer(recipe), build_contrastive(recipe.loss)
    torch.manual_seed(0)
    model = build_two_tower(recipe, tokenizer)
    assert (model.logit_bias is not None) == (kind == "sigmoid")
    assert objective.impl == impl
    ids, lengths = tokenizer.encode_batch([f"{colour} square" for colour in ("red", "green", "blue")])
    image, text, *scalars = model(
        torch.randn(3, 3, 16, 16), torch.from_numpy(tokenizer.padded(ids, lengths)).long(), torch.from_numpy(lengths)
    )
    if kind == "sigmoid":
        assert isinstance(objective, Sigmoid)
        assert float(scalars[1].detach()) == -10.0
    else:
        assert isinstance(objective, InfoNCE)
    objective.loss(Features.local(image, text), *scalars).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_bias_travels_to_open_clip_and_back(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["loss"] = {"kind": "sigmoid", "init_logit_bias": -7.5}
    recipe = parse_recipe(recipe_tree)
    tokenizer = build_tokenizer(recipe)
    model = build_two_tower(recipe, tokenizer)
    peer = CLIP(
        embed_dim=8,
        vision_cfg=CLIPVisionCfg(image_size=16, patch_size=8, width=16, layers=1, head_width=8),
        text_cfg=CLIPTextCfg(tokenizer.context_length, tokenizer.vocab_size, width=16, heads=2, layers=1),
        init_logit_bias=0.0,
    )
    peer.load_state_dict(to_open_clip(model.state_dict()), strict=True)
    assert float(peer.state_dict()["logit_bias"]) == -7.5
    assert float(from_open_clip(peer.state_dict())["logit_bias"]) == -7.5


def test_keys_of_the_other_loss_are_refused(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["loss"] = {"kind": "infonce", "init_logit_bias": -10.0}
    with pytest.raises(ConfigError, match=r"unknown key 'loss\.init_logit_bias'"):
        parse_recipe(recipe_tree)
