"""Choices about parallelism that contradict each other are refused before anything runs."""

from __future__ import annotations

import pytest

from clip_train.config import load_recipe
from clip_train.errors import ConfigError

FSDP = "training.parallel.kind=fsdp"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([FSDP, "training.precision=fp16"], "fp16"),
        ([FSDP, "training.parallel.static_graph=true"], "static_graph"),
        (["training.parallel={kind='ddp', cpu_offload=true}"], "cpu_offload"),
        (["training.parallel={kind='ddp', static_graph=true}", "training.micro_batch=4"], "micro_batch"),
        (["training.sync_batch_norm=true"], "sync_batch_norm"),
        ([FSDP, "optimizer={kind='muon', lr=0.1}"], "muon"),
        ([FSDP, "optimizer={kind='lamb', lr=0.1}"], "lamb"),
    ],
)
def test_contradictions(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("vit-b-32", overrides)


def test_what_goes_together() -> None:
    assert load_recipe("rn50", ["training.sync_batch_norm=true"]).training.sync_batch_norm
    assert load_recipe("vit-b-32", [FSDP, "training.parallel.shard=hybrid"]).training.parallel.kind == "fsdp"
