"""Tiled InfoNCE and sigmoid loss against float64 references of ten lines, open_clip, and their own dense form."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clip_train.objectives import tiles
from clip_train.objectives.base import Features, Loss
from clip_train.objectives.contrastive import InfoNCE
from clip_train.objectives.sigmoid import Sigmoid

Kind = Literal["infonce", "sigmoid"]
BIAS = -9.0


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a tile: many tiles, and a last one that is smaller."""
    monkeypatch.setattr(tiles, "CPU_TILE", 1)
    monkeypatch.setattr(tiles, "LEAST_ROWS", 7)


def unit(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=1).to(dtype)


def pairs(rows: int, width: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Captions that are somewhat like their pictures."""
    image = unit(rows, width, 0)
    return image.to(dtype), F.normalize(image + 0.8 * unit(rows, width, 1), dim=1).to(dtype)


def reference(kind: Kind, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, groups: Tensor) -> Tensor:
    """The loss of each pair, from its definition, in whatever precision the arguments have."""
    logits, same = scale * image @ text.T, (groups[:, None] == groups).to(image.dtype)
    if kind == "sigmoid":
        return -F.logsigmoid((2 * same - 1) * (logits + bias)).sum(dim=1)
    target = same / same.sum(dim=1)
    rows = [-(target * block.log_softmax(dim=1)).sum(dim=1) for block in (logits, logits.T)]
    return (rows[0] + rows[1]) / 2


def loss_of(kind: Kind, impl: Any, features: Features, scale: Tensor, bias: Tensor) -> Loss:
    equal = features.groups is not None
    if kind == "sigmoid":
        return Sigmoid(equal, impl).loss(features, scale, bias)
    return InfoNCE(equal, impl).loss(features, scale)


def gradients(total: Tensor, leaves: list[Tensor], kind: Kind) -> list[Tensor]:
    return list(torch.autograd.grad(total, leaves if kind == "sigmoid" else leaves[:3]))


def compare(
    kind: Kind,
    impl: str,
    image: Tensor,
    text: Tensor,
    scale: float,
    groups: Tensor | None = None,
    within: float = 1e-5,
) -> None:
    """Loss, rows and gradients against float64 ones, relative to the largest entry of each.

    What a probability of almost 1 lacks of 1 cannot be known better than to the last bit of 1: that is allowed for.
    """
    last_bit = 4 * torch.finfo(image.dtype).eps * scale / len(image)
    given = [image, text, *(torch.tensor(value, dtype=image.dtype) for value in (scale, BIAS))]
    leaves = [leaf.clone().requires_grad_() for leaf in given]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rows = reference(kind, *exact, groups=torch.arange(len(image)) if groups is None else groups)  # pyright: ignore[reportArgumentType]
    loss = loss_of(kind, impl, Features.local(leaves[0], leaves[1], groups), leaves[2], leaves[3])
    assert loss.rows is not None
    assert not loss.rows.requires_grad
    assert float(loss.total) == pytest.approx(float(rows.mean()), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(loss.rows.double(), rows.detach(), rtol=1e-5, atol=1e-4 if scale > 50 else 1e-5)
    names = ("image", "text", "scale", "bias")
    # Twice the loss, for the incoming gradient must count.
    found, expected = gradients(2 * loss.total, leaves, kind), gradients(2 * rows.mean(), exact, kind)
    for name, actual, wanted in zip(names, found, expected, strict=False):
        assert actual.dtype == image.dtype
        assert (actual - wanted).abs().max() <= within * wanted.abs().max() + last_bit, name


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("rows", [1, 5, 7, 14, 37])
def test_against_a_float64_reference(kind: Kind, impl: str, rows: int) -> None:
    if kind == "sigmoid" or rows > 1:  # one pair has an InfoNCE of zero, and gradients of rounding
        compare(kind, impl, *pairs(rows), 20.0)
    compare(kind, impl, *pairs(rows + 1, dtype=torch.float64), 20.0, within=1e-12)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("rows", [9, 40])
def test_equal_captions(kind: Kind, rows: int) -> None:
    groups = torch.randint(0, rows // 2, (rows,), generator=torch.Generator().manual_seed(2)) * 5
    for impl in ("dense", "tiled"):
        compare(kind, impl, *pairs(rows), 20.0, groups)
    compare(kind, "tiled", *pairs(rows, dtype=torch.float64), 20.0, groups, within=1e-12)
    compare(kind, "tiled", *pairs(rows, dtype=torch.float64), 20.0, torch.arange(rows) % 1, within=1e-12)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_the_largest_scale_over_the_whole_range_of_cosines(kind: Kind) -> None:
    """At scale 100 a pair that no picture is like (all its cosines -1) stands beside perfect ones (1): logits range
    over 200, and e^-200 is no fp32 number."""
    axis = F.one_hot(torch.tensor(0), 8).float()
    image = torch.cat([axis.repeat(20, 1), unit(12, 8, 3)])
    text = torch.cat([axis.repeat(10, 1), -axis.repeat(10, 1), unit(12, 8, 4)])
    compare(kind, "tiled", image, text, 100.0)
    compare(kind, "tiled", image.flip(0), text.flip(0), 100.0)
    compare(kind, "tiled", image.double(), text.double(), 100.0, within=1e-12)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_near_the_end_of_training(kind: Kind) -> None:
    """Probabilities of positives are all but 1, so that the gradient is what is left of a difference."""
    image = unit(24, 32, 5)
    compare(kind, "tiled", image, F.normalize(image + 0.02 * unit(24, 32, 6), dim=1), 30.0)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    rows=st.integers(1, 24), kinds=st.integers(1, 24), seed=st.integers(0, 999), scale=st.floats(0.01, 100.0),
    kind=st.sampled_from(["infonce", "sigmoid"]),
)  # fmt: skip
def test_any_batch_is_as_in_the_dense_form(rows: int, kinds: int, seed: int, scale: float, kind: Kind) -> None:
    """Also with repeated pictures and captions, whose logits tie."""
    chosen = torch.randint(0, kinds, (2, rows), generator=torch.Generator().manual_seed(seed))
    image, text = unit(kinds, 8, seed, torch.float64)[chosen[0]], unit(kinds, 8, seed + 1, torch.float64)[chosen[1]]
    results: list[tuple[Loss, list[Tensor]]] = []
    for impl in ("dense", "tiled"):
        leaves = [image, text, torch.tensor(scale, dtype=torch.float64), torch.tensor(BIAS, dtype=torch.float64)]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        loss = loss_of(kind, impl, Features.local(leaves[0], leaves[1], chosen[1]), leaves[2], leaves[3])
        results.append((loss, gradients(loss.total, leaves, kind)))
    (dense, dense_gradients), (tiled, tiled_gradients) = results
    torch.testing.assert_close(tiled.rows, dense.rows, rtol=1e-9, atol=1e-9)
    for actual, expected in zip(tiled_gradients, dense_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_terms_and_accuracies_are_those_of_the_dense_form(kind: Kind, equal: bool) -> None:
    image, text = pairs(50, 6)
    features = Features.local(image, text, torch.arange(50) % 20 if equal else None)
    dense, tiled = (
        loss_of(kind, impl, features, torch.tensor(15.0), torch.tensor(BIAS)) for impl in ("dense", "tiled")
    )
    assert dense.stats.keys() == tiled.stats.keys()
    assert dense.terms.keys() == tiled.terms.keys()
    for name, value in (dense.stats | dense.terms).items():
        torch.testing.assert_close((tiled.stats | tiled.terms)[name], value, rtol=1e-5, atol=1e-6)
    assert all(0.1 < float(value) < 0.9 for value in dense.stats.values()), "a case that tells right from wrong"


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_against_open_clip(kind: Kind, impl: str) -> None:
    leaves = [*pairs(33, 24, torch.float64), torch.tensor(30.0).double(), torch.tensor(BIAS).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    ours = loss_of(kind, impl, Features.local(leaves[0], leaves[1]), leaves[2], leaves[3]).total
    theirs = SigLipLoss()(*leaves) if kind == "sigmoid" else ClipLoss()(*leaves[:3])
    torch.testing.assert_close(ours, theirs)
    for actual, expected in zip(gradients(ours, leaves, kind), gradients(theirs, leaves, kind), strict=True):
        assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@contextmanager
def saved_elements() -> Generator[list[int]]:
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        yield sizes


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_no_tensor_is_larger_than_a_tile_or_the_features(kind: Kind, equal: bool) -> None:
    rows, width = 200, 12
    bound = max(7 * rows, rows * width)
    seen: dict[str, int] = {}
    for impl in ("tiled", "dense"):
        image, text = (tensor.requires_grad_() for tensor in pairs(rows, width))
        features = Features.local(image, text, torch.arange(rows) // 2 if equal else None)
        with Largest() as largest, saved_elements() as saved:
            loss_of(kind, impl, features, torch.tensor(10.0), torch.tensor(BIAS)).total.backward()
        seen[impl] = max(largest.elements, *saved)
    assert seen["tiled"] <= bound
    assert seen["dense"] >= rows * rows > bound, "the measure would have seen a whole matrix"


def test_auto_tiles_where_the_logits_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, bound = 20, 7 * 20
    elements: list[int] = []
    for limit in (400, 399):
        monkeypatch.setattr(tiles, "CPU_DENSE", limit)
        with Largest() as largest:
            loss_of("infonce", "auto", Features.local(*pairs(rows, 4)), torch.tensor(10.0), torch.tensor(BIAS))
        elements.append(largest.elements)
    assert elements == [400, bound]


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_without_gradients_the_loss_is_the_same(kind: Kind) -> None:
    image, text = pairs(30)
    scalars = torch.tensor(10.0), torch.tensor(BIAS)
    with torch.no_grad():
        quiet = loss_of(kind, "tiled", Features.local(image, text), *scalars).total
    assert torch.equal(quiet, loss_of(kind, "tiled", Features.local(image.requires_grad_(), text), *scalars).total)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_the_tiled_loss_is_fp32_under_autocast(kind: Kind) -> None:
    features = Features.local(*pairs(30))
    scalars = torch.tensor(100.0), torch.tensor(BIAS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_of(kind, "tiled", features, *scalars).total
    assert torch.equal(inside, loss_of(kind, "tiled", features, *scalars).total)
