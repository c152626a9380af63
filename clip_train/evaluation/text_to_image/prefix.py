"""What an encoder under test is given: one linear map from its features to the generator's prefix, and nothing else.

It begins as ridge regression onto the neutral prefix of each training picture's fullest caption (closed form; the
penalty by squared error on dev), then follows the likelihood of the training pictures' codes through the frozen
transformer for a fixed number of steps, and keeps what was best on dev. The pool is the one whose ridge map gives dev
pictures the best likelihood.

Shapes: `N` training texts, `F` width of the features, `P * W` of a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_train.errors import DataError
from clip_train.evaluation.text_to_image.generator import Generator, Part
from clip_train.evaluation.text_to_image.model import PictureModel

PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of ridge regression, as shares of the number of training texts."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class LinearPrefix:
    """`offset = (features - mean) / std @ weight + bias`."""

    mean: Tensor
    std: Tensor
    """(F,) of the training texts."""
    weight: Tensor
    """(F, P * W)"""
    bias: Tensor
    """(P * W,)"""

    def standardised(self, features: Vectors) -> Tensor:
        """`(N, F)` float32."""
        return (torch.from_numpy(features).float() - self.mean) / self.std

    def __call__(self, features: Vectors) -> Tensor:
        """`(N, F)` -> offsets `(N, P * W)`."""
        return self.standardised(features) @ self.weight + self.bias


@dataclass(frozen=True)
class Fit:
    """A fitted map and how it came about."""

    prefix: LinearPrefix
    pool: str
    penalty: float
    dev_bits: dict[str, float]
    """Of each pool's ridge map."""
    tuned_bits: float
    """Of the map that was kept."""
    kept_step: int


def fit_prefix(
    generator: Generator,
    train: Part,
    dev: Part,
    features: Mapping[str, tuple[Vectors, Vectors]],
    *,
    steps: int = 60,
    batch: int = 64,
    lr: float = 1e-4,
    seed: int = 0,
) -> Fit:
    """Fit the map of an encoder.

    Args:
        features: by pool, `(N, F)` of `train.texts` and `(M, F)` of `dev.texts`.

    Raises:
        DataError: no pool, features that are not finite, or none that tells two texts apart.
    """
    targets = generator.words(generator.words.bags([captions[-1] for captions in train.captions]))
    wanted = generator.words(generator.words.bags([captions[-1] for captions in dev.captions]))
    tried: dict[str, tuple[LinearPrefix, float]] = {}
    bits: dict[str, float] = {}
    for pool, (own, held) in features.items():
        if not (np.isfinite(own).all() and np.isfinite(held).all()):
            raise DataError(f"pool {pool!r} gives features that are not finite numbers")
        if float(own.std(axis=0).max()) == 0:
            continue  # the same for every text, as the first token under a causal mask
        tried[pool] = ridge(own, targets, held, wanted)
        bits[pool] = float(generator.model.bits_of(dev.codes, tried[pool][0](held)).mean())
    if not bits:
        raise DataError(f"no pool gives texts features that differ: {', '.join(features) or 'there is no pool'}")
    pool = min(bits, key=lambda name: bits[name])
    start, penalty = tried[pool]
    own, held = features[pool]
    prefix, tuned, kept = follow_likelihood(
        generator.model,
        start,
        train.codes,
        own,
        dev.codes,
        held,
        bits[pool],
        steps=steps,
        batch=batch,
        lr=lr,
        seed=seed,
    )
    return Fit(prefix, pool, penalty, bits, tuned, kept)


def ridge(own: Vectors, targets: Tensor, held: Vectors, wanted: Tensor) -> tuple[LinearPrefix, float]:
    """The ridge map of standardised features, with the penalty whose squared error on `held` is least."""
    x = torch.from_numpy(own).double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)  # a constant feature says nothing
    x = (x - mean) / std
    bias = targets.double().mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    turned = vectors.T @ (x.T @ (targets.double() - bias))
    z = (torch.from_numpy(held).double() - mean) / std
    best: tuple[float, Tensor, float] | None = None
    for penalty in PENALTIES:
        weight = vectors @ (turned / (values.clamp(min=0) + penalty * len(own))[:, None])
        error = float((z @ weight + bias - wanted.double()).square().mean())
        if best is None or error < best[0]:
            best = (error, weight, penalty)
    assert best is not None
    return LinearPrefix(mean.float(), std.float(), best[1].float(), bias.float()), best[2]


def follow_likelihood(
    model: PictureModel, start: LinearPrefix, codes: Tensor, own: Vectors, dev_codes: Tensor, held: Vectors,
    dev_bits: float, *, steps: int, batch: int, lr: float, seed: int,
) -> tuple[LinearPrefix, float, int]:  # fmt: skip
    """Adam on the map alone, its rate falling to zero; the best on dev of the start, the middle and the end.

    Returns:
        The map, its bits a code on dev, and the step it is from.
    """
    x = start.standardised(own)
    weight, bias = start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    draw = torch.Generator().manual_seed(seed)
    best = (start, dev_bits, 0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        picked = torch.randint(len(x), (batch,), generator=draw)
        loss = model.bits(codes[picked], x[picked] @ weight + bias).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in (steps // 2, steps):
            found = LinearPrefix(start.mean, start.std, weight.detach().clone(), bias.detach().clone())
            bits = float(model.bits_of(dev_codes, found(held)).mean())
            if bits < best[1]:
                best = (found, bits, step + 1)
    return best
