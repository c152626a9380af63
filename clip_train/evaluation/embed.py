"""Embeddings of whole data sets, in the layout that clip-retrieval and autofaiss read:

    OUT/img_emb/img_emb_0007.npy        (n, D) of unit length, the pictures of shard 7
    OUT/text_emb/text_emb_0007.npy      (n, D), the first caption of each, where captions were asked for
    OUT/metadata/metadata_0007.parquet  key, shard, caption of each row
    OUT/bad_samples/bad_0007.jsonl      what was left out, and why
    OUT/embedding.json                  of which model, step, vocabulary and shards

One shard is one part. A part is there whole or not at all, so a run that was cut goes on with the shards that are left;
processes take shards in turn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clip_train.data.batch import BadSample
from clip_train.data.collections.shards import Shards
from clip_train.data.samples import read_samples
from clip_train.data.shards import resolve
from clip_train.data.transforms import normalize
from clip_train.errors import DataError
from clip_train.evaluation.encode import encode_images, encode_texts, evaluating
from clip_train.loading import LoadedModel

DTYPES = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True)
class Part:
    """The files of one shard."""

    out: Path
    name: str

    @property
    def image(self) -> Path:
        return self.out / "img_emb" / f"img_emb_{self.name}.npy"

    @property
    def text(self) -> Path:
        return self.out / "text_emb" / f"text_emb_{self.name}.npy"

    @property
    def metadata(self) -> Path:
        return self.out / "metadata" / f"metadata_{self.name}.parquet"

    @property
    def bad(self) -> Path:
        return self.out / "bad_samples" / f"bad_{self.name}.jsonl"


def embed(
    loaded: LoadedModel,
    shards: str | Sequence[str],
    out: Path,
    *,
    image: str = "jpg;jpeg;png;webp",
    caption: str | None = "txt",
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    dtype: str = "fp16",
    rank: int = 0,
    world: int = 1,
    advance: Callable[[int, int], None] | None = None,
) -> int:
    """Embed every shard that has no part yet; returns the number of samples embedded by this process.

    Args:
        image, caption: columns of a sample; `caption=None` embeds pictures alone.
        precision: arithmetic of the towers (`fp32`, `bf16`, `fp16`).
        dtype: numbers on disk (`fp16`, `fp32`).
        advance: told, after each shard, its samples and how many shards this process has left.

    Raises:
        DataError: no such shards or column, or `out` holds embeddings of another model, data or form.
    """
    paths = resolve([shards] if isinstance(shards, str) else list(shards))
    width = len(str(max(len(paths) - 1, 1)))
    parts = [Part(out, str(number).zfill(width)) for number in range(len(paths))]
    for path in (parts[0].image, parts[0].text, parts[0].metadata):
        path.parent.mkdir(parents=True, exist_ok=True)
    _claim(out, loaded, paths, image=image, caption=caption, dtype=dtype)
    device = next(iter(loaded.model.parameters())).device
    done = 0
    own = list(zip(paths, parts, strict=True))[rank::world]
    missing = [(path, part) for path, part in own if not part.metadata.exists()]
    for number, (path, part) in enumerate(missing, 1):
        rows, bad = _embed_shard(loaded, path, image, caption, batch_size, workers, device, precision)
        if bad:
            part.bad.parent.mkdir(exist_ok=True)
            lines = [json.dumps(sample._asdict()) + "\n" for sample in bad]
            part.bad.write_text("".join(lines), encoding="utf-8")
        _save(part.image, rows.images.astype(DTYPES[dtype]))
        if caption is not None:
            _save(part.text, rows.texts.astype(DTYPES[dtype]))
        _write_metadata(part.metadata, rows)  # last: it says that the part is whole
        done += len(rows.keys)
        if advance is not None:
            advance(len(rows.keys), len(missing) - number)
    return done


@dataclass(frozen=True)
class _Rows:
    keys: list[str]
    shards: list[str]
    captions: list[str]
    images: npt.NDArray[np.float32]
    texts: npt.NDArray[np.float32]


def _embed_shard(
    loaded: LoadedModel,
    path: str,
    image: str,
    caption: str | None,
    batch_size: int,
    workers: int,
    device: torch.device,
    precision: str,
) -> tuple[_Rows, list[BadSample]]:
    keys: list[str] = []
    captions: list[str] = []
    bad: list[BadSample] = []
    dimensions = loaded.recipe.joint.embed_dim
    images = [np.empty((0, dimensions), np.float32)]
    texts = [np.empty((0, dimensions), np.float32)]
    look = loaded.preprocess
    batches = read_samples(
        Shards.of(path, image=image, caption=caption), look, captions=caption is not None, batch_size=batch_size,
        workers=workers, skip_bad=True,
    )  # fmt: skip
    with evaluating(loaded.model, device, precision):
        for batch in batches:
            bad += batch.skipped
            if not batch.keys:
                continue
            keys += batch.keys
            pixels = normalize(batch.images.to(device), look.mean, look.std)
            images.append(encode_images(loaded.model, pixels).cpu().numpy())
            if caption is not None:
                first = [found[0] for found in batch.captions]
                captions += first
                texts.append(encode_texts(loaded.model, loaded.tokenizer, first, device, batch_size).cpu().numpy())
    rows = _Rows(keys, [path] * len(keys), captions, np.concatenate(images), np.concatenate(texts))
    return rows, bad


def _claim(
    out: Path, loaded: LoadedModel, paths: Sequence[str], *, image: str, caption: str | None, dtype: str
) -> None:
    """Say in `embedding.json` whose embeddings these are, or check that they are the same.

    Raises:
        DataError: the folder is another model's, or of other shards or another form.
    """
    own: dict[str, Any] = {
        "name": loaded.recipe.name,
        "step": loaded.step,
        "logit_scale": float(loaded.model.logit_scale.detach().exp()),
        "tokenizer": loaded.tokenizer.fingerprint,
        "dimensions": loaded.recipe.joint.embed_dim,
        "image": image,
        "caption": caption,
        "dtype": dtype,
        "shards": list(paths),
    }
    path = out / "embedding.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{key}: {before.get(key)!r:.80} there, {value!r:.80} now" for key, value in own.items()
                   if before.get(key) != value]  # fmt: skip
        if changed:
            raise DataError(f"{out} holds other embeddings: {'; '.join(changed)}. Choose another folder")
        return
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    aside = path.with_suffix(".part")
    with aside.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    aside.replace(path)


def _write_metadata(path: Path, rows: _Rows) -> None:
    pa, pq = pyarrow()
    columns: dict[str, list[str]] = {"key": rows.keys, "shard": rows.shards}
    if rows.captions or not rows.keys:
        columns["caption"] = rows.captions
    aside = path.with_suffix(".part")
    pq.write_table(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), aside)
    aside.replace(path)


def pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. Raises DataError where they are not installed."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError("parquet needs pyarrow: pip install 'clip-train[pack]'") from None
    return arrow, parquet
