"""What a generator is made of, and the stages in which it is trained.

A stage's result is kept until all are done, so that training that was cut goes on with the stage it was in.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from clip_train.evaluation.text_to_image.pictures import Pictures


@dataclass(frozen=True)
class Settings:
    """What a generator is. Steps, not seconds: the result does not depend on how fast the machine is."""

    size: int = 30
    patch: int = 5
    codes: int = 512
    codebook_width: int = 64
    codebook_steps: int = 1600
    codebook_batch: int = 32
    classifier_width: int = 24
    classifier_steps: int = 800
    classifier_batch: int = 64
    width: int = 128
    layers: int = 3
    heads: int = 4
    prefix: int = 4
    steps: int = 1400
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    without_caption: float = 0.15
    """Share of the steps' pictures that are learned without a caption, for the unconditional model."""
    guidance: float = 2.0
    """How far samples go beyond the unconditional model."""
    temperature: float = 0.9
    seed: int = 0


BUDGETS = {
    "full": Settings(),
    "small": Settings(
        codebook_steps=320, classifier_width=16, classifier_steps=240, width=96, layers=2, steps=350, batch=32,
    ),
}  # fmt: skip
"""By name: what a full ablation uses, and a trial's."""


class Stages:
    """Progress, and results of the stages that are done."""

    def __init__(self, folder: Path, settings: Settings, data: Pictures, console: Console | None) -> None:
        self.folder, self.console = folder, console
        text = json.dumps([asdict(settings), data.keys, data.captions, torch.__version__])
        self.key = hashlib.sha256(text.encode() + data.images.numpy().tobytes()).hexdigest()[:16]
        self.name, self.started, self.said = "", 0.0, 0.0

    def run(self, name: str, modules: list[nn.Module], work: Callable[[], None]) -> None:
        """Do the stage, or take what it gave when it was done before with the same settings and data."""
        path = self.folder / f"{name}.safetensors"
        self.name, self.started = name, time.perf_counter()
        try:
            saved = load_file(path)
            with_key = saved.pop(self.key, None)
        except (OSError, SafetensorError):
            saved, with_key = {}, None
        if with_key is not None:
            for number, module in enumerate(modules):
                head = f"{number}."
                module.load_state_dict(
                    {key[len(head) :]: value for key, value in saved.items() if key.startswith(head)}
                )
            self.say(f"{name}: done before")
            return
        for module in modules:
            module.train()
        work()
        for module in modules:
            module.eval()
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {f"{number}.{key}": value.contiguous() for number, module in enumerate(modules)
                 for key, value in module.state_dict().items()}  # fmt: skip
        save_file({**state, self.key: torch.ones(1)}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        self.say(f"{name}: done in {time.perf_counter() - self.started:.0f} s")

    def steps(self, count: int) -> Iterator[int]:
        """`range(count)`, with a line now and then that says how long it will take."""
        begun = time.perf_counter()
        for step in range(count):
            yield step
            now = time.perf_counter()
            if now - self.said > 10 and step + 1 < count:
                left = (now - begun) / (step + 1) * (count - step - 1)
                self.say(f"{self.name}: step {step + 1:,} of {count:,}, {left:.0f} s left of this stage")

    def say(self, line: str) -> None:
        self.said = time.perf_counter()
        if self.console is not None:
            self.console.print(line)

    def clear(self) -> None:
        """Everything is in the generator's own files."""
        for name in ("codebook", "classifier", "model"):
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)
        self.folder.rmdir()
