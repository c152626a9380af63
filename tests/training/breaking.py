"""`clip-train` whose third update fails as nothing in it foresees."""

from __future__ import annotations

import sys

from clip_train.cli import main
from clip_train.data.batch import Batch
from clip_train.objectives.base import Inputs
from clip_train.training import trainer
from clip_train.training.setup import Run

to_inputs = trainer.to_inputs


def broken(batch: Batch, run: Run) -> Inputs:
    if run.step == 2:
        raise RuntimeError("something new")
    return to_inputs(batch, run)


if __name__ == "__main__":
    trainer.to_inputs = broken
    sys.exit(main())
