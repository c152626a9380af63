"""Symmetric InfoNCE, CLIP's loss (Radford et al. 2021, figure 3; van den Oord et al. 2018).

Shapes: `b` rows of this process, `B` rows of all processes, `D` size of the joint space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.objectives.base import Features, Loss
from clip_train.objectives.tiled_infonce import Figures, tiled_infonce
from clip_train.objectives.tiles import Impl, Positives, is_tiled


@dataclass(frozen=True)
class InfoNCE:
    """Cross-entropy of each row over all columns, in both directions, averaged.

    With `equal_captions_positive` the target of a row is spread evenly over all pairs of its group, and a
    prediction is right when it falls on any of them. `impl` says how it is computed: `dense` holds all logits and is
    the reference, `tiled` never does (`tiled_infonce.py`), `auto` tiles where the logits are many.
    """

    equal_captions_positive: bool = False
    impl: Impl = "auto"

    def loss(self, features: Features, logit_scale: Tensor) -> Loss:
        """Loss of this process's rows against everybody's columns.

        Args:
            features: unit features; `groups` are needed with `equal_captions_positive`.
            logit_scale: scalar, what cosines are multiplied by (the exponential of the learned parameter).

        Raises:
            ValueError: groups are needed and missing.
        """
        shape = len(features.image), len(features.all_text)
        positives = Positives.of(features, self.equal_captions_positive)
        # Logits reach +-100, where bf16 resolves no better than 0.5: products and softmax are fp32 whatever
        # autocast says.
        with torch.autocast(features.image.device.type, enabled=False):
            compute = tiled_infonce if is_tiled(self.impl, *shape, features.image.device.type) else _dense
            figures = compute(features, logit_scale.to(features.image.dtype), positives)
        return Loss(
            figures.total,
            terms={
                "image_to_text": figures.image_to_text.mean(),
                "text_to_image": figures.text_to_image.mean(),
            },
            stats={
                "accuracy_image_to_text": figures.image_right.float().mean(),
                "accuracy_text_to_image": figures.text_right.float().mean(),
            },
            rows=(figures.image_to_text + figures.text_to_image) / 2,
        )


def _dense(features: Features, scale: Tensor, positives: Positives) -> Figures:
    targets = _targets(features, positives)
    image_to_text, image_rows, image_right = _direction(scale * features.image @ features.all_text.T, targets)
    text_to_image, text_rows, text_right = _direction(scale * features.text @ features.all_image.T, targets)
    return Figures((image_to_text + text_to_image) / 2, image_rows, text_rows, image_right, text_right)


def _targets(features: Features, positives: Positives) -> Tensor:
    """The right columns of each row, the same in both directions: `(b,)` int64, one for each row, or `(b, B)` bool
    where there may be several."""
    if positives.groups is None or positives.all_groups is None:
        rows = torch.arange(len(features.image), device=features.image.device)
        return rows + features.first_row
    return positives.groups[:, None] == positives.all_groups


def _direction(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of `(b, B)` logits, that of each row, and whether a row's largest is a target."""
    predicted = logits.detach().argmax(dim=1)
    if targets.dtype != torch.bool:
        log_probability = logits.log_softmax(dim=1)  # cross_entropy's two halves: the rows come with them
        rows = -log_probability.detach().gather(1, targets[:, None])[:, 0]
        return F.nll_loss(log_probability, targets), rows, predicted == targets
    mean_positive = logits.masked_fill(~targets, 0.0).sum(dim=1) / targets.sum(dim=1)
    rows = logits.logsumexp(dim=1) - mean_positive
    return rows.mean(), rows.detach(), targets.gather(1, predicted[:, None])[:, 0]
