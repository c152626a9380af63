"""`clip-train` that gets the signal SIGNAL of the environment in step STEP."""

from __future__ import annotations

import os
import sys

from clip_train.cli import main
from clip_train.data.batch import Batch
from clip_train.objectives.base import Inputs
from clip_train.training import trainer
from clip_train.training.setup import Run

to_inputs = trainer.to_inputs


def interrupted(batch: Batch, run: Run) -> Inputs:
    if run.step + 1 == int(os.environ["STEP"]):
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return to_inputs(batch, run)


if __name__ == "__main__":
    trainer.to_inputs = interrupted
    sys.exit(main())
