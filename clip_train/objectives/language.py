"""Cross-entropy of the tokens that a language model is asked for: what masked and causal modelling share.

Shapes: `b` texts of this process, `L` longest of them, `N` targets, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.objectives.base import Inputs, Loss, PerSample, at_least_fp32


@dataclass(frozen=True)
class TokenLoss(PerSample):
    """The mean over all targets of all processes; logits are computed for targets alone. Subclasses set them."""

    def count(self, inputs: Inputs) -> int:
        """Targets of these texts."""
        return inputs.target_count

    def loss(self, model: nn.Module, inputs: Inputs, count: Tensor) -> Loss:
        """Of a `LanguageModel`. Softmax is fp32; logits are what the head's product gives under autocast."""
        device, targets = inputs.ids.device, _targets(inputs).flatten()
        at = (targets >= 0).nonzero().squeeze(1)  # on the host: no accelerator is waited for
        wanted = targets[at].to(device, non_blocking=True)
        logits = at_least_fp32(model(inputs.ids, inputs.lengths, at.to(device, non_blocking=True)))
        each = F.cross_entropy(logits, wanted, reduction="none")
        right = logits.detach().argmax(dim=1) == wanted
        return Loss(
            each.sum() / count,
            terms={},
            stats={"accuracy": right.sum() / count},
            rows=_means_by_text(each.detach(), at // inputs.ids.shape[1], len(inputs)),
        )


def _targets(inputs: Inputs) -> Tensor:
    if inputs.targets is None:
        raise ValueError("these inputs have no targets: `prepare` sets them")
    return inputs.targets


def _means_by_text(losses: Tensor, texts: Tensor, count: int) -> Tensor:
    """`(N,)` losses and the text of each -> `(b,)` means; 0 for a text without targets."""
    numbers = torch.bincount(texts, minlength=count).clamp(min=1).to(losses.device, non_blocking=True)
    sums = losses.new_zeros(count).index_add_(0, texts.to(losses.device, non_blocking=True), losses)
    return sums / numbers
