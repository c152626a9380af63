"""Spoiled pictures: by hand and by scipy where they can be, and what must hold of all of them."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage  # pyright: ignore
from torch import Tensor

from clip_train.config.evaluation import CorruptionName
from clip_train.config.schema import ZeroShot
from clip_train.data.collections.shards import Shards
from clip_train.data.samples import read_samples
from clip_train.data.transforms import Preprocess
from clip_train.evaluation.corruptions import CORRUPTIONS, Corruption
from clip_train.evaluation.report_robustness import robustness as chart
from clip_train.evaluation.robustness import robustness
from clip_train.evaluation.run import evaluate
from clip_train.evaluation.run_folder import read_run

from .colours import COLOURS, Loaded, loaded, write_shard
from .ranks import run_ranks


def landscape(side: int, seed: int = 0) -> Tensor:
    """(3, side, side) uint8 with the 1 / f spectrum of photographs and some saturation."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]) * side
    spectrum = np.fft.rfft2(rng.standard_normal((3, side, side))) / np.maximum(frequency, 1)
    pixels = np.fft.irfft2(spectrum, (side, side))
    pixels -= pixels.min()
    return torch.from_numpy(np.round(pixels / pixels.max() * 255).astype(np.uint8))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).square().mean().sqrt())


def test_the_recipe_knows_the_same_names() -> None:
    assert list(get_args(CorruptionName)) == list(CORRUPTIONS)
    assert all(len(degrees) == 5 for _, degrees in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_more_severe_is_more_distorted(name: str) -> None:
    for side in (64, 160):
        clean = landscape(side)
        spoiled = [Corruption(name, severity)(clean, "k") for severity in range(6)]
        assert all(one.shape == clean.shape and one.dtype == torch.uint8 for one in spoiled)
        assert torch.equal(spoiled[0], clean)
        found = [distance(one, clean) for one in spoiled]
        assert found[1] > 1, "to be seen, with the mildest too"
        assert all(more > less for less, more in pairwise(found)), found


RANDOM = {name for name in CORRUPTIONS if name.endswith("noise")} | {"motion_blur", "fog", "elastic_transform"}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_function_of_seed_key_and_severity(name: str) -> None:
    clean = landscape(48)
    first = Corruption(name, 3, 7)(clean, "k")
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(Corruption(name, 3, 7)(clean.clone(), "k"), first)
    for other in (Corruption(name, 3, 8)(clean, "k"), Corruption(name, 3, 7)(clean, "l")):
        assert torch.equal(other, first) == (name not in RANDOM)


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n.endswith("blur")] + ["pixelate", "elastic_transform"])
def test_what_moves_light_leaves_a_plain_picture_alone(name: str) -> None:
    plain = torch.tensor([200, 17, 90], dtype=torch.uint8)[:, None, None].expand(3, 40, 40).contiguous()
    assert int((Corruption(name, 5)(plain, "k").int() - plain.int()).abs().max()) <= 1


def test_brightness_contrast_and_pixelate_by_hand() -> None:
    pixels = torch.tensor([[100, 50, 0], [0, 0, 0], [255, 10, 255]], dtype=torch.uint8).T.reshape(3, 1, 3)
    bright = Corruption("brightness", 2)(pixels, "k")  # + 0.2 of 255 to the largest channel, the others in proportion
    assert bright[:, 0].T.tolist() == [[151, 76, 0], [51, 51, 51], [255, 10, 255]]
    grey = torch.tensor([[0, 200], [0, 200]], dtype=torch.uint8).expand(3, 2, 2)
    assert Corruption("contrast", 1)(grey, "k")[0].tolist() == [[60, 140], [60, 140]]  # 0.4 of ±100 about 100
    assert Corruption("contrast", 5)(grey, "k")[0].tolist() == [[95, 105], [95, 105]]  # 0.05
    squares = (torch.arange(16, dtype=torch.uint8) * 10).reshape(1, 4, 4).expand(3, 4, 4)
    # Half as many pixels a side: means of 0 10 40 50, of 20 30 60 70, and so on.
    expected = [[25, 25, 45, 45], [25, 25, 45, 45], [105, 105, 125, 125], [105, 105, 125, 125]]
    assert Corruption("pixelate", 2)(squares, "k")[1].tolist() == expected


def test_noise_has_the_deviation_that_it_says() -> None:
    grey = torch.full((3, 224, 224), 128, dtype=torch.uint8)
    found = Corruption("gaussian_noise", 1)(grey, "k").float() - 128
    assert float(found.std()) == pytest.approx(0.08 * 255, rel=0.02)
    assert float(found.mean()) == pytest.approx(0, abs=0.2)
    speckle = Corruption("speckle_noise", 2)(grey, "k").float() - 128
    assert float(speckle.std()) == pytest.approx(0.2 * 128, rel=0.02)
    shot = Corruption("shot_noise", 1)(grey, "k").float() / 255
    assert float(shot.var()) == pytest.approx(128 / 255 / 60, rel=0.03)  # Poisson: the variance is the mean
    impulse = Corruption("impulse_noise", 5)(grey, "k")
    assert float((impulse == 0).float().mean()) == pytest.approx(0.135, abs=0.003)
    assert float((impulse == 255).float().mean()) == pytest.approx(0.135, abs=0.003)


def test_gaussian_blur_is_scipys() -> None:
    clean = landscape(112)
    for severity, deviation in ((2, 1.0), (5, 3.0)):  # 2 and 6 pixels of 224
        # What falls on a pixel is a mean over its width, whose variance, 1/12, adds to the Gaussian's.
        deviation = (deviation**2 + 1 / 12) ** 0.5
        expected = np.stack(
            [
                ndimage.gaussian_filter(one.numpy().astype(np.float64), deviation, mode="nearest", truncate=3)
                for one in clean
            ]
        )
        found = Corruption("gaussian_blur", severity)(clean, "k").numpy()
        assert np.abs(found - expected).max() <= 1


