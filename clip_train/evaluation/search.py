"""Exact search in embeddings: every row is compared, none is approximated. A page shows what was found.

Shapes: `q` queries, `n` rows of a part, `D` dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clip_train.errors import DataError
from clip_train.evaluation.embed import pyarrow
from clip_train.evaluation.gallery import Album
from clip_train.evaluation.page import page, picture, section, text

_CHUNK = 1 << 16
"""Rows compared at once: a few tens of MB, whatever the size of a part."""


@dataclass(frozen=True)
class Hit:
    """One row that was found."""

    cosine: float
    key: str
    shard: str
    caption: str


def search(
    folder: Path, queries: npt.NDArray[np.float32], count: int, among: Literal["images", "captions"] = "images"
) -> list[list[Hit]]:
    """The `count` nearest rows of each query, best first; ties go to the earlier row.

    Args:
        folder: what `embed` wrote.
        queries: `(q, D)` of unit length.
        among: compare with pictures or with captions.

    Raises:
        DataError: there are no embeddings, or they are of another width.
    """
    stem = "img_emb" if among == "images" else "text_emb"
    metadata = sorted((folder / "metadata").glob("metadata_*.parquet"))
    if not metadata:
        raise DataError(f"{folder}: no embeddings here (metadata/metadata_*.parquet): make them with clip-train embed")
    best = [(np.empty(0, np.float32), np.empty((0, 2), np.int64)) for _ in queries]
    for part, path in enumerate(metadata):
        number = path.stem.removeprefix("metadata_")
        file = folder / stem / f"{stem}_{number}.npy"
        if not file.is_file():
            raise DataError(f"{file} is missing: these embeddings hold no {among}")
        rows: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
        if rows.shape[1] != queries.shape[1]:
            raise DataError(f"{file}: {rows.shape[1]} dimensions, the model has {queries.shape[1]}: another model's")
        for start in range(0, len(rows), _CHUNK):
            cosines = queries @ rows[start : start + _CHUNK].astype(np.float32).T
            for query, own in enumerate(cosines):
                nearest = np.argsort(-own, kind="stable")[:count]
                places = np.stack([np.full(len(nearest), part), start + nearest], axis=1)
                values = np.concatenate([best[query][0], own[nearest]])
                both = np.concatenate([best[query][1], places])
                order = np.argsort(-values, kind="stable")[:count]
                best[query] = values[order], both[order]
    return [_hits(metadata, values, places) for values, places in best]


def _hits(metadata: Sequence[Path], values: npt.NDArray[np.float32], places: npt.NDArray[np.int64]) -> list[Hit]:
    _, parquet = pyarrow()
    tables: dict[int, dict[str, list[str]]] = {}
    hits: list[Hit] = []
    for value, (part, row) in zip(values.tolist(), places.tolist(), strict=True):
        if part not in tables:
            tables[part] = parquet.read_table(metadata[part]).to_pydict()
        table = tables[part]
        captions = table.get("caption")
        hits.append(Hit(value, table["key"][row], table["shard"][row], captions[row] if captions else ""))
    return hits


def write_page(folder: Path, queries: Sequence[str], found: Sequence[Sequence[Hit]], out: Path) -> list[str]:
    """One HTML document with the pictures in it; returns notes on pictures that could not be had."""
    notes: list[str] = []
    album = Album(folder, notes)
    image = str(json.loads((folder / "embedding.json").read_text(encoding="utf-8"))["image"])
    sections: list[str] = []
    for number, (query, hits) in enumerate(zip(queries, found, strict=True)):
        cells = [
            f"<figure>{picture(album.picture(hit.shard, hit.key, image), hit.caption or hit.key)}"
            f"<figcaption><b>{hit.cosine:.3f}</b> {text(hit.caption or hit.key)}</figcaption></figure>"
            for hit in hits
        ]
        sections.append(section(f"query-{number}", query, "", f'<div class="hits">{"".join(cells)}</div>'))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page("Search", "\n".join(sections)), encoding="utf-8")
    return notes
