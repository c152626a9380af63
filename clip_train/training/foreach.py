"""torch's elementwise operations over lists of tensors: on a GPU one kernel for all of a model's parameters.

torch uses them in its own optimizers, documents them, and spells them `torch._foreach_*`; the names are typed here.
Lists are aligned: element `i` of each belongs together. A trailing underscore works in place on the first list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clip_train.runtime.shards import is_shard

Tensors = Sequence[Tensor]


def _named(name: str) -> Callable[..., Any]:
    return getattr(torch, f"_foreach_{name}")


lerp: Callable[[Tensors, Tensors, float], list[Tensor]] = _named("lerp")
lerp_: Callable[[Tensors, Tensors, float], None] = _named("lerp_")
mul_: Callable[[Tensors, float | Tensors], None] = _named("mul_")
div: Callable[[Tensors, list[float]], list[Tensor]] = _named("div")
div_: Callable[[Tensors, Tensors], None] = _named("div_")
add_: Callable[..., None] = _named("add_")
"""`add_(tensors, number)` or `add_(tensors, tensors, alpha=number)`."""
addcmul_: Callable[[Tensors, Tensors, Tensors, float], None] = _named("addcmul_")
sign_: Callable[[Tensors], None] = _named("sign_")
sqrt_: Callable[[Tensors], None] = _named("sqrt_")
norm: Callable[[Tensors], list[Tensor]] = _named("norm")


def local(tensors: Tensors) -> list[Tensor]:
    """This process's shards of sharded tensors, sharing their memory: all that elementwise work needs."""
    return [tensor.to_local() if is_shard(tensor) else tensor for tensor in tensors]
