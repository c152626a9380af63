"""The tiled losses' products. On GPUs and in fp64 they are torch's; in fp32 on a CPU they are oneDNN's.

torch gives fp32 products to MKL, which keeps its AVX-512 kernels for Intel's processors: on others it reaches half of
what oneDNN does, which torch carries for convolutions and bf16. Both are true fp32; they round differently.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

_ops: Any = torch.ops.mkldnn
_AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and hasattr(_ops, "_linear_pointwise")  # what torch.compile makes of a linear layer; no public name
)


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """`(m, k)`, `(n, k)` -> `a @ b.T` `(m, n)`; not differentiable."""
    if _AVAILABLE and a.device.type == "cpu" and a.dtype == torch.float32:
        return _ops._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T
