"""Views out of JPEGs that were shrunk while they were decoded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tars import encoded

from clip_train.data.hashing import uniform
from clip_train.data.transforms import DRAWS, Augment


def drawn(count: int) -> np.ndarray:
    return uniform(0, np.arange(count)[:, None], np.arange(DRAWS))


@pytest.mark.parametrize(("size", "shrinks"), [(201, {1}), (165, {1, 2}), (64, {4}), (24, {8})])
def test_scaled_decoding_shows_the_same_part(size: int, shrinks: set[int]) -> None:
    """A smooth picture, on which a wrong box would show at once."""
    y, x = np.mgrid[:400, :600]
    smooth = np.stack([x * 255 / 600, y * 255 / 400, (x + y) * 0.2], -1).astype(np.uint8)
    data = encoded(Image.fromarray(smooth), "JPEG", quality=97, subsampling=0)
    exact = Augment(size, crop_scale=(0.5, 1.0))
    scaled = Augment(size, crop_scale=(0.5, 1.0), scaled_decode=True)
    seen = set[int]()
    for draws in drawn(40):
        pixels, box = scaled.part(data, draws)
        assert box[0] >= 0 and box[0] + box[2] <= pixels.shape[1] and min(box[2:]) >= size
        assert box[1] >= 0 and box[1] + box[3] <= pixels.shape[0]
        seen.add(round(600 / pixels.shape[1]))
        difference = exact.view(data, draws).int() - scaled.view(data, draws).int()
        assert difference.abs().max() <= 6  # half a pixel of the shrunk picture, and two roundings
        assert difference.float().abs().mean() < 1.5
    assert seen == shrinks


def test_what_cannot_be_shrunk_is_decoded_as_always() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    exact, scaled = (Augment(24, scaled_decode=on) for on in (False, True))
    draws = drawn(1)[0]
    png = encoded(Image.fromarray(pixels), "PNG")
    assert torch.equal(exact.view(png, draws), scaled.view(png, draws))
