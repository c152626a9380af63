"""What a single process can show of parallelism: refusals, recomputed blocks, groups of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clip_train.errors import ConfigError
from clip_train.models.base import Tower
from clip_train.models.resnet import ModifiedResNet
from clip_train.models.text import TextTransformer
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer
from clip_train.runtime.parallel import Sharded, parallelize
from clip_train.runtime.process import Process, launched
from clip_train.runtime.recompute import frozen_running_statistics


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with launched("fp32") as one:
        yield one


def build(image: str = "vit") -> TwoTower:
    torch.manual_seed(0)
    tower: Tower = (
        VisionTransformer(image_size=32, patch_size=8, width=16, layers=4, heads=2)
        if image == "vit"
        else ModifiedResNet(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4)
    )
    return TwoTower(tower, TextTransformer(vocab_size=50, context_length=12, width=16, layers=4, heads=2), embed_dim=8)


def kept_bytes(model: TwoTower) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(torch.randn(4, 3, 32, 32), torch.ones(4, 12, dtype=torch.int64), torch.full((4,), 12))
    return kept


def test_recomputed_blocks_keep_little(process: Process) -> None:
    plain = kept_bytes(build())
    recomputed = build()
    parallelize(recomputed, process, activation_checkpointing=True)
    assert kept_bytes(recomputed) < plain / 4
    assert recomputed.state_dict().keys() == build().state_dict().keys(), "names stay what they are"


def test_frozen_statistics_stay_to_the_bit() -> None:
    norm = torch.nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    momentum = norm.momentum
    with frozen_running_statistics(norm):
        frozen = norm(torch.full((8, 3), 7.0) + torch.randn(8, 3))
    assert torch.allclose(frozen.mean(0), torch.zeros(3), atol=1e-6), "normalised by the batch"
    assert norm.momentum == momentum
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize(
    ("world", "local", "strategy", "message"),
    [
        (4, 4, Sharded(shard="hybrid"), "hybrid.*4 processes, 4 on this node"),
        (6, 4, Sharded(shard="hybrid"), "hybrid.*6 processes, 4 on this node"),
        (4, 4, Sharded(cpu_offload=True), "cpu_offload"),
    ],
)
def test_what_the_processes_cannot_do(
    process: Process, world: int, local: int, strategy: Sharded, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parallelize(build(), replace(process, world=world, local_world=local), strategy)


@pytest.mark.parametrize(("image", "message"), [("vit", "no BatchNorm"), ("resnet", "GPUs only")])
def test_synchronous_batch_norm_on_cpu(process: Process, image: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parallelize(build(image), process, sync_batch_norm=True)
