"""The linear probe against scikit-learn's, nearest neighbours against a loop, few shots, two ranks."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression  # pyright: ignore

from clip_train.config.schema import Knn, LinearProbe
from clip_train.data.collections.shards import Shards
from clip_train.errors import DataError
from clip_train.evaluation.probe import draw_shots, fit_logistic, fit_swept, knn_votes
from clip_train.evaluation.run import evaluate

from .colours import COLOURS, classified, loaded, picture, write_shard


def clouds(n: int = 300, classes: int = 4, dimensions: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds around a class's centre, far from the origin and of no unit scale."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dimensions, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, classes, (n,), generator=generator)
    return 5 + 3 * (centres[labels] + torch.randn(n, dimensions, generator=generator)), labels


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_the_minimum_is_scikit_learns(l2: float) -> None:
    features, labels = clouds()
    weights, bias = fit_logistic(features, labels, 4, l2)
    peer = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-8, max_iter=5000)
    peer.fit(features.numpy().astype(np.float64), labels.numpy())
    theirs = torch.from_numpy(peer.coef_), torch.from_numpy(peer.intercept_)

    def objective(weights: torch.Tensor, bias: torch.Tensor) -> float:
        logits = features.double() @ weights.double().T + bias.double()
        return float(torch.nn.functional.cross_entropy(logits, labels) + l2 / 2 * weights.double().square().sum())

    assert objective(weights, bias) <= objective(*theirs) * (1 + 1e-4)
    new, _ = clouds(500, seed=1)
    agree = (new @ weights.T + bias).argmax(1) == (new.double() @ theirs[0].T + theirs[1]).argmax(1)
    assert agree.float().mean() > 0.99


def test_the_sweep_prefers_strong_regularisation_where_features_are_noise() -> None:
    noise = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    noise[:, 0] += 3 * (2 * labels - 1)
    weights, _, l2 = fit_swept(noise, labels, 2)
    assert l2 >= 1e-2
    assert weights.shape == (2, 200)


def test_votes_are_those_of_a_loop() -> None:
    memory, labels = clouds(50)
    memory = torch.nn.functional.normalize(memory - memory.mean(0), dim=1)
    queries = memory[:7].roll(1, 1)
    votes = knn_votes(queries, memory, labels, 4, neighbours=5, temperature=0.1)
    for query, own in zip(queries, votes, strict=True):
        expected = [0.0] * 4
        ranked = sorted(range(50), key=lambda row: -float(query @ memory[row]))[:5]
        for row in ranked:
            expected[int(labels[row])] += math.exp(float(query @ memory[row]) / 0.1)
        assert own.tolist() == pytest.approx(expected, rel=1e-4)


def test_shots_are_of_each_class_and_do_not_depend_on_the_order() -> None:
    keys = [f"k{number}" for number in range(60)]
    labels = np.arange(60) % 3
    rows = draw_shots(keys, labels, 4)
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
    turned = draw_shots(keys[::-1], labels[::-1], 4)
    assert {keys[row] for row in rows} == {keys[::-1][row] for row in turned}


def shards(tmp_path: Path) -> dict[str, LinearProbe | Knn]:
    names = list(COLOURS)
    classified(tmp_path / "train-0.tar", [(name, name) for name in names for _ in range(4)])
    classified(tmp_path / "test.tar", [(name, name) for name in names] + [("red", "green")])
    (tmp_path / "classes.txt").write_text("\n".join(names))
    same: dict[str, Any] = {"train_shards": "train-0.tar", "shards": "test.tar", "classes": "classes.txt"}
    return {"probe": LinearProbe(**same), "near": Knn(**same, neighbours=3), "few": LinearProbe(**same, shots=1)}


def test_through_the_evaluation(tmp_path: Path) -> None:
    tasks = shards(tmp_path)
    figures = evaluate(loaded(), tasks, relative_to=tmp_path, run_dir=tmp_path / "run")
    for kind, name in (("linear_probe", "probe"), ("knn", "near"), ("linear_probe", "few")):
        assert figures[f"{kind}/{name}/top1"] == pytest.approx(6 / 7), "all but the one whose label is wrong"
        assert figures[f"{kind}/{name}/samples"] == 7
    assert figures["linear_probe/probe/train_samples"] == 24
    assert figures["linear_probe/few/train_samples"] == 6
    with np.load(tmp_path / "run/eval/probe.npz", allow_pickle=False) as rows:
        assert rows["predictions"][:6, 0].tolist() == list(range(6))


def test_a_curve_of_shots_is_made_of_single_ones(tmp_path: Path) -> None:
    """Pictures of random colours, so that it matters which were drawn."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    for name, count in (("train", 60), ("test", 40)):
        colours = [tuple(int(value) for value in rng.integers(0, 256, 3)) for _ in range(count)]
        samples = [
            (f"s{number:03d}", {"png": picture((r, g, b)), "cls": str(number % 3).encode()})
            for number, (r, g, b) in enumerate(colours)
        ]
        write_shard(tmp_path / f"{name}.tar", samples)
    (tmp_path / "classes.txt").write_text("\n".join(names[:3]))
    same: dict[str, Any] = {"train_shards": "train.tar", "shards": "test.tar", "classes": "classes.txt"}
    tasks = {
        "curve": Knn(**same, shots=[1, 4], draws=3, neighbours=3),
        "four": Knn(**same, shots=4, neighbours=3),
        "probe": LinearProbe(**same, shots=[2, 5]),
        "five": LinearProbe(**same, shots=5),
    }
    figures = evaluate(loaded(), tasks, relative_to=tmp_path, run_dir=tmp_path / "run")
    assert figures["knn/curve/top1"] == figures["knn/four/top1"], "the largest number, the first draw"
    assert figures["knn/curve/train_samples"] == 12
    assert figures["linear_probe/probe/shots/5/top1"] == figures["linear_probe/five/top1"]
    assert not [name for name in figures if name.startswith(("knn/four/shots", "linear_probe/probe/shots/5/sd"))]

    # Draws by hand: the keys of the shard, and its labels.
    keys, labels = [f"s{number:03d}" for number in range(60)], np.arange(60) % 3
    draws = [draw_shots(keys, labels, 4, draw) for draw in range(3)]
    assert len({tuple(rows) for rows in draws}) == 3
    assert set(draw_shots(keys, labels, 1, 1)) < set(draws[1]), "of one draw, fewer shots are among more"
    right: list[float] = []
    for rows in draws:
        memory, asked = pixels_of(tmp_path / "train.tar")[rows], pixels_of(tmp_path / "test.tar")
        votes = knn_votes(asked, memory, torch.from_numpy(labels[rows]), 3, 3, 0.07)
        truth = torch.arange(40) % 3
        own = votes.gather(1, truth[:, None])
        right.append(float(((votes >= own).sum(1) == 1).float().mean()))
    assert figures["knn/curve/shots/4/top1"] == pytest.approx(np.mean(right))
    assert figures["knn/curve/shots/4/sd"] == pytest.approx(np.std(right, ddof=1))

    table = list(csv.DictReader((tmp_path / "run/eval/clip_benchmark/results.csv").open()))
    curve = {
        int(row["fewshot_k"]): float(row["acc1"]) for row in table if row["dataset"] == "curve" and row["fewshot_k"]
    }
    assert curve == {number: figures[f"knn/curve/shots/{number}/top1"] for number in (1, 4)}


def pixels_of(shard: Path) -> torch.Tensor:
    """Unit vectors that the fake model gives, in the order of the keys."""
    collection = Shards.of(str(shard))
    pixels = [torch.from_numpy(collection.pixels(number)).float() for number in range(len(collection))]
    return torch.nn.functional.normalize(torch.stack([one.mean((0, 1)) / 127.5 - 1 for one in pixels]), dim=1)


def test_one_class_is_an_error(tmp_path: Path) -> None:
    tasks = shards(tmp_path)
    classified(tmp_path / "train-0.tar", [("red", "red")] * 5)
    with pytest.raises(DataError, match="all of one class"):
        evaluate(loaded(), {"probe": tasks["probe"]}, relative_to=tmp_path)
