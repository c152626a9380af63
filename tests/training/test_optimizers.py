"""LAMB and Lion beside timm's, layer-wise learning rates beside multipliers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim.lamb import Lamb
from timm.optim.lion import Lion
from torch import Tensor, nn

from clip_train.config import load_recipe
from clip_train.errors import ConfigError
from clip_train.from_recipe.model import build_tokenizer, build_two_tower
from clip_train.from_recipe.update import build_optimizer
from clip_train.models.resnet import ModifiedResNet
from clip_train.training import optimizer as optimizers
from clip_train.training.layer_decay import layers_of
from clip_train.training.optimizer import decay_groups, load_named_state, named_state

WriteRecipe = Callable[..., Path]


class Model(nn.Module):
    """One tensor of each kind: a matrix, one that starts at zero, a vector and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 7, generator=generator))
        self.zero = nn.Parameter(torch.zeros(3, 4))
        self.bias = nn.Parameter(torch.randn(7, generator=generator))
        self.scale = nn.Parameter(torch.tensor(2.7))


def gradients(step: int, model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def build(kind: str, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {"no_decay": set(), "lr": 0.01, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.1}
    arguments |= more if kind == "lion" else {"eps": 1e-6, **more}
    return getattr(optimizers, kind)(model.named_parameters(), **arguments)


@pytest.mark.parametrize("kind", ["lamb", "lion"])
def test_steps_are_timms(kind: str) -> None:
    ours, theirs = Model(), Model()
    optimizer = build(kind, ours)
    groups = decay_groups(theirs.named_parameters(), 0.1, set())
    reference: torch.optim.Optimizer = (
        Lamb(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6, max_grad_norm=None, foreach=False)
        if kind == "lamb"
        else Lion(groups, lr=0.01, betas=(0.9, 0.98), foreach=False)
    )
    for step in range(6):
        for each in (optimizer, reference):
            for group in each.param_groups:
                group["lr"] = 0.01 / (1 + step)
        gradients(step, ours)
        gradients(step, theirs)
        optimizer.step()
        reference.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name, step=step: f"{name}, step {step}: {text}")
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(ours.parameters(), Model().parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "lamb", "lion", "muon"])
def test_state_goes_on_by_name_in_groups_of_another_order(kind: str) -> None:
    """Saved without layer-wise rates, so in other groups: the state finds its parameters."""
    extra = {"momentum": 0.9, "embeddings": set()} if kind == "muon" else {}
    model, other = Model(), Model()
    optimizer = build(kind, model, **extra)
    for step in range(3):
        gradients(step, model)
        optimizer.step()
    saved = {name: value.clone() for name, value in named_state(optimizer, model).items()}
    other.load_state_dict(model.state_dict())
    again = build(kind, other, lr_scales={"zero": 0.5, "scale": 0.25}, **extra)
    load_named_state(again, other, saved)
    for name, value in named_state(again, other).items():
        assert torch.equal(value, saved[name]), name
    gradients(9, model)
    gradients(9, other)
    optimizer.step()
    again.step()  # its learning rates are those of its construction, the same
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def rates(
    recipe_tree: dict[str, Any], write_recipe: WriteRecipe, *overrides: str
) -> tuple[nn.Module, dict[str, float]]:
    recipe = load_recipe(str(write_recipe(recipe_tree)), overrides)
    model = build_two_tower(recipe, build_tokenizer(recipe))
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(recipe, model).param_groups
    return model, {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}


def test_layer_decay_by_hand(recipe_tree: dict[str, Any], write_recipe: WriteRecipe) -> None:
    recipe_tree["image"] = {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 3, "heads": 2}
    recipe_tree["text"] = {"width": 16, "layers": 1, "heads": 2}
    overrides = ("optimizer.layer_decay.image=0.5", "optimizer.layer_decay.text=0.9")
    model, found = rates(recipe_tree, write_recipe, *overrides)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    expected = {
        "image.class_embedding": 0.5**4,
        "image.positional_embedding": 0.5**4,
        "image.patch_embedding.weight": 0.5**4,
        "image.pre_norm.weight": 0.5**4,
        "image.blocks.0.attention.qkv.weight": 0.5**3,
        "image.blocks.1.mlp.down.bias": 0.5**2,
        "image.blocks.2.mlp_norm.weight": 0.5,
        "image.post_norm.weight": 1.0,
        "image_projection.weight": 1.0,
        "text.token_embedding.weight": 0.9**2,
        "text.positional_embedding": 0.9**2,
        "text.blocks.0.attention.out.weight": 0.9,
        "text.final_norm.bias": 1.0,
        "text_projection.weight": 1.0,
        "logit_scale": 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    for kind in ("adamw", "lamb", "lion", "muon"):
        _, both = rates(recipe_tree, write_recipe, f"optimizer={{kind='{kind}', lr=1e-3, layer_decay=0.5}}")
        assert both["image.blocks.0.attention.qkv.weight"] == 0.125
        assert both["text.token_embedding.weight"] == 0.25


def test_layers_of_a_resnet() -> None:
    tower = ModifiedResNet(image_size=32, layers=(1, 2, 1, 1), width=8, heads=4)
    layers, last = layers_of(tower)
    assert last == 6
    assert layers["conv1.weight"] == layers["bn3.bias"] == 0
    assert [layers[f"stages.{stage}.{block}.conv1.weight"] for stage, block in ((0, 0), (1, 0), (1, 1), (3, 0))] == [
        1,
        2,
        3,
        5,
    ]
    assert layers["attention_pool.query.weight"] == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.layer_decay=1.0", "less than 1"),
        ("optimizer.layer_decay.image=1.0", "decays nothing"),
        ("optimizer={kind='lion', lr=1e-4, eps=1e-6}", "eps"),
        ("optimizer={kind='lamb', lr=1e-3, momentum=0.9}", "momentum"),
    ],
)
def test_what_does_not_act_is_refused(
    recipe_tree: dict[str, Any], write_recipe: WriteRecipe, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(write_recipe(recipe_tree)), [override])


@pytest.mark.parametrize("kind", ["lamb", "muon"])
def test_what_needs_whole_tensors_is_refused_under_fsdp(
    recipe_tree: dict[str, Any], write_recipe: WriteRecipe, kind: str
) -> None:
    overrides = [f"optimizer={{kind='{kind}', lr=1e-3}}", "training.parallel.kind=fsdp"]
    with pytest.raises(ConfigError, match="whole"):
        load_recipe(str(write_recipe(recipe_tree)), overrides)
