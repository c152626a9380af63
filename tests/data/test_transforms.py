from __future__ import annotations

import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from clip_train.data.hashing import uniform
from clip_train.data.transforms import (
    DRAWS,
    Augment,
    Preprocess,
    crop_box,
    hue_matrix,
    normalize,
    recolour,
    resize_crop,
    saturation_matrix,
    warp,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IDENTITY = np.array([[[1.0, 0, 0], [0, 1, 0]]])


def noise(height: int, width: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (height, width, 3), dtype=np.uint8)


def drawn(count: int) -> np.ndarray:
    return uniform(0, np.arange(count)[:, None], np.arange(DRAWS))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(384, 512), (300, 200), (64, 64), (50, 60), (224, 224), (17, 1000)])
@pytest.mark.parametrize("how", ["shortest", "squash"])
def test_preprocess_is_open_clips(mode: str, size: tuple[int, int], how: str) -> None:
    theirs = open_clip.image_transform(64, is_train=False, mean=MEAN, std=STD, interpolation=mode, resize_mode=how)
    ours = Preprocess(64, MEAN, STD, mode, how)  # type: ignore[arg-type]
    image = Image.fromarray(noise(*size))
    std = torch.tensor(STD).view(3, 1, 1)
    assert ((ours(image) - theirs(image)) * std).abs().max() <= 1.001 / 255


def test_longest_pads() -> None:
    ours = Preprocess(64, MEAN, STD, "bicubic", "longest")
    theirs = open_clip.image_transform(
        64, is_train=False, mean=MEAN, std=STD, interpolation="bicubic", resize_mode="longest"
    )
    image = Image.fromarray(noise(100, 200))
    difference = ((ours(image) - theirs(image)) * torch.tensor(STD).view(3, 1, 1)).abs()
    assert difference.max() <= 1.001 / 255


def test_preprocess_takes_any_mode() -> None:
    ours = Preprocess(16, MEAN, STD)
    assert ours(Image.new("L", (20, 30), 7)).shape == (3, 16, 16)
    clear = ours(Image.new("RGBA", (20, 30), (0, 0, 0, 0)))
    assert torch.equal(clear, ours(Image.new("RGB", (20, 30), "white")))


