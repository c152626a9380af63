"""The sigmoid loss without its logits. Nothing couples its pairs, so that each tile gives its part of the loss and of
the gradient at once: three products of `b x B`, as in the dense form, and no second pass.

Shapes: `b` rows of this process, `B` rows of all processes, `D` size of the joint space, `r` rows of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clip_train.objectives.base import Features
from clip_train.objectives.products import times_transposed
from clip_train.objectives.tiles import Positives, row_runs


def tiled_sigmoid(
    features: Features, scale: Tensor, bias: Tensor, positives: Positives
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its rows `(b,)` detached, and `(b,)` bool: a positive's logit is above that of every negative."""
    outputs: Any = _Tiled.apply(features.image, features.all_text, scale, bias, positives, torch.is_grad_enabled())
    return outputs


class _Tiled(torch.autograd.Function):
    """Forward leaves the gradient behind; backward multiplies it by what comes in."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, all_text: Tensor, scale: Tensor, bias: Tensor, positives: Positives, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        b = len(image)
        losses, right = torch.empty_like(image[:, 0]), torch.empty(b, dtype=torch.bool, device=image.device)
        image_grad, text_grad, bias_grad = (torch.zeros_like(leaf) for leaf in (image, all_text, bias))
        for rows in row_runs(b, len(all_text), image.device):
            tile = times_transposed(scale * image[rows], all_text).add_(bias)
            row, column = positives.within(rows, image.device)
            logit = tile[row, column]
            tile[row, column] = -torch.inf
            best = image.new_full((len(tile),), -torch.inf).scatter_reduce_(0, row, logit, "amax")
            right[rows] = best > tile.amax(dim=1)
            # -log sigmoid(z l) = softplus(-z l), and its derivative by l is -z sigmoid(-z l).
            tile[row, column] = -logit
            losses[rows] = F.softplus(tile).sum(dim=1)
            if grad:
                tile.sigmoid_()
                tile[row, column] *= -1
                image_grad[rows] = times_transposed(tile, all_text.T)
                text_grad.addmm_(tile.T, image[rows])  # in place: a product of its own would take a (B, D) more
                bias_grad += tile.sum()
        if grad:
            scale_grad = (image_grad * image).sum() / b
            ctx.save_for_backward(image_grad.mul_(scale / b), text_grad.mul_(scale / b), scale_grad, bias_grad.div_(b))
        ctx.mark_non_differentiable(losses, right)
        return losses.mean(), losses, right

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator hides the name of ctx
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        return (*(gradient * gradients[0] for gradient in ctx.saved_tensors), None, None)
