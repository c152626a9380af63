"""Two gloo processes that share Muon's matrices end with the weights of one that does all, to the bit."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import torchrun
from safetensors.torch import load_file

SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from torch import nn
from clip_train.from_recipe.update import share_of_work

from clip_train.runtime.process import launched
from clip_train.training.muon import MuonAdamW

with launched("fp32") as process:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6, 4), (4, 40), (9, 9), (5, 3, 2, 2))]
    groups = [{"params": weights, "weight_decay": 0.1, "orthogonalize": True}]
    share = share_of_work()
    assert (share is None) == (process.world == 1)
    optimizer = MuonAdamW(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-6, share=share)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    save_file({str(n): w.detach() for n, w in enumerate(weights)}, f"{sys.argv[1]}/{process.world}-{process.rank}")
"""


def test_shared_work_is_the_same_work(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for processes in (1, 2):
        done = torchrun(processes, str(script), str(tmp_path))
        assert done.returncode == 0, done.stderr
    alone, *shared = (load_file(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    for each in shared:
        assert all(torch.equal(each[name], tensor) for name, tensor in alone.items())
