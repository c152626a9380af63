"""Run under torchrun: trains a recipe of text alone several times; a line of JOBS is RUN_DIR OVERRIDES…"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from clip_train.config import load_recipe
from clip_train.models.base import Model
from clip_train.runtime.process import launched
from clip_train.training.trainer import train
from tokenizer import BPETokenizer


def no_evaluation(model: Model, tokenizer: BPETokenizer, step: int) -> Mapping[str, float]:
    raise AssertionError("these runs have no tasks")


def main(recipe: Path, jobs: Path) -> None:
    with launched("fp32") as process:
        for line in jobs.read_text().splitlines():
            run_dir, *overrides = line.split()
            chosen, folder = load_recipe(recipe, overrides), Path(run_dir)
            train(chosen, folder, process, resume="auto", console=Console(), evaluate=no_evaluation)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
