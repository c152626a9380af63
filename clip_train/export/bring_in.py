"""`clip-train import`: a model from elsewhere as a checkpoint of ours, to evaluate, export, or start a recipe from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clip_train import __version__
from clip_train.config.load import dump_recipe, load_recipe, parse_recipe
from clip_train.config.schema import Recipe
from clip_train.errors import CheckpointError
from clip_train.export.foreign import Foreign, read_foreign
from clip_train.from_recipe.model import build_two_tower
from clip_train.models.two_tower import TwoTower
from clip_train.training.checkpoint import Companions, State, load_tensors, save_checkpoint


def bring_in(
    source: Path, out: Path, *, recipe: str, overrides: Sequence[str], quick_gelu: bool, vocabulary: Path | None
) -> tuple[Recipe, TwoTower]:
    """Write `source` as the run folder `out`, with one checkpoint at step 0; returns what it became.

    Args:
        recipe: what surrounds the model: data, optimizer, evaluation. Its towers, projection and vocabulary go.
        overrides: `key=value` on top of that recipe.

    Raises:
        CheckpointError: as `read_foreign`; `out` exists; or a tensor has no place.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} exists: choose a new folder, or remove it first")
    foreign = read_foreign(source, quick_gelu=quick_gelu, vocabulary=vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    vocabulary_path = out / "vocabulary.json"
    foreign.tokenizer.save(vocabulary_path)
    made = recipe_around(
        foreign, load_recipe(recipe, overrides), name=out.name, vocabulary=vocabulary_path, source=source
    )
    model = model_of(foreign, made)
    state = State(
        step=0,
        samples=0,
        data_fingerprint="",
        tokenizer_fingerprint=foreign.tokenizer.fingerprint,
        versions={"clip-train": __version__, "torch": torch.__version__},
    )
    save_checkpoint(
        out / "checkpoints",
        state,
        model.state_dict(),
        {},
        Companions(dump_recipe(made), foreign.tokenizer.save),
        keep_last=1,
    )
    (out / "recipe.toml").write_text(dump_recipe(made), encoding="utf-8")
    return made, model


def recipe_around(foreign: Foreign, base: Recipe, *, name: str, vocabulary: Path, source: Path) -> Recipe:
    """The base recipe with the towers, joint space, view and vocabulary of the model."""
    tree: dict[str, Any] = base.model_dump(mode="json", exclude_none=True)
    tree |= {
        "name": name,
        "description": f"Imported from {source.name}.",
        "image": foreign.sections["image"],
        "text": foreign.sections["text"],
        "tokenizer": {"path": str(vocabulary.absolute())},
    }
    if ("logit_bias" in foreign.state) != (base.loss.kind == "sigmoid"):  # the parameter says which loss it was
        tree["loss"] = {"kind": "sigmoid" if "logit_bias" in foreign.state else "infonce"}
    tree["model"] |= foreign.sections["model"]
    tree["preprocess"] |= foreign.sections["preprocess"]
    return parse_recipe(tree, where=str(source))


def model_of(foreign: Foreign, recipe: Recipe) -> TwoTower:
    """The model with its weights.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape.
    """
    with torch.device("meta"):
        model = build_two_tower(recipe, foreign.tokenizer)
    # BatchNorm's counter is an integer; everything was read as fp32.
    state = {name: t.long() if name.endswith("num_batches_tracked") else t for name, t in foreign.state.items()}
    load_tensors(model, state, where="imported weights", assign=True)
    return model.eval()