def test_blur_spreads_a_point_over_a_disc_and_a_stroke() -> None:
    point = torch.zeros((3, 224, 224), dtype=torch.uint8)
    point[:, 112, 112] = 255
    float_point = point.float() / 255
    rng = np.random.default_rng(0)
    disc, stroke = (CORRUPTIONS[name][0](float_point, 10, rng)[0] for name in ("defocus_blur", "motion_blur"))
    for seen in (disc, stroke):
        assert float(seen.sum()) == pytest.approx(1, abs=1e-4), "light is moved, not made"
    at = torch.arange(224) - 112
    radius = torch.hypot(at[:, None].float(), at[None, :].float())
    assert float(disc[radius > 10.6].max()) == 0 < float(disc[radius < 9.4].min())
    assert float(stroke[radius > 6.5].max()) == 0
    vertical, horizontal = float((stroke * at[:, None] ** 2).sum()), float((stroke * at[None, :] ** 2).sum())
    assert horizontal > vertical, "within 45° of the horizontal"


def test_jpeg_is_pillows() -> None:
    clean = landscape(64)
    out = io.BytesIO()
    Image.fromarray(clean.permute(1, 2, 0).numpy()).save(out, "JPEG", quality=15, subsampling=2)
    expected = torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1)
    found = Corruption("jpeg_compression", 3)(clean, "k")
    assert distance(found, clean) == pytest.approx(distance(expected, clean), rel=0.02)
    assert distance(found, expected) < 0.2 * distance(expected, clean), "libraries round coefficients differently"


# ---------------------------------------------------------------------------------------- in a task

VIEW = Preprocess(24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def pictures() -> dict[str, Tensor]:
    return {f"p{number}": landscape(24, number) for number in range(17)}


def shard(path: Path, spoil: Corruption | None = None) -> Path:
    """Pictures of the view's size, so that nothing is resampled; spoiled beforehand where that is asked for."""
    samples: list[tuple[str, dict[str, bytes]]] = []
    for number, (key, pixels) in enumerate(pictures().items()):
        seen = pixels if spoil is None else spoil(pixels, key)
        out = io.BytesIO()
        Image.fromarray(seen.permute(1, 2, 0).numpy()).save(out, "PNG")
        samples.append((key, {"png": out.getvalue(), "cls": str(number % 6).encode()}))
    return write_shard(path, samples)


def model() -> Loaded:
    return Loaded(loaded().model, VIEW, loaded().tokenizer)


@pytest.mark.parametrize(("batch_size", "world", "workers"), [(17, 1, 0), (3, 1, 2), (2, 3, 0)])
def test_neither_batches_nor_ranks_nor_workers_change_a_picture(
    tmp_path: Path, batch_size: int, world: int, workers: int
) -> None:
    change = Corruption("elastic_transform", 4, seed=5)
    collection = Shards.of(str(shard(tmp_path / "a.tar")), label="cls")
    for rank in range(world):
        for batch in read_samples(
            collection, VIEW, batch_size=batch_size, rank=rank, world=world, workers=workers, change=change
        ):
            for key, seen in zip(batch.keys, batch.images, strict=True):
                assert torch.equal(seen, change(pictures()[key], key))


def test_accuracies_are_those_of_pictures_spoiled_beforehand(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(COLOURS))
    shard(tmp_path / "clean.tar")
    task = {"classes": "classes.txt", "corruptions": ["fog", "brightness", "gaussian_noise"], "severities": [2, 5]}
    tasks = {"t": ZeroShot.model_validate({"shards": "clean.tar", **task})}
    figures = evaluate(model(), tasks, relative_to=tmp_path, run_dir=tmp_path / "run")
    expected: dict[str, list[float]] = {}
    for name in task["corruptions"]:
        for severity in (2, 5):
            shard(tmp_path / "spoiled.tar", Corruption(name, severity))
            plain = {"t": ZeroShot(shards="spoiled.tar", classes="classes.txt")}
            top1 = evaluate(model(), plain, relative_to=tmp_path)["zeroshot/t/top1"]
            assert figures[f"zeroshot/t/corrupted/{name}/{severity}"] == top1
            expected.setdefault(name, []).append(top1)
    assert len({value for own in expected.values() for value in own}) > 1, "they do differ"
    mean = float(np.mean([np.mean(own) for own in expected.values()]))
    assert figures["zeroshot/t/corrupted_top1"] == pytest.approx(mean)
    assert figures["zeroshot/t/relative_robustness"] == pytest.approx(mean / figures["zeroshot/t/top1"])

    for got in run_ranks(
        3, lambda rank, gather: evaluate(model(), tasks, relative_to=tmp_path, rank=rank, world=3, gather=gather)
    ):
        assert got == pytest.approx(figures)

    images: dict[str, bytes] = {}
    html = chart(read_run(tmp_path / "run"), images)
    assert '<section id="robustness">' in html and html.count("data:image/png") == 2
    assert images["robustness_t"].startswith(b"\x89PNG")


def test_the_summary_by_hand() -> None:
    accuracy = {("fog", 1): 0.5, ("fog", 2): 0.3, ("contrast", 1): 0.2}
    figures = robustness(0.6, accuracy)
    assert figures["corrupted_top1"] == pytest.approx((0.4 + 0.2) / 2)
    assert figures["relative_robustness"] == pytest.approx(0.3 / 0.6)
    assert figures["corrupted/fog/2"] == 0.3
    assert "relative_robustness" not in robustness(0.0, accuracy)
    assert robustness(0.6, {}) == {}
