from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_train.data.collections.shards import Shards
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.reading import Reading
from clip_train.evaluation.zeroshot import (
    check_classes,
    check_templates,
    class_embeddings,
    evaluate_zeroshot,
    label_index,
    summarise,
)

from .colours import COLOURS, PREPROCESS, ColourModel, ColourTokenizer, classified, loaded
from .ranks import run_ranks

CPU = torch.device("cpu")
CLASSES = list(COLOURS)


def reading(*shards: Path, **how: Any) -> Reading:
    return Reading(Shards.of([str(shard) for shard in shards], label="cls"), PREPROCESS, label=True, **how)


def test_class_embedding_is_the_mean_of_normalised_prompts() -> None:
    model, templates = ColourModel(), ["{}", "a {} thing", "{} {} blue"]
    found = class_embeddings(model, ColourTokenizer(), ["red", "green"], templates, CPU, batch=2)
    for name, embedding in zip(["red", "green"], found, strict=True):
        mean = torch.zeros(3)
        for template in templates:
            ids, lengths = ColourTokenizer().encode_batch([template.replace("{}", name)])
            one = model.encode_text(torch.from_numpy(ids)[None].long(), torch.from_numpy(lengths).long())[0]
            mean += one / one.norm()
        torch.testing.assert_close(embedding, mean / mean.norm())


def test_prompts_are_batched_by_length() -> None:
    model = ColourModel()
    class_embeddings(model, ColourTokenizer(), CLASSES, ["{}", "one of the many {} things"], CPU, batch=6)
    assert model.batches == [(6, 8), (6, 3)]  # 6 words with SOT and EOT, and 1: no short prompt pays for a long one


def test_counts_by_hand(tmp_path: Path) -> None:
    # 3 of 4 reds right; the "green" that is blue, wrong; names and indexes both name classes.
    samples = [("red", "red"), ("red", "0"), ("red", "red"), ("blue", "red"), ("blue", "green"), ("cyan", "4")]
    model = loaded()
    result = evaluate_zeroshot(model, reading(classified(tmp_path / "a.tar", samples)), CLASSES, ["{}"], device=CPU)
    assert result.metrics == pytest.approx(
        {
            "top1": 4 / 6,
            "top5": 1,  # a blue picture is nearest to blue, cyan, pink; red and green follow, and tie
            "per_class_mean": (3 / 4 + 0 + 1) / 3,
            "chance": 1 / 6,
            "chance_top5": 5 / 6,
            "majority": 4 / 6,
            "samples": 6,
            "classes": 6,
        }
    )
    rows = result.rows
    assert rows["keys"].tolist() == [f"s{i:03d}" for i in range(6)]
    assert rows["labels"].tolist() == [0, 0, 0, 0, 1, 4]
    assert rows["predictions"][:, 0].tolist() == [0, 0, 0, 2, 2, 4]
    assert rows["predictions"].shape == (6, 5)
    assert not model.model.trained_while_evaluating
    assert model.model.training  # as it was before


def test_probabilities_are_a_softmax_over_all_classes(tmp_path: Path) -> None:
    model = loaded()
    result = evaluate_zeroshot(
        model, reading(classified(tmp_path / "a.tar", [("red", "pink")])), CLASSES, ["{}"], device=CPU
    )
    colours = torch.tensor([COLOURS[name] for name in CLASSES]) / 127.5 - 1
    colours = torch.nn.functional.normalize(colours, dim=1)
    expected = (torch.tensor(3.0).exp() * colours[0] @ colours.T).softmax(0)
    best = expected.sort(descending=True).values[:5]
    assert result.rows["probabilities"][0] == pytest.approx(best.tolist(), rel=1e-4)
    assert result.rows["true_probability"][0] == pytest.approx(expected[CLASSES.index("pink")].item(), rel=1e-4)


def test_a_model_that_says_the_same_of_everything_knows_nothing(tmp_path: Path) -> None:
    class Constant(ColourModel):
        def encode_text(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(ids), 3)

    shard = classified(tmp_path / "a.tar", [(name, name) for name in CLASSES])
    model = type(loaded())(Constant(), PREPROCESS, ColourTokenizer())
    metrics = evaluate_zeroshot(model, reading(shard), CLASSES, ["{}"], device=CPU).metrics
    assert metrics["top1"] == metrics["top5"] == 0.0


@pytest.mark.parametrize("world", [2, 3, 5, 9])
def test_ranks_together_are_the_whole(tmp_path: Path, world: int) -> None:
    rng = np.random.default_rng(world)
    shards = [
        classified(tmp_path / f"{n}.tar", [(str(c), str(label)) for c, label in rng.choice(CLASSES, size=(size, 2))])
        for n, size in enumerate((5, 2))
    ]
    whole = evaluate_zeroshot(loaded(), reading(*shards), CLASSES, ["{}", "a {}"], device=CPU)

    for rank, got in enumerate(on_ranks(world, shards)):
        assert got.metrics == whole.metrics, rank
        for name, rows in whole.rows.items():
            if rows.dtype.kind == "f":
                np.testing.assert_allclose(got.rows[name], rows, rtol=1e-5)
            else:
                assert got.rows[name].tolist() == rows.tolist(), name


def on_ranks(world: int, shards: list[Path]) -> list[Any]:
    return run_ranks(
        world,
        lambda rank, gather: evaluate_zeroshot(
            loaded(),
            reading(*shards, rank=rank, world=world, batch_size=2),
            CLASSES,
            ["{}", "a {}"],
            device=CPU,
            gather=gather,
        ),
    )


def test_an_error_of_one_rank_is_every_ranks(tmp_path: Path) -> None:
    shard = classified(tmp_path / "a.tar", [("red", "red"), ("red", "mauve"), ("red", "red")])
    errors = on_ranks(3, [shard])
    assert all(isinstance(error, DataError) and "'mauve'" in str(error) for error in errors), errors


def test_a_label_that_is_no_class_is_named(tmp_path: Path) -> None:
    shard = classified(tmp_path / "a.tar", [("red", "red"), ("green", "gren")])
    with pytest.raises(DataError, match=r"a\.tar: sample 's001': label 'gren'.* nearest is 'green'"):
        evaluate_zeroshot(loaded(), reading(shard), CLASSES, ["{}"], device=CPU)
    with pytest.raises(DataError, match="label 6 is not among the 6 classes"):
        label_index(6, {name: i for i, name in enumerate(CLASSES)}, "x")
    with pytest.raises(DataError, match="label -1"):
        label_index(-1, {"a": 0}, "x")


def test_classes_must_be_told_apart() -> None:
    with pytest.raises(ConfigError, match="'red' is on lines 1, 3"):
        check_classes(["red", "green", "red"])
    with pytest.raises(ConfigError, match=r"line 2 .* blank"):
        check_classes(["red", "", "green"])
    with pytest.raises(ConfigError, match="empty"):
        check_classes([])


def test_templates_need_a_place_for_the_name() -> None:
    with pytest.raises(ConfigError, match="'a photo'"):
        check_templates(["a photo of a {}", "a photo"])
    with pytest.raises(ConfigError, match="no template"):
        check_templates([])


def test_majority_and_per_class_mean_differ_on_a_skewed_set() -> None:
    ranks, labels = np.array([0] * 90 + [1] * 10), np.array([0] * 90 + [1] * 10)
    metrics = summarise(ranks, labels, 2)
    assert (metrics["top1"], metrics["majority"], metrics["per_class_mean"]) == (0.9, 0.9, 0.5)
