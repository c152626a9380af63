"""Run under torchrun: trains a recipe of text alone several times; a line of JOBS is RUN_DIR OVERRIDES…"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from clip_train.config import Recipe, load_recipe
from clip_train.launch import evaluate_loaded, loaded_of
from clip_train.models.base import Model
from clip_train.runtime.parallel import unsharded
from clip_train.runtime.process import Process, launched
from clip_train.training.trainer import train
from tokenizer import BPETokenizer


def run(recipe: Recipe, folder: Path, process: Process) -> None:
    console = Console()

    def evaluate(model: Model, tokenizer: BPETokenizer, step: int) -> Mapping[str, float]:
        with unsharded(model):
            return evaluate_loaded(loaded_of(model, tokenizer, recipe, step), folder, process, console)

    train(recipe, folder, process, resume="auto", console=console, evaluate=evaluate)


def main(recipe: Path, jobs: Path) -> None:
    with launched("fp32") as process:
        for line in jobs.read_text().splitlines():
            run_dir, *overrides = line.split()
            run(load_recipe(recipe, overrides), Path(run_dir), process)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
