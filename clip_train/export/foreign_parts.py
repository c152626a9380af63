"""What reading a model from elsewhere gives, before its vocabulary is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """A model from elsewhere, under our names."""

    state: dict[str, Tensor]
    image: dict[str, Any]
    """Recipe section."""
    text: dict[str, Any]
    """Recipe section."""
    preprocess: dict[str, Any]
    """Recipe section."""
    context_length: int | None = None
    """The cap on captions, where no table of positions says it."""
