"""Symmetric InfoNCE, CLIP's loss (Radford et al. 2021, figure 3; van den Oord et al. 2018).

Shapes: `b` rows of this process, `B` rows of all processes, `D` size of the joint space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        positives = self._positives(features)
        # Logits reach +-100, where bf16 resolves no better than 0.5: products and softmax are fp32 whatever
        # autocast says.
        with torch.autocast(features.image.device.type, enabled=False):
            scale = logit_scale.float()
            to_text = scale * features.image.float() @ features.all_text.float().T
            to_image = scale * features.text.float() @ features.all_image.float().T
            image_to_text, image_accuracy = _direction(to_text, positives)
            text_to_image, text_accuracy = _direction(to_image, positives)
            total = (image_to_text + text_to_image) / 2
        return Loss(
            total,
            terms={"image_to_text": image_to_text.detach(), "text_to_image": text_to_image.detach()},
            stats={"accuracy_image_to_text": image_accuracy, "accuracy_text_to_image": text_accuracy},
        )

    def _positives(self, features: Features) -> Tensor:
        """`(b, B)` bool: which columns are right for which row; the same for both directions."""
        if self.equal_captions_positive:
            if features.groups is None or features.all_groups is None:
                raise ValueError("equal_captions_positive needs the groups of equal captions in the batch")
            return features.groups[:, None] == features.all_groups
        rows, columns = len(features.image), len(features.all_image)
        device = features.image.device
        own = torch.arange(rows, device=device) + features.first_row
        return own[:, None] == torch.arange(columns, device=device)


def _direction(logits: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and accuracy of `(b, B)` logits with targets spread over `positives`."""
    mean_positive = logits.masked_fill(~positives, 0.0).sum(dim=1) / positives.sum(dim=1)
    loss = (logits.logsumexp(dim=1) - mean_positive).mean()
    with torch.no_grad():
        right = positives.gather(1, logits.argmax(dim=1, keepdim=True)).float().mean()
    return loss, right
