"""Reading files of weights from elsewhere.

Nothing is unpickled that could run code: safetensors; pickles of tensors only (`weights_only`); TorchScript archives,
whose reader builds tensors and TorchScript objects, never Python ones.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip_train.errors import CheckpointError


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A flat dict of tensors, also from `{"state_dict": …}`.

    Raises:
        CheckpointError: damaged, or a pickle with more than tensors in it.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            module: Any = torch.jit.load(str(path), map_location="cpu")  # pyright: ignore
            return {**module.state_dict()}
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: not a whole file of weights ({str(error)[:200]})") from error
    except Exception as error:  # UnpicklingError and its kin: `weights_only` met something that is no tensor
        raise CheckpointError(
            f"{path}: holds more than tensors, which could run code when it is loaded: {str(error)[:200]}. Save its "
            "state dict as safetensors where you trust it"
        ) from error
    if isinstance(content, dict) and "state_dict" in content:
        content = cast("dict[str, Any]", content)["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(one, Tensor) for one in cast("dict[str, Any]", content).values()
    ):
        raise CheckpointError(f"{path}: not a state dict (names and tensors, or those under 'state_dict')")
    return cast("dict[str, Tensor]", content)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where it is not readable."""
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error})") from error
