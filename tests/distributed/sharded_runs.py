"""Run under torchrun: trains a recipe several times in one launch; a line of JOBS is RUN_DIR RESUME OVERRIDES…

At last once more, into FOLDER/failing, where the second process cannot write; what each process says goes to
FOLDER/failing.RANK.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from clip_train.config import load_recipe
from clip_train.errors import TrainingError
from clip_train.models.two_tower import TwoTower
from clip_train.runtime.process import launched
from clip_train.training import saving
from clip_train.training.trainer import train
from tokenizer import BPETokenizer


def no_evaluation(model: TwoTower, tokenizer: BPETokenizer, step: int) -> Mapping[str, float]:
    raise AssertionError("these runs have no tasks")


def cannot_write(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def main(recipe: Path, jobs: Path) -> None:
    with launched("fp32") as process:

        def run(run_dir: Path, resume: str, overrides: list[str]) -> None:
            train(
                load_recipe(recipe, overrides),
                run_dir,
                process,
                resume=resume,
                console=Console(),
                evaluate=no_evaluation,
            )

        for line in jobs.read_text().splitlines():
            run_dir, resume, *overrides = line.split()
            run(Path(run_dir), resume, overrides)
        if process.rank == 1:
            saving.write_part = cannot_write
        try:
            run(jobs.parent / "failing", "never", ["training.parallel.kind=fsdp"])
        except TrainingError as error:
            (jobs.parent / f"failing.{process.rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
