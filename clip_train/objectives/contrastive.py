"""Symmetric InfoNCE, CLIP's loss (Radford et al. 2021, figure 3; van den Oord et al. 2018).

Shapes: `b` rows of this process, `B` rows of all processes, `D` size of the joint space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.objectives.base import Features, Loss


@dataclass(frozen=True)
class InfoNCE:
    """Cross-entropy of each row over all columns, in both directions, averaged.

    With `equal_captions_positive` the target of a row is spread evenly over all pairs of its group, and a
    prediction is right when it falls on any of them.
    """

    equal_captions_positive: bool = False

    def loss(self, features: Features, logit_scale: Tensor) -> Loss:
        """Loss of this process's rows against everybody's columns.

        Args:
            features: unit features; `groups` and `all_groups` are needed with `equal_captions_positive`.
            logit_scale: scalar, what cosines are multiplied by (the exponential of the learned parameter).

        Raises:
            ValueError: groups are needed and missing.
        """
        targets = self._targets(features)
        # Logits reach +-100, where bf16 resolves no better than 0.5: products and softmax are fp32 whatever
        # autocast says.
        with torch.autocast(features.image.device.type, enabled=False):
            scale = logit_scale.float()
            to_text = scale * features.image.float() @ features.all_text.float().T
            to_image = scale * features.text.float() @ features.all_image.float().T
            image_to_text, image_rows, image_accuracy = _direction(to_text, targets)
            text_to_image, text_rows, text_accuracy = _direction(to_image, targets)
            total = (image_to_text + text_to_image) / 2
        return Loss(
            total,
            terms={"image_to_text": image_to_text.detach(), "text_to_image": text_to_image.detach()},
            stats={"accuracy_image_to_text": image_accuracy, "accuracy_text_to_image": text_accuracy},
            rows=(image_rows + text_rows) / 2,
        )

    def _targets(self, features: Features) -> Tensor:
        """The right columns of each row, the same in both directions: `(b,)` int64, one for each row, or
        `(b, B)` bool where there may be several."""
        if not self.equal_captions_positive:
            rows = torch.arange(len(features.image), device=features.image.device)
            return rows + features.first_row
        if features.groups is None or features.all_groups is None:
            raise ValueError("equal_captions_positive needs the groups of equal captions in the batch")
        return features.groups[:, None] == features.all_groups


def _direction(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy, that of each row, and accuracy of `(b, B)` logits."""
    predicted = logits.detach().argmax(dim=1)
    if targets.dtype != torch.bool:
        log_probability = logits.log_softmax(dim=1)  # cross_entropy's two halves: the rows come with them
        rows = -log_probability.detach().gather(1, targets[:, None])[:, 0]
        return F.nll_loss(log_probability, targets), rows, (predicted == targets).float().mean()
    mean_positive = logits.masked_fill(~targets, 0.0).sum(dim=1) / targets.sum(dim=1)
    rows = logits.logsumexp(dim=1) - mean_positive
    return rows.mean(), rows.detach(), targets.gather(1, predicted[:, None]).float().mean()
