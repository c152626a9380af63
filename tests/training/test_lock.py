"""Starting from other runs' towers, and keeping them as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clip_train.cli import main
from clip_train.errors import CheckpointError
from clip_train.loading import load, load_text
from clip_train.models.text import TextTransformer
from tokenizer import BPETokenizer
from tokenizer.vocabulary import own_vocabulary

Write = Callable[[dict[str, Any]], Path]


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "checkpoints/latest/model.safetensors")


def text_only(tree: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a masked language model with the tower of a CLIP's recipe."""
    kept = {key: value for key, value in tree.items() if key not in ("image", "model", "evaluation")}
    return kept | {"loss": {"kind": "mlm"}, "training": {"steps": 3, "precision": "fp32"}}


@pytest.fixture
def tree(recipe_tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    BPETokenizer(own_vocabulary(())).save(tmp_path / "bytes.json")
    recipe_tree["tokenizer"] = {"path": str(tmp_path / "bytes.json")}
    recipe_tree["text"] |= {"layers": 2, "attention": "bidirectional", "pool": "mean"}
    recipe_tree["training"] = {"steps": 0, "precision": "fp32"}
    del recipe_tree["evaluation"]
    return recipe_tree


def test_locked_weights_stay_and_all_others_move(tree: dict[str, Any], write_recipe: Write, tmp_path: Path) -> None:
    tree["image"] = {"kind": "resnet", "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "heads": 4}
    tree["optimizer"]["layer_decay"] = 0.5
    tree["training"] = {"steps": 0, "precision": "fp32", "lock": {"image": "all", "text": 1}, "ema": {"decay": 0.9}}
    recipe = str(write_recipe(tree))
    assert main(["train", recipe, "--run-dir", str(tmp_path / "random")]) == 0
    assert main(["train", recipe, "--run-dir", str(tmp_path / "run"), "--set", "training.steps=3"]) == 0
    before, after = weights(tmp_path / "random"), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    locked = ("image.", "text.token_embedding", "text.positional_embedding", "text.blocks.0.")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith(locked), name
    state = load_file(tmp_path / "run/checkpoints/latest/optimizer.safetensors")
    assert not [name for name in state if name.partition("/")[2].startswith(locked) and not name.startswith("ema/")]
    # BatchNorm's statistics are among what stayed.
    assert any("running_mean" in name for name in before)


def test_both_towers_locked_train_the_projections(tree: dict[str, Any], write_recipe: Write, tmp_path: Path) -> None:
    tree["training"]["lock"] = {"image": "all", "text": "all"}
    recipe = str(write_recipe(tree))
    for name, steps in (("random", 0), ("run", 3)):
        command = ["train", recipe, "--run-dir", str(tmp_path / name), "--set", f"training.steps={steps}"]
        assert main(command) == 0
    before, after = weights(tmp_path / "random"), weights(tmp_path / "run")
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {"image_projection.weight", "text_projection.weight", "logit_scale"}


def test_more_blocks_than_there_are_cannot_stay_unlocked(
    tree: dict[str, Any], write_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree["training"]["lock"] = {"text": 3}
    assert main(["train", str(write_recipe(tree)), "--run-dir", str(tmp_path / "run")]) == 2
    assert "training.lock.text = 3 leaves more blocks unlocked than the tower's 2" in capsys.readouterr().err


def test_a_clip_starts_from_a_language_models_tower(
    tree: dict[str, Any], write_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_recipe(text_only(tree))), "--run-dir", str(tmp_path / "mlm")]) == 0
    learned = weights(tmp_path / "mlm")
    assert {name.partition(".")[0] for name in learned} == {"text", "head"}
    recipe = str(write_recipe(tree))
    start = ["--set", f"training.init_text={tmp_path / 'mlm'}"]
    assert main(["train", recipe, "--run-dir", str(tmp_path / "same"), *start]) == 0
    same = weights(tmp_path / "same")
    for name, tensor in learned.items():
        if name.startswith("text."):
            assert torch.equal(tensor, same[name]), name

    other = [*start, "--set", "text.pool=map", "--set", "tokenizer.context_length=9"]
    assert main(["train", recipe, "--run-dir", str(tmp_path / "map"), *other]) == 0
    mapped = weights(tmp_path / "map")
    assert torch.equal(mapped["text.positional_embedding"], learned["text.positional_embedding"][:9])
    assert any(name.startswith("text.attention_pool.") for name in mapped)
    said = " ".join(capsys.readouterr().out.split())
    assert "text.positional_embedding: 76 positions of" in said
    assert "another pool than in" in said

    # Back into a tower of text alone, and from an image tower.
    again = text_only(tree)
    again["training"] |= {"steps": 0, "init_text": str(tmp_path / "same")}
    assert main(["train", str(write_recipe(again)), "--run-dir", str(tmp_path / "back")]) == 0
    back = weights(tmp_path / "back")
    assert all(torch.equal(tensor, same[name]) for name, tensor in back.items() if name.startswith("text."))
    recipe, seed = str(write_recipe(tree)), ["--set", "training.seed=7"]
    image = ["--set", f"training.init_image={tmp_path / 'same'}"]
    assert main(["train", recipe, "--run-dir", str(tmp_path / "seen"), *image, *seed]) == 0
    seen = weights(tmp_path / "seen")
    assert {name for name in seen if torch.equal(seen[name], same[name])} >= {n for n in same if n.startswith("image.")}
    assert not torch.equal(seen["text.token_embedding.weight"], same["text.token_embedding.weight"])

    one, two = load_text(tmp_path / "mlm"), load_text(tmp_path / "same")
    assert isinstance(one.tower, TextTransformer)
    assert (one.step, two.step) == (3, 0)
    ids, lengths = one.tokenizer.encode_batch(["a red square"])
    grid, counts = torch.from_numpy(ids).long()[None], torch.from_numpy(lengths)
    torch.testing.assert_close(one.tower(grid, counts).pooled, two.tower(grid, counts).pooled)
    with pytest.raises(CheckpointError, match="load_text"):
        load(tmp_path / "mlm")


def test_towers_that_are_not_there_or_do_not_fit_are_refused(
    tree: dict[str, Any], write_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_recipe(text_only(tree))), "--run-dir", str(tmp_path / "mlm")]) == 0
    recipe = str(write_recipe(tree))
    cases = (
        (["training.init_image"], "this checkpoint has no image tower"),
        (["training.init_text", "text.width=32"], "text.width = 32 here, 16 there"),
        (["training.init_text", "text.heads=4"], "text.heads = 4 here, 2 there"),
        (["training.init_text", "text.activation=quick_gelu"], "activation = 'quick_gelu' here, 'gelu' there"),
        (["training.init_text", "text.kind=modern"], "text.kind = 'modern' here, 'transformer' there"),
        (["training.init", "image.heads=4"], "image.heads = 4 here, 2 there"),
        (["training.init", "training.init={mlm}"], "this checkpoint has no image tower"),
    )
    assert main(["train", recipe, "--run-dir", str(tmp_path / "clip")]) == 0
    for (key, *others), message in cases:
        sets = [f"{key}={tmp_path / ('clip' if key == 'training.init' else 'mlm')}", *others]
        sets = [one.replace("{mlm}", str(tmp_path / "mlm")) for one in sets]
        arguments = [part for one in sets for part in ("--set", one)]
        assert main(["train", recipe, "--run-dir", str(tmp_path / "no"), *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_another_mask_is_announced(
    tree: dict[str, Any], write_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_recipe(text_only(tree))), "--run-dir", str(tmp_path / "mlm")]) == 0
    recipe = str(write_recipe(tree))
    start = ["--set", f"training.init_text={tmp_path / 'mlm'}", "--set", "text.attention=causal"]
    assert main(["train", recipe, "--run-dir", str(tmp_path / "run"), *start]) == 0
    assert "text.attention: causal here, bidirectional in" in " ".join(capsys.readouterr().out.split())


def test_what_stands_behind_a_tower_may_be_another(tree: dict[str, Any], write_recipe: Write, tmp_path: Path) -> None:
    """SigLIP's projection has a bias, a language model's tower none at all."""
    assert main(["train", str(write_recipe(text_only(tree))), "--run-dir", str(tmp_path / "mlm")]) == 0
    recipe = str(write_recipe(tree))
    start = ["--set", f"training.init_text={tmp_path / 'mlm'}", "--set", "text.projection_bias=true"]
    assert main(["train", recipe, "--run-dir", str(tmp_path / "run"), *start]) == 0
    before, after = weights(tmp_path / "mlm"), weights(tmp_path / "run")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if name.startswith("text."))
    assert "text_projection.bias" in after
