"""Run under torchrun: gradients of one global batch, dealt to the processes, into FOLDER/CASE.safetensors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from clip_train.models.text import TextTransformer
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer
from clip_train.objectives.contrastive import InfoNCE
from clip_train.runtime.parallel import parallelize
from clip_train.runtime.process import launched
from clip_train.training.update import Inputs, backward

GLOBAL, VOCABULARY, CAP = 16, 50, 12


def main(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, CAP + 1, (GLOBAL,), generator=generator)
    images = torch.randn(GLOBAL, 3, 16, 16, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (GLOBAL, CAP), generator=generator)
    groups = torch.arange(GLOBAL) % 11  # equal captions, on different processes
    with launched("fp32") as process:
        assert process.world == int(os.environ["WORLD_SIZE"])
        share = GLOBAL // process.world
        rows = slice(process.rank * share, (process.rank + 1) * share)
        part = Inputs(images[rows], ids[rows], lengths[rows], groups[rows])
        for case, objective, micro in (
            ("plain", InfoNCE(), None),
            ("cached", InfoNCE(), 2),
            ("groups", InfoNCE(equal_captions_positive=True), None),
        ):
            torch.manual_seed(0)
            model = TwoTower(
                VisionTransformer(image_size=16, patch_size=8, width=16, layers=2, heads=2),
                TextTransformer(vocab_size=VOCABULARY, context_length=CAP, width=16, layers=2, heads=2),
                embed_dim=8,
            ).double()
            wrapped = parallelize(model, process)
            backward(wrapped, objective, part, process, step=0, seed=0, micro_batch=micro)
            if process.is_main:
                found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                save_file(found, folder / f"{case}.safetensors")
        process.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
