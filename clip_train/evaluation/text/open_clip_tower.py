"""Text towers of open_clip directories: read as `clip-train import` reads them, so that they run trimmed and packed."""

from __future__ import annotations

from pathlib import Path

from clip_train.config.load import load_recipe
from clip_train.evaluation.text.our_tower import OurTower


def open_tower(path: Path) -> OurTower:
    """The text tower of an open_clip directory. Raises CheckpointError as `clip-train import`."""
    from clip_train.export.bring_in import model_of, recipe_around
    from clip_train.export.foreign import read_foreign

    foreign = read_foreign(path, quick_gelu=False, vocabulary=None)
    recipe = recipe_around(foreign, load_recipe("imported", []), name=path.name, vocabulary=path, source=path)
    model = model_of(foreign, recipe)
    return OurTower(model.text, foreign.tokenizer, model.text_projection)
