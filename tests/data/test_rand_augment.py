from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import encoded
from torchvision.transforms import v2

from clip_train.data.hashing import uniform
from clip_train.data.rand_augment import OPERATIONS, RandAugment, apply
from clip_train.data.transforms import DRAWS, Augment

THEIRS = [
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
]  # fmt: skip
FILL = 37


def picture() -> torch.Tensor:
    """Smooth, with an edge; not using all levels, so that the contrast can be stretched."""
    y, x = np.mgrid[:64, :64]
    planes = np.stack([20 + 2 * x, 200 - 2 * y, 90 + (x > y) * 60 + (x + y) // 8])
    return torch.from_numpy(planes.astype(np.uint8))


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_torchvisions(
    operation: str, magnitude: int, negative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference: Any = v2.RandAugment(1, magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill=FILL)
    assert list(reference._AUGMENTATION_SPACE) == THEIRS and len(THEIRS) == len(OPERATIONS)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(OPERATIONS.index(operation)))
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(0.1 if negative else 0.9))
    expected = reference(picture())
    found = apply(picture(), operation, magnitude, negative, FILL)
    assert found.dtype == torch.uint8
    if operation == "contrast":  # a mean with another rounding
        assert (found.int() - expected.int()).abs().max() <= 1
    else:
        assert torch.equal(found, expected)


def test_operations_and_signs_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Counter[tuple[str, bool]]()

    def record(image: torch.Tensor, operation: str, magnitude: int, negative: bool, fill: int) -> torch.Tensor:
        assert (magnitude, fill) == (7, FILL)
        seen[operation, negative] += 1
        return image

    monkeypatch.setattr("clip_train.data.rand_augment.apply", record)
    for draws in uniform(5, np.arange(3000)[:, None], np.arange(4)):
        RandAugment(2, 7)(picture(), draws, FILL)
    assert len(seen) == 28 and sum(seen.values()) == 6000
    assert min(seen.values()) > 150 and max(seen.values()) < 280  # 214 expected, standard deviation 14


def test_it_is_part_of_the_view_and_a_function_of_the_draws() -> None:
    rows = uniform(0, np.arange(20)[:, None], np.arange(DRAWS))
    data = encoded(Image.fromarray(picture().permute(1, 2, 0).numpy()), "PNG")
    plain, changed = Augment(32), Augment(32, rand_augment=RandAugment(2, 20))
    views = [changed.view(data, draws) for draws in rows]
    torch.manual_seed(1)  # of no concern
    assert all(torch.equal(changed.view(data, draws), view) for draws, view in zip(rows, views, strict=True))
    assert sum(not torch.equal(plain.view(data, draws), view) for draws, view in zip(rows, views, strict=True)) > 12
    for draws, view in zip(rows, views, strict=True):
        expected = RandAugment(2, 20)(plain.view(data, draws), draws[32:], fill=255)
        assert torch.equal(view, expected)