def test_normalize() -> None:
    images = torch.from_numpy(noise(8, 8)).permute(2, 0, 1)[None]
    expected = reference.normalize(reference.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))
    assert torch.allclose(normalize(images, MEAN, STD), expected, atol=1e-5)
    assert normalize(images, MEAN, STD, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("box", [(10, 20, 300, 200), (0, 0, 512, 384), (100, 50, 30, 40), (511, 383, 1, 1)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_crop_is_pillows_antialiased_resize(box: tuple[int, int, int, int], mode: str) -> None:
    pixels = noise(384, 512)
    left, top, width, height = box
    part = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    expected = np.asarray(part.resize((64, 64), getattr(Image.Resampling, mode.upper()))).astype(int)
    found = resize_crop(pixels, box, 64, mode).permute(1, 2, 0).numpy()  # type: ignore[arg-type]
    assert np.abs(found - expected).max() <= 1


def test_no_change_is_identity() -> None:
    pixels = noise(32, 32)
    plain = Augment(32, crop_scale=(1, 1), crop_ratio=(1, 1))
    image = plain.crop(pixels, drawn(1)[0])
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(plain.batch(image[None].clone(), drawn(1))[0], image)
    view = image[None].float()
    assert torch.allclose(warp(view, IDENTITY, 255, "bicubic"), view, atol=1e-3)
    assert torch.equal(recolour(view, np.eye(3, 4)[None]), view)


def test_crop_boxes_have_the_asked_areas_and_ratios() -> None:
    boxes = [
        crop_box(400, 300, (0.2, 0.6), (0.5, 2.0), row) for row in uniform(3, np.arange(2000)[:, None], np.arange(20))
    ]
    left, top, width, height = np.array(boxes).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 400).all() and (top + height <= 300).all()
    area, ratio = width * height / 120_000, np.log(width / height)
    assert 0.19 < area.min() < 0.21 and 0.59 < area.max() < 0.61
    assert area.mean() == pytest.approx(0.4, abs=0.02)
    assert np.abs(ratio).max() < math.log(2.05) and abs(ratio.mean()) < 0.1  # long boxes fit less often
    # Every place is reached: the boxes touch all borders.
    assert left.min() == top.min() == 0 and (left + width).max() == 400 and (top + height).max() == 300


def test_a_crop_that_never_fits_falls_back_to_the_allowed_centre() -> None:
    # As torchvision: the largest centred part whose ratio is allowed.
    assert crop_box(1000, 10, (1, 1), (0.75, 4 / 3), np.full(20, 0.5)) == (493, 0, 13, 10)
    assert crop_box(10, 1000, (1, 1), (0.75, 4 / 3), np.full(20, 0.5)) == (0, 493, 10, 13)
    assert crop_box(1, 1, (0.9, 1), (0.75, 4 / 3), np.full(20, 0.5)) == (0, 0, 1, 1)


def test_flip() -> None:
    images = torch.from_numpy(np.stack([noise(8, 8)] * 64)).permute(0, 3, 1, 2).contiguous()
    draws = drawn(64)
    flipped = Augment(8, flip=0.5).batch(images.clone(), draws)
    warped = Augment(8, flip=0.5, rotate=1e-9).batch(images.clone(), draws)
    assert torch.equal(flipped, warped)  # both ways of doing it
    for row in range(64):
        expected = images[row].flip(-1) if draws[row, 0] < 0.5 else images[row]
        assert torch.equal(flipped[row], expected)
    assert 16 < (draws[:, 0] < 0.5).sum() < 48


@pytest.mark.parametrize("degrees", [90.0, 30.0, -17.0])
def test_rotation_is_torchvisions(degrees: float) -> None:
    images = torch.from_numpy(noise(33, 33)).permute(2, 0, 1)[None].float()
    augment = Augment(33, rotate=90.0, fill=128, interpolation="bilinear")
    draws = drawn(1)
    draws[0, 1] = (degrees / 90 + 1) / 2
    maps = augment._affine(draws, np.array([False]))
    found = warp(images, maps, 128, "bilinear")
    expected = reference.rotate(images, degrees, reference.InterpolationMode.BILINEAR, fill=[128.0] * 3)
    # torchvision blends its fill at the border by another rule: compare inside of the inscribed circle.
    y, x = np.mgrid[:33, :33] - 16
    inside = torch.from_numpy(np.hypot(x, y) < 15)
    assert (found - expected).abs()[..., inside].max() < 0.1


def test_zoom_out_shrinks_onto_the_fill() -> None:
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    shrunk = Augment(32, zoom_out=2.0, fill=255).batch(images, drawn(200))
    share = (shrunk < 128).float().mean(dim=(1, 2, 3))
    assert share.min() > 0.2 and share.max() <= 1.0  # between a quarter and all of the canvas
    assert share.min() < 0.3 and share.max() > 0.95
    dark = shrunk[:, 0] < 128
    assert dark[:, 0, 0].any() and dark[:, -1, -1].any()  # the picture reaches all corners...
    assert (~dark[:, 0, 0]).any() and (~dark[:, -1, -1]).any()  # ...and leaves all corners


def colours_of(pixels: torch.Tensor, **changes: float) -> tuple[torch.Tensor, np.ndarray]:
    """All colour draws at their largest: 1 + change."""
    draws = np.full((1, DRAWS), 1.0)
    draws[0, [5, 10]] = 0.0
    augment = Augment(pixels.shape[-1], color_probability=1.0, **changes)
    return augment.batch(pixels[None].clone(), draws)[0].float(), draws


@pytest.mark.parametrize(
    ("changes", "name", "factor"),
    [
        ({"brightness": 0.3}, "adjust_brightness", 1.3),
        ({"contrast": 0.4}, "adjust_contrast", 1.4),
        ({"saturation": 0.5}, "adjust_saturation", 1.5),
    ],
)
def test_colours_are_torchvisions(changes: dict[str, float], name: str, factor: float) -> None:
    pixels = torch.from_numpy(noise(32, 32, 90, 140)).permute(2, 0, 1)  # away from the ends: nothing is clipped
    found, _ = colours_of(pixels, **changes)
    expected = getattr(reference, name)(pixels, factor).float()
    assert (found - expected).abs().max() <= 1.5


def test_all_colours_together_are_torchvisions_one_after_another() -> None:
    pixels = torch.from_numpy(noise(32, 32, 90, 130)).permute(2, 0, 1)
    found, _ = colours_of(pixels, brightness=0.2, contrast=0.3, saturation=0.4)
    expected = reference.adjust_brightness(pixels.float() / 255, 1.2)
    expected = reference.adjust_contrast(expected, 1.3)
    expected = reference.adjust_saturation(expected, 1.4) * 255
    assert (found - expected).abs().max() <= 1.0


def test_grayscale() -> None:
    pixels = torch.from_numpy(noise(16, 16)).permute(2, 0, 1)
    found, _ = colours_of(pixels, grayscale=1.0)
    assert (found - reference.rgb_to_grayscale(pixels, 3).float()).abs().max() <= 1.0


def test_hue_keeps_grey_and_turns_colours_as_torchvision() -> None:
    for turns in (0.0, 0.1, -0.3, 0.5):
        matrix = hue_matrix(turns)
        assert np.allclose(matrix @ np.ones(3), 1)
        assert np.allclose(np.linalg.inv(matrix), hue_matrix(-turns))
    assert np.allclose(hue_matrix(0.0), np.eye(3), atol=1e-6)
    # The direction is torchvision's: a third of the circle takes red to green, and greenish is what we get.
    assert np.argmax(hue_matrix(1 / 3)[:, 0]) == 1
    red = torch.tensor([0.6, 0.4, 0.4]).view(3, 1, 1)
    assert torch.argmax(reference.adjust_hue(red, 1 / 3).flatten()) == 1


def test_saturation_matrix_ends() -> None:
    assert np.allclose(saturation_matrix(1.0), np.eye(3))
    assert np.allclose(saturation_matrix(0.0) @ [10.0, 20.0, 30.0], 0.299 * 10 + 0.587 * 20 + 0.114 * 30)


def test_pixels_do_not_depend_on_the_company() -> None:
    """A sample's view is the same alone, in any batch, at any place, and with any number of threads."""
    full = Augment(
        24, flip=0.5, rotate=20, zoom_out=1.4, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2
    )
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (37, 3, 24, 24), dtype=np.uint8))
    draws = drawn(37)
    together = full.batch(images.clone(), draws)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in ([5], [36, 5, 0], list(range(30, 4, -1))):
                assert torch.equal(full.batch(images[rows].clone(), draws[rows]), together[rows])
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(together, images)
