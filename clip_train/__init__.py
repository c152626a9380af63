"""clip-train: contrastive image-text pretraining from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_train.loading import LoadedModel, load

__all__ = ["LoadedModel", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` and `LoadedModel` on first use: `clip-train --help` need not wait for torch."""
    if name in ("load", "LoadedModel"):
        from clip_train import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'clip_train' has no attribute {name!r}")
