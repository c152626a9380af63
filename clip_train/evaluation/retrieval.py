"""Image-to-text and text-to-image retrieval, with several captions a picture.

- A picture's query is right with *any* of its captions, a caption's query with *any* of its pictures; the rank is
  the number of wrong candidates that score at least as high as the best right one (ties count against).
- Captions are compared as the tokenizer cleans them. Captions that are then equal are one candidate and one query:
  it is right for every picture that carries it. Otherwise two pictures called "star" would be each other's errors,
  which no model could avoid. Published figures of Flickr30k and COCO do count them apart: `merge = False`.
- COCO's "1k" figures are means over five searches, each among a fifth of the 5,000 test pictures (Karpathy & Fei-Fei
  2015): `folds`.
- Chance is exact for these numbers of right answers (`metrics.chance_recall`); a picture with five captions is
  five times as easy, and that should be visible.

Shapes: `n` pictures, `m` distinct captions, `D` width of the joint space, `Q` queries, `N` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_train.errors import DataError
from clip_train.evaluation.encode import (
    Gather,
    Loaded,
    Rows,
    alone,
    encode_images,
    encode_texts,
    evaluating,
    gathered,
    in_order,
    unstride,
)
from clip_train.evaluation.metrics import Integers, chance_recall, rank_of_positives, recall_at, top
from clip_train.evaluation.reading import Reading
from clip_train.evaluation.zeroshot import SHOWN, EvalResult
from tokenizer.cleaning import clean

CUTOFFS = (1, 5, 10)
BLOCK_SCORES = 1 << 24
"""Scores held at once (64 MiB of float32), whatever the numbers of pictures and captions."""
LONGEST_SHOWN = 300
"""Characters of a caption that are kept for the report."""


def evaluate_retrieval(
    loaded: Loaded,
    reading: Reading,
    *,
    device: torch.device,
    precision: str = "fp32",
    gather: Gather = alone,
    most_captions: int | None = None,
    merge: bool = True,
    folds: int = 1,
) -> EvalResult:
    """Search captions by picture and pictures by caption over all of `reading`. All ranks call it.

    Args:
        most_captions: the first so many captions of each picture; None takes all.
        merge: captions that are equal after cleaning are one; else each picture's are its own.
        folds: search within so many consecutive parts of equal size; figures are their means.

    Metrics, for both of `image_to_text` and `text_to_image`: `r@1`, `r@5`, `r@10`, `chance_r@1` …, `median_rank`
    (1 is best); and `images`, `captions` (distinct ones).

    Rows: `keys (n,)`, `shard (n,)` index into `shards`, `Reading.names`, `captions (m,)`, the pairs
    `pair_image (p,)`, `pair_caption (p,)`, and for both directions `DIRECTION_ranks (Q,)`, `DIRECTION_top (Q, 5)`,
    `DIRECTION_similarities (Q, 5)`; each within its fold.

    Raises DataError (on all ranks) for a sample that cannot be read, or pictures that cannot be parted equally.
    """
    if len(reading) % folds:
        raise DataError(f"{len(reading):,} pictures cannot be parted into {folds} folds of equal size")
    with evaluating(loaded.model, device, precision):
        found = in_order(gathered(gather, lambda: _encode_pictures(loaded, reading, device)))
        images = torch.from_numpy(found["features"]).to(device)
        texts: list[list[str]] = [own[:most_captions] for own in found["captions"].tolist()]
        size = len(images) // folds
        parts = [distinct_captions(texts[size * k : size * (k + 1)], merge) for k in range(folds)]
        captions = [caption for own, _, _ in parts for caption in own]
        mine = captions[reading.rank :: reading.world]
        text = unstride(gathered(gather, lambda: _encode_captions(loaded, mine, device, reading.batch_size)), device)

    searched: list[tuple[dict[str, float], Rows]] = []
    first = 0
    for k, (own, pair_image, pair_caption) in enumerate(parts):
        of_fold = images[size * k : size * (k + 1)], text[first : first + len(own)]
        searched.append(_both_ways(*of_fold, pair_image, pair_caption, size * k, first))
        first += len(own)
    metrics = {name: float(np.mean([figures[name] for figures, _ in searched])) for name in searched[0][0]}
    metrics |= {"images": float(len(images)), "captions": float(len(captions))}
    rows: Rows = {
        "keys": found["keys"],
        "shard": reading.shard_of(np.arange(len(found["keys"]))),
        **reading.names(),
        "captions": np.array([caption[:LONGEST_SHOWN] for caption in captions]),
        **{name: _stacked([one[name] for _, one in searched]) for name in searched[0][1]},
    }
    return EvalResult(metrics, rows)


def _both_ways(
    images: Tensor, text: Tensor, pair_image: Integers, pair_caption: Integers, first_image: int, first_caption: int
) -> tuple[dict[str, float], Rows]:
    """Figures and rows of one search; pictures and captions are numbered in the rows from the given numbers on."""
    metrics: dict[str, float] = {}
    rows: Rows = {"pair_image": pair_image + first_image, "pair_caption": pair_caption + first_caption}
    for direction, queries, candidates, of_query, of_candidate, first in (
        ("image_to_text", images, text, pair_image, pair_caption, first_caption),
        ("text_to_image", text, images, pair_caption, pair_image, first_image),
    ):
        right = _grouped(of_query, of_candidate, len(queries))
        ranks, columns, values = search(queries, candidates, right)
        for k in CUTOFFS:
            metrics[f"{direction}/r@{k}"] = recall_at(ranks, k)
            metrics[f"{direction}/chance_r@{k}"] = chance_recall([len(r) for r in right], len(candidates), k)
        metrics[f"{direction}/median_rank"] = float(np.median(ranks)) + 1.0
        rows |= {
            f"{direction}_ranks": ranks,
            f"{direction}_top": columns + first,
            f"{direction}_similarities": values,
        }
    return metrics, rows


def _stacked(parts: Sequence[Any]) -> Any:
    """One after the other; lists of the best are as long as the shortest (a fold may hold fewer than are shown)."""
    shown = min(part.shape[-1] for part in parts) if parts[0].ndim == 2 else None
    return np.concatenate([part if shown is None else part[:, :shown] for part in parts])


def search(
    queries: Tensor, candidates: Tensor, right: Sequence[Integers], block_scores: int = BLOCK_SCORES
) -> tuple[Integers, Integers, Any]:
    """Rank of the best right candidate of each query, and the first five candidates with their scores.

    `queries (Q, D)`, `candidates (N, D)`, `right[q]` the indices of q's right candidates ->
    `ranks (Q,)`, `columns (Q, 5)`, `scores (Q, 5)`. Memory is O(`block_scores`), not O(Q·N).
    """
    block = max(1, block_scores // len(candidates))
    ranks: list[Any] = []
    columns: list[Any] = []
    values: list[Any] = []
    for first in range(0, len(queries), block):
        scores = queries[first : first + block] @ candidates.T
        hits = right[first : first + block]
        of_row = np.repeat(np.arange(len(hits)), [len(h) for h in hits])
        positives = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        positives[torch.from_numpy(of_row), torch.from_numpy(np.concatenate(hits))] = True
        best = top(scores, SHOWN)
        ranks.append(rank_of_positives(scores, positives).cpu().numpy())
        values.append(best[0].cpu().numpy())
        columns.append(best[1].cpu().numpy())
    return np.concatenate(ranks), np.concatenate(columns), np.concatenate(values)


def distinct_captions(texts: Sequence[Sequence[str]], merge: bool = True) -> tuple[list[str], Integers, Integers]:
    """The distinct captions in order of first use, and the pairs `(picture, caption)` without repetition.

    Without `merge` every caption is another one.
    """
    index: dict[str, int] = {}
    captions: list[str] = []
    pairs: list[tuple[int, int]] = []
    for image, own in enumerate(texts):
        of_image: dict[int, None] = {}
        for caption in own:
            key = clean(caption) if merge else str(len(captions))
            if key not in index:
                index[key] = len(captions)
                captions.append(caption)
            of_image[index[key]] = None
        pairs += [(image, caption) for caption in of_image]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return captions, both[:, 0], both[:, 1]


def _grouped(of_query: Integers, of_candidate: Integers, queries: int) -> list[Integers]:
    order = np.argsort(of_query, kind="stable")
    ends = np.cumsum(np.bincount(of_query, minlength=queries))
    return np.split(of_candidate[order], ends[:-1])


def _encode_pictures(loaded: Loaded, reading: Reading, device: torch.device) -> Rows:
    """This rank's features with keys and captions, and where in the whole set each belongs (`number`)."""
    width = int(getattr(loaded.model, "embed_dim", 0))
    numbers: list[int] = []
    keys: list[str] = []
    captions: list[list[str]] = []
    features: list[Any] = []
    for pictures in reading.batches(device):
        numbers += pictures.numbers.tolist()
        keys += pictures.keys
        captions += pictures.captions
        features.append(encode_images(loaded.model, pictures.images).cpu().numpy())
    lists = np.empty(len(captions), dtype=object)  # of different lengths; gathered, never written to a file
    lists[:] = captions
    return {
        "number": np.array(numbers, dtype=np.int64),
        "keys": np.array(keys, dtype=str),
        "captions": lists,
        "features": np.concatenate(features) if features else np.empty((0, width), np.float32),
    }


def _encode_captions(loaded: Loaded, captions: Sequence[str], device: torch.device, batch: int) -> Tensor:
    if not captions:  # a rank may have none
        return torch.empty(0, 0)
    return encode_texts(loaded.model, loaded.tokenizer, captions, device, batch).cpu()
