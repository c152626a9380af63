"""Towers that keep the weights they start with (LiT: Zhai et al. 2022, locked-image tuning).

A locked parameter gets no gradient, no decay and no optimizer state; a BatchNorm all of whose parameters are locked
keeps its statistics, too (`Model.train`). Projections and the logit scale are in no tower and are always trained.
"""

from __future__ import annotations

from typing import Literal

from clip_train.errors import ConfigError
from clip_train.models.base import Tower
from clip_train.training.layer_decay import layers_of


def lock_(tower: Tower, trained: Literal["all"] | int | None, *, key: str) -> None:
    """Lock a tower: `all` of it, or what lies before its last `trained` blocks, embeddings among it; None: nothing.

    Call it before wrapping and before the optimizer is made. `key` is the recipe's, for messages.

    Raises:
        ConfigError: the tower has fewer blocks.
    """
    if trained is None:
        return
    layers, last = layers_of(tower)
    blocks = last - 1
    if trained != "all" and trained > blocks:
        raise ConfigError(f"{key} = {trained} leaves more blocks unlocked than the tower's {blocks}")
    first_trained = last + 1 if trained == "all" else last - trained
    for name, parameter in tower.named_parameters():
        if layers[name] < first_trained:
            parameter.requires_grad_(False)
