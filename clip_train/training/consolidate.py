"""`clip-train consolidate`: whole files from a checkpoint that was saved in shards."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from clip_train.errors import CheckpointError
from clip_train.training.checkpoint import Companions, failing_whole, read_checkpoint, write_whole


def consolidate(path: Path, out: Path) -> Path:
    """Write the checkpoint that `path` means, however it is stored, as one of whole files in `out`; returns its path.

    Raises CheckpointError where `out` exists, or the checkpoint is damaged.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists; name a folder that does not")
    checkpoint = read_checkpoint(path)
    companions = Companions(checkpoint.recipe_toml, lambda to: shutil.copyfile(checkpoint.tokenizer_path, to))
    with failing_whole(out):
        write_whole(out, replace(checkpoint.state, shards=0), checkpoint.model(), checkpoint.optimizer(), companions)
    return checkpoint.path
