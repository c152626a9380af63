"""Run under torchrun: gradients of one global batch, dealt to the processes, into FOLDER/CASE.safetensors."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clip_train.models.layers import Block
from clip_train.models.resnet import ModifiedResNet
from clip_train.models.text import TextTransformer
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer
from clip_train.objectives import tiles
from clip_train.objectives.base import Inputs
from clip_train.objectives.contrastive import InfoNCE
from clip_train.objectives.sigmoid import Sigmoid
from clip_train.runtime.parallel import Replicated, Sharded, clip_gradients, parallelize
from clip_train.runtime.process import Process, launched
from clip_train.training.update import Objective, backward

GLOBAL, VOCABULARY, CAP, SIZE = 16, 50, 12, 32

OBJECTIVES: dict[str, Objective] = {
    "dense": InfoNCE(impl="dense"),
    "groups": InfoNCE(equal_captions_positive=True, impl="dense"),
    "tiled": InfoNCE(impl="tiled"),
    "tiled_groups": InfoNCE(equal_captions_positive=True, impl="tiled"),
    "sigmoid": Sigmoid(impl="dense"),
    "tiled_sigmoid": Sigmoid(impl="tiled"),
    "tiled_sigmoid_groups": Sigmoid(equal_captions_positive=True, impl="tiled"),
}
REFERENCE = {"tiled": "dense", "tiled_groups": "groups", "tiled_sigmoid": "sigmoid"}
"""The objective whose gradients another must give; for the rest, its own on one process."""
STRATEGIES: dict[str, Replicated | Sharded] = {
    "ddp": Replicated(),
    "static": Replicated(static_graph=True),
    "compressed": Replicated(bf16_gradients=True),
    "fsdp": Sharded(),
    "kept": Sharded(reshard_after_forward=False),
    "hybrid": Sharded(shard="hybrid"),
}
MICRO: dict[str, int | None] = {"plain": None, "cached": 2}


@dataclass(frozen=True)
class Case:
    """One way to compute the gradients; its parts joined by dots are the file's name."""

    objective: str = "dense"
    strategy: str = "ddp"
    micro: str = "plain"
    memory: str = "kept"
    """`recomputed`: activation checkpointing."""
    model: str = "vit"
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return ".".join(str(getattr(self, field.name)) for field in fields(self))


def matrix() -> list[Case]:
    """What must give one process's gradients, whatever the number of processes."""
    found = [
        Case(objective, strategy, micro)
        for objective in ("dense", "tiled", "tiled_sigmoid")
        for strategy in ("ddp", "fsdp")
        for micro in MICRO
    ]
    return found + [Case(objective) for objective in OBJECTIVES if Case(objective) not in found]


def variants(world: int) -> list[Case]:
    """More that must."""
    found = [Case(strategy=s, micro=m, memory="recomputed") for s in ("ddp", "fsdp") for m in MICRO]
    found += [Case(strategy="static"), Case(strategy="kept", micro="cached")]
    return found + [Case(strategy="hybrid", micro=micro) for micro in MICRO] * (world == 4)


def pairs() -> list[tuple[Case, Case]]:
    """What must agree on the same number of processes: random masks and BatchNorm go by the process's own rows."""
    found: list[tuple[Case, Case]] = []
    for model in ("dropout", "resnet"):
        one = Case(micro="cached", model=model)
        found += [(one, replace(one, strategy="fsdp")), (one, replace(one, memory="recomputed"))]
        found += [(one, replace(one, strategy="fsdp", memory="recomputed"))]
    one = Case(precision="bf16")
    return [*found, (one, replace(one, strategy="fsdp"))]


def build(case: Case) -> TwoTower:
    torch.manual_seed(0)
    image: nn.Module = (
        ModifiedResNet(image_size=SIZE, layers=(1, 1, 1, 1), width=8, heads=4)
        if case.model == "resnet"
        else VisionTransformer(image_size=SIZE, patch_size=16, width=16, layers=2, heads=2)
    )
    text = TextTransformer(vocab_size=VOCABULARY, context_length=CAP, width=16, layers=2, heads=2)
    for name, parameter in image.named_parameters():
        if name.endswith("bn3.weight"):  # zero at first: nothing before it would have a gradient
            nn.init.normal_(parameter)
    if case.model == "dropout":
        for block in text.blocks:
            assert isinstance(block, Block)
            block.mlp = nn.Sequential(block.mlp, nn.Dropout(0.3))  # pyright: ignore[reportAttributeAccessIssue]
    bias = -4.0 if "sigmoid" in case.objective else None
    model = TwoTower(image, text, embed_dim=8, init_logit_bias=bias)  # pyright: ignore[reportArgumentType]
    # In fp64 rounding in the towers hides no mistake; features and loss are fp32 all the same.
    return model if case.precision == "bf16" else model.double()


def share(process: Process, case: Case) -> Inputs:
    """This process's rows of the global batch."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, CAP + 1, (GLOBAL,), generator=generator)
    images = torch.randn(GLOBAL, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (GLOBAL, CAP), generator=generator)
    groups = torch.arange(GLOBAL) % 11  # equal captions, on different processes
    count = GLOBAL // process.world
    rows = slice(process.rank * count, (process.rank + 1) * count)
    images = images.float() if case.precision == "bf16" else images
    return Inputs(images[rows], ids[rows], lengths[rows], groups[rows])


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """On every process, for gathering them is a collective."""
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


class Bf16(Process):
    """Autocast as `launched("bf16")` gives it, beside the others in one launch."""

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", torch.bfloat16)  # pyright: ignore[reportReturnType]


def run(case: Case, process: Process) -> dict[str, Tensor]:
    """Gradients, their norm, the clipped gradients, and the buffers."""
    if case.precision == "bf16":
        parts: dict[str, Any] = {field.name: getattr(process, field.name) for field in fields(process)}
        parts["precision"] = "bf16"
        process = Bf16(**parts)
    model = build(case)
    recompute = case.memory == "recomputed"
    wrapped = parallelize(model, process, STRATEGIES[case.strategy], activation_checkpointing=recompute)
    objective, inputs = OBJECTIVES[case.objective], share(process, case)
    for _ in range(2):  # the second time DDP has its buckets in order, and a static graph is known
        model.zero_grad()
        backward(wrapped, objective, inputs, process, step=0, seed=0, micro_batch=MICRO[case.micro])
    found = whole_gradients(model)
    found["norm"] = torch.tensor(clip_gradients(wrapped, 0.5))
    found |= {f"clipped/{name}": gradient for name, gradient in whole_gradients(model).items()}
    return found | {f"buffer/{name}": buffer for name, buffer in model.named_buffers()}


def main(folder: Path) -> None:
    tiles.CPU_TILE, tiles.LEAST_ROWS = 1, 3  # many tiles of few rows
    with launched("fp32") as process:
        assert process.world == int(os.environ.get("WORLD_SIZE", 1))
        process = replace(process, local_world=2)  # hybrid: two nodes of two
        cases = [*matrix(), Case(strategy="compressed")]
        if process.world > 1:
            cases += [*variants(process.world), *(case for pair in pairs() for case in pair)]
        for case in dict.fromkeys(cases):
            found = run(case, process)
            if process.is_main:
                save_file(found, folder / f"{case.name}.safetensors")
        process.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
