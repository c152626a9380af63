"""torch's elementwise operations over lists of tensors: on a GPU one kernel for all of a model's parameters.

torch uses them in its own optimizers, documents them, and spells them `torch._foreach_*`; the names are typed here.
Lists are aligned: element `i` of each belongs together. A trailing underscore works in place on the first list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def _named(name: str) -> Callable[..., Any]:
    return getattr(torch, f"_foreach_{name}")


lerp_: Callable[[Tensors, Tensors, float], None] = _named("lerp_")
mul_: Callable[[Tensors, float | Tensors], None] = _named("mul_")
