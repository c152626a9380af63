"""Text towers of open_clip directories.

Those that this project has a place for are read as `clip-train import` reads them, so that they run trimmed and packed.
Those that are transformers' (`hf_model_name`) are built by open_clip itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clip_train.config.load import load_recipe
from clip_train.errors import CheckpointError
from clip_train.evaluation.text.our_tower import OurTower
from clip_train.evaluation.text.transformers_tower import TransformersTower
from clip_train.models.pooling import FreePool

_POOLS: dict[str, FreePool] = {"MeanPooler": "mean", "MaxPooler": "max", "ClsLastHiddenStatePooler": "cls"}
"""open_clip's poolers and ours."""


def open_tower(path: Path) -> OurTower | TransformersTower:
    """The text tower of an open_clip directory.

    Raises CheckpointError as `clip-train import`; or where a tower of transformers' cannot be built or pooled.
    """
    try:
        config: Any = json.loads((path / "open_clip_config.json").read_text(encoding="utf-8"))
        text = config["model_cfg"]["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: open_clip_config.json has no model_cfg.text_cfg: {error}") from error
    return _of_transformers(path) if text.get("hf_model_name") else _ours(path)


def _ours(path: Path) -> OurTower:
    from clip_train.export.bring_in import model_of, recipe_around
    from clip_train.export.foreign import read_foreign

    foreign = read_foreign(path, quick_gelu=False, vocabulary=None)
    recipe = recipe_around(foreign, load_recipe("imported", []), name=path.name, vocabulary=path, source=path)
    model = model_of(foreign, recipe)
    return OurTower(model.text, foreign.tokenizer, model.text_projection)


def _of_transformers(path: Path) -> TransformersTower:
    try:
        import open_clip as library
    except ImportError:
        raise CheckpointError(f"{path}: needs open_clip: pip install 'clip-train[probe]'") from None
    open_clip: Any = library
    name = f"local-dir:{path.absolute()}"
    try:
        model, _, _ = open_clip.create_model_and_transforms(name)
        wrapped = open_clip.get_tokenizer(name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: open_clip cannot build it: {error}") from error
    pool = _POOLS.get(type(model.text.pooler).__name__)
    if pool is None:
        raise CheckpointError(
            f"{path}: its text tower pools by {type(model.text.pooler).__name__}; {', '.join(_POOLS)} can be probed"
        )
    longest = int(wrapped.context_length or 77)
    return TransformersTower(
        model.text.transformer, wrapped.tokenizer, pool, longest, model.text.proj, clean=wrapped.clean_fn
    )
