"""InfoNCE without its logits: tiles of rows, running log-sum-exp of the columns, tiles again in backward.

One product serves both directions. The rows of a process's `b x B` block `S = scale * image @ all_text.T` are whole, so
a tile gives their image-to-text log-sum-exp at once; its columns go on in the next tile and in the other processes, so
their text-to-image log-sum-exp is kept as a running maximum and a sum of exponentials relative to it (Milakov &
Gimelshein 2018) and combined over processes at the end. A fixed maximum, the scale, would do for unit features were it
not for fp32: at scale 100 a row whose best cosine is below 0.12 would have no term left above e^-88.

With the loss L = mean over all B pairs of (row's + column's cross-entropy) / 2, P and Q the softmax of S over columns
and over rows, and n the number of positives of a pair,

    B dL/dS[i, j] = (P[i, j] + Q[i, j]) / 2 - [i and j are positives] / n[i]

which backward computes tile by tile from a second product: 8 b B D operations on each process where the dense form,
with a product for each direction, spends 12.

Shapes: `b` rows of this process, `B` rows of all processes, `D` size of the joint space, `r` rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_train.objectives.base import Features
from clip_train.objectives.products import times_transposed
from clip_train.objectives.tiles import Positives, row_runs


@dataclass(frozen=True)
class Figures:
    """What the tiles leave behind, for this process's pairs."""

    total: Tensor
    """Scalar, differentiable: mean of both directions over the rows."""
    image_to_text: Tensor
    """(b,) cross-entropies."""
    text_to_image: Tensor
    """(b,)"""
    image_right: Tensor
    """(b,) bool: a positive's logit is above that of every negative."""
    text_right: Tensor
    """(b,)"""


def tiled_infonce(features: Features, scale: Tensor, positives: Positives) -> Figures:
    """Symmetric cross-entropy of unit features (fp32 or fp64) at a scalar `scale`, in O((b + B) D) memory."""
    outputs: Any = _Tiled.apply(
        features.image,
        features.all_text,
        scale,
        positives,
        features.first_row,
        features.sum_over_processes,
        features.max_over_processes,
    )
    return Figures(*outputs)


@dataclass
class _Columns:
    """Running figures of the B columns over the rows seen so far, each (B,)."""

    largest: Tensor
    total: Tensor
    """Sum of exp(logit - largest)."""
    positive: Tensor
    """Sum of the positives' logits."""
    best_positive: Tensor
    best_negative: Tensor

    @staticmethod
    def start(columns: int, like: Tensor) -> _Columns:
        lowest = like.new_full((columns,), -torch.inf)
        return _Columns(lowest, like.new_zeros(columns), like.new_zeros(columns), lowest.clone(), lowest.clone())

    def over_processes(self, add: Callable[[Tensor], Tensor], largest: Callable[[Tensor], Tensor]) -> _Columns:
        """The same over the rows of all processes."""
        best_positive, best_negative = largest(torch.stack([self.best_positive, self.best_negative]))
        top = torch.maximum(best_positive, best_negative)
        total, positive = add(torch.stack([self.total * (self.largest - top).exp(), self.positive]))
        return _Columns(top, total, positive, best_positive, best_negative)


class _Tiled(torch.autograd.Function):
    """Backward gives a process the gradient of its own block of logits: all of its images', its part of all texts'
    and of the scale's. The gather's backward sums the former and gradient averaging means the latter, as for any loss
    that is a mean over local rows. The incoming gradient must be the same in every process, as a loss's is."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        all_text: Tensor,
        scale: Tensor,
        positives: Positives,
        first_row: int,
        sum_over_processes: Callable[[Tensor], Tensor],
        max_over_processes: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, ...]:
        b, counts = len(image), positives.counts(len(all_text), image)
        own = slice(first_row, first_row + b)
        columns = _Columns.start(len(all_text), image)
        row_top, row_total, row_positive = image.new_zeros(3, b)
        image_right = torch.empty(b, dtype=torch.bool, device=image.device)
        other = image.new_empty(0)
        for rows in row_runs(b, len(all_text), image.device):
            tile = times_transposed(scale * image[rows], all_text)
            row, column = positives.within(rows, image.device)
            logit = tile[row, column]
            row_positive[rows].index_add_(0, row, logit)
            columns.positive.index_add_(0, column, logit)
            best = image.new_full((len(tile),), -torch.inf).scatter_reduce_(0, row, logit, "amax")
            columns.best_positive.scatter_reduce_(0, column, logit, "amax")

            tile[row, column] = -torch.inf
            best_negative = tile.amax(dim=1)
            torch.maximum(columns.best_negative, tile.amax(dim=0), out=columns.best_negative)
            tile[row, column] = logit
            image_right[rows] = best > best_negative

            row_top[rows] = torch.maximum(best, best_negative)
            other = torch.sub(tile, row_top[rows, None], out=_like(tile, other))
            torch.sum(other.exp_(), dim=1, out=row_total[rows])
            top = torch.maximum(columns.best_positive, columns.best_negative)
            columns.total.mul_((columns.largest - top).exp_()).add_(tile.sub_(top).exp_().sum(dim=0))
            columns.largest = top
        columns = columns.over_processes(sum_over_processes, max_over_processes)

        image_to_text = row_top - row_positive / counts[own] + row_total.log()
        text_to_image = (columns.largest - columns.positive / counts + columns.total.log())[own]
        text_right = (columns.best_positive > columns.best_negative)[own]
        ctx.save_for_backward(image, all_text, scale, row_top, row_total, columns.largest, columns.total, counts)
        ctx.positives = positives
        ctx.mark_non_differentiable(image_to_text, text_to_image, image_right, text_right)
        total = (image_to_text.mean() + text_to_image.mean()) / 2
        return total, image_to_text, text_to_image, image_right, text_right

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator hides the name of ctx
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        image, all_text, scale, row_top, row_total, column_top, column_total, counts = ctx.saved_tensors
        row_share, column_share = 1 / row_total, 1 / column_total
        image_grad, text_grad = torch.empty_like(image), torch.zeros_like(all_text)
        other = image.new_empty(0)
        for rows in row_runs(len(image), len(all_text), image.device):
            tile = times_transposed(scale * image[rows], all_text)
            row, column = ctx.positives.within(rows, image.device)
            # The maximum and the sum stay apart: the log-sum-exp itself, 30, say, would be off by its own last bit,
            # 2e-6, which is much where a positive's probability is all but 1.
            other = torch.sub(tile, row_top[rows, None], out=_like(tile, other)).exp_()
            tile.sub_(column_top).exp_().mul_(column_share).addcmul_(other, row_share[rows, None])
            tile[row, column] -= 2 / counts[column]  # before any product rounds
            image_grad[rows] = times_transposed(tile, all_text.T)
            text_grad.addmm_(tile.T, image[rows])  # in place: a product of its own would take a (B, D) more
        factor = gradients[0] / (2 * len(image))
        # S = scale * cosines, so the sum of dL/dS times cosines is that of dL/d(scale * image) times image.
        scale_grad = (image_grad * image).sum() * factor
        factor = factor * scale
        return image_grad.mul_(factor), text_grad.mul_(factor), scale_grad, None, None, None, None


def _like(tile: Tensor, kept: Tensor) -> Tensor:
    """Memory of a tile's shape: what was kept of the tile before, where it has it."""
    return kept if kept.shape == tile.shape else torch.empty_like(tile)
