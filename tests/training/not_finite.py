"""`clip-train` whose pictures are not numbers at the steps (as in metrics) and the rank that the environment names."""

from __future__ import annotations

import math
import os
import sys

from clip_train.cli import main
from clip_train.data.batch import Batch
from clip_train.objectives.base import Inputs
from clip_train.training import trainer
from clip_train.training.setup import Run

STEPS = {int(step) for step in os.environ["BAD_STEPS"].split(",")}
to_inputs = trainer.to_inputs


def spoilt(batch: Batch, run: Run) -> Inputs:
    inputs = to_inputs(batch, run)
    if run.step + 1 in STEPS and run.process.rank == int(os.environ["BAD_RANK"]):
        inputs.images.fill_(math.nan)
    return inputs


if __name__ == "__main__":
    trainer.to_inputs = spoilt
    sys.exit(main())
