"""The pairwise sigmoid loss, SigLIP's (Zhai et al. 2023, equation 1).

Shapes: `b` rows of this process, `B` rows of all processes, `D` size of the joint space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.objectives.base import Features, Loss
from clip_train.objectives.tiled_sigmoid import tiled_sigmoid
from clip_train.objectives.tiles import Impl, Positives, is_tiled


@dataclass(frozen=True)
class Sigmoid:
    """Each of the `B x B` pairs is one question, whether picture and caption belong together; a row's loss is the sum
    of its `B` cross-entropies, the loss the mean over rows.

    With `equal_captions_positive` all pairs of a group of equal captions belong together.
    """

    equal_captions_positive: bool = False
    impl: Impl = "auto"

    def loss(self, features: Features, logit_scale: Tensor, logit_bias: Tensor) -> Loss:
        """Loss of this process's rows against everybody's columns.

        Args:
            features: unit features; `groups` are needed with `equal_captions_positive`.
            logit_scale: scalar, what cosines are multiplied by.
            logit_bias: scalar, what is added to them.

        Raises:
            ValueError: groups are needed and missing.
        """
        shape = len(features.image), len(features.all_text)
        positives = Positives.of(features, self.equal_captions_positive)
        with torch.autocast(features.image.device.type, enabled=False):
            scale, bias = (scalar.to(features.image.dtype) for scalar in (logit_scale, logit_bias))
            compute = tiled_sigmoid if is_tiled(self.impl, *shape, features.image.device.type) else _dense
            total, rows, right = compute(features, scale, bias, positives)
        return Loss(total, terms={}, stats={"accuracy_image_to_text": right.float().mean()}, rows=rows)


def _dense(features: Features, scale: Tensor, bias: Tensor, positives: Positives) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its rows (b,) detached, and (b,) bool: the largest logit of a row is a positive's."""
    logits = scale * features.image @ features.all_text.T + bias
    row, column = positives.within(slice(0, len(logits)), logits.device)
    sign = torch.full_like(logits, -1.0)
    sign[row, column] = 1.0
    rows = -F.logsigmoid(sign * logits).sum(dim=1)
    predicted = logits.detach().argmax(dim=1, keepdim=True)
    return rows.mean(), rows.detach(), sign.gather(1, predicted)[:, 0] > 0
