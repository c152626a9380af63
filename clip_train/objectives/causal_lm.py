"""Causal language modelling: each token from those before it (Radford et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from clip_train.objectives.base import Inputs
from clip_train.objectives.language import TokenLoss


@dataclass(frozen=True)
class CausalLM(TokenLoss):
    """The next token at every token but the last, so that EOT is learned and SOT is not."""

    def prepare(self, inputs: Inputs, *, seed: int, step: int) -> Inputs:
        """With targets; nothing is random."""
        targets = torch.full_like(inputs.ids, -1)
        has_next = torch.arange(1, inputs.ids.shape[1]) < inputs.lengths[:, None]
        targets[:, :-1] = torch.where(has_next, inputs.ids[:, 1:], -1)
        return replace(inputs, targets=targets)
