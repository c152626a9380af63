from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_train.data.collections.shards import Shards
from clip_train.errors import DataError
from clip_train.evaluation.reading import Reading
from clip_train.evaluation.retrieval import distinct_captions, evaluate_retrieval, search

from .colours import PREPROCESS, captioned, loaded
from .ranks import run_ranks

CPU = torch.device("cpu")


def reading(*shards: Path, caption: str = "json.captions", **how: Any) -> Reading:
    return Reading(Shards.of([str(shard) for shard in shards], caption=caption), PREPROCESS, captions=True, **how)


@pytest.mark.parametrize("block_scores", [1, 100, 1 << 20])
def test_search_is_the_naive_search(block_scores: int) -> None:
    rng = np.random.default_rng(5)
    # Small integers: exact in float32, and full of ties.
    queries = rng.integers(-2, 3, size=(37, 4)).astype(np.float32)
    candidates = rng.integers(-2, 3, size=(23, 4)).astype(np.float32)
    right = [rng.choice(23, size=rng.integers(1, 4), replace=False) for _ in queries]
    ranks, columns, values = search(torch.from_numpy(queries), torch.from_numpy(candidates), right, block_scores)
    for q, (query, hits) in enumerate(zip(queries, right, strict=True)):
        scores = [float(sum(a * b for a, b in zip(query, c, strict=True))) for c in candidates]
        best = max(scores[h] for h in hits)
        assert ranks[q] == sum(s >= best for i, s in enumerate(scores) if i not in hits)
        assert values[q].tolist() == sorted(scores, reverse=True)[:5]
        assert [scores[c] for c in columns[q]] == values[q].tolist()
        assert len(set(columns[q].tolist())) == 5


def test_equal_captions_are_one_and_right_for_all_their_pictures() -> None:
    captions, image, caption = distinct_captions(
        [["A star", "gold"], ["a  STAR &amp; moon"], ["a star"], ["Gold", "gold "]]
    )
    assert captions == ["A star", "gold", "a  STAR &amp; moon"]
    assert list(zip(image.tolist(), caption.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 2), (2, 0), (3, 1)]


def test_counts_by_hand(tmp_path: Path) -> None:
    # Distinct captions: red, green, blue, "a green". Two pictures are red; the blue picture says green.
    shard = captioned(
        tmp_path / "a.tar",
        [("red", ["red"]), ("red", ["Red"]), ("green", ["green", "a green"]), ("blue", ["blue", "green"])],
    )
    metrics = evaluate_retrieval(loaded(), reading(shard), device=CPU).metrics
    assert (metrics["images"], metrics["captions"]) == (4, 4)
    assert metrics["image_to_text/r@1"] == 1.0  # the blue picture has "blue" too: one right answer is enough
    assert metrics["text_to_image/r@1"] == 1.0  # "green" finds the green picture first
    assert metrics["image_to_text/chance_r@1"] == pytest.approx((1 + 1 + 2 + 2) / 4 / 4)
    assert metrics["text_to_image/chance_r@1"] == pytest.approx((2 + 2 + 1 + 1) / 4 / 4)
    assert metrics["image_to_text/r@10"] == metrics["image_to_text/chance_r@10"] == 1.0
    assert metrics["image_to_text/median_rank"] == 1.0


def test_wrong_captions_are_found_wrong(tmp_path: Path) -> None:
    # Each picture carries its neighbour's colour: the right answer is never first.
    shard = captioned(tmp_path / "a.tar", [("red", ["green"]), ("green", ["blue"]), ("blue", ["red"])])
    result = evaluate_retrieval(loaded(), reading(shard), device=CPU)
    assert result.metrics["image_to_text/r@1"] == result.metrics["text_to_image/r@1"] == 0.0
    # "red" scores -1/3 against green and blue pictures alike: the tie counts against.
    assert result.rows["image_to_text_ranks"].tolist() == [2, 2, 2]
    assert result.metrics["text_to_image/median_rank"] == 3.0
    top = result.rows["text_to_image_top"][:, 0]
    found = [(str(result.rows["captions"][q]), str(result.rows["keys"][i])) for q, i in enumerate(top)]
    assert found == [("green", "c001"), ("blue", "c002"), ("red", "c000")]


def test_ranks_together_are_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    words = ["red", "green", "blue", "yellow", "cyan", "pink"]
    samples = [(str(c), [str(w) for w in rng.choice(words, size=rng.integers(1, 4))]) for c in rng.choice(words, 11)]
    shards = [captioned(tmp_path / "a.tar", samples[:7]), captioned(tmp_path / "b.tar", samples[7:])]
    whole = evaluate_retrieval(loaded(), reading(*shards), device=CPU)
    for world in (2, 13):  # 13: two ranks have no picture, and most have no caption
        for got in run_ranks(
            world,
            lambda rank, gather, world=world: evaluate_retrieval(
                loaded(), reading(*shards, rank=rank, world=world, batch_size=2), device=CPU, gather=gather
            ),
        ):
            assert got.metrics == pytest.approx(whole.metrics)
            assert got.rows["keys"].tolist() == whole.rows["keys"].tolist()
            assert got.rows["shard"].tolist() == whole.rows["shard"].tolist() == [0] * 7 + [1] * 4
            assert got.rows["image_to_text_ranks"].tolist() == whole.rows["image_to_text_ranks"].tolist()


def test_a_wrong_caption_key_stops(tmp_path: Path) -> None:
    shard = captioned(tmp_path / "a.tar", [("red", ["red"])])
    with pytest.raises(DataError, match=r"json\.caption.*json\.captions"):
        evaluate_retrieval(loaded(), reading(shard, caption="json.caption"), device=CPU)
