"""torch.compile, block by block: blocks of one kind share one compiled graph, so that deep towers compile as fast."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable

import torch
from torch import nn

from clip_train.errors import ConfigError

_VARIANTS = 64
"""Graphs of a block: image and text, last and others, packed or not, with gradients or without, training or not. Past
torch's own limit of 8 it would compute uncompiled, with a warning."""


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have blocks compiled when they are first called, in place, for captions of any length.

    Raises ConfigError where there is no C++ compiler, which torch needs for CPU code and for GPU launchers alike.
    """
    compiler = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"training.compile needs a C++ compiler, and {compiler} was not found: install it, name another in CXX, "
            "or set training.compile = false"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)  # pyright: ignore
    for block in blocks:
        block.compile(dynamic=True)  # packed captions have another length in every step
