"""Build the embedded data set: `python -m clip_train.embedded.build --sources DIR --out DIR`.

Fetches what is absent, draws every picture, splits, and writes the shards, `unseen_style.classes.txt` and
`summary.json`. The same sources and library versions give the same bytes. Needs `resvg-py` and, where the
sources are absent, `npm` and `apt-get`; takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from clip_train.embedded import clipart, emoji, sources
from clip_train.embedded.picture import SIZE, Picture, Pixels, rasterise
from clip_train.embedded.shards import Sample, shuffled, write_shards
from clip_train.embedded.split import Splits, make_splits

PER_SHARD = 1000
QUALITY = 90
NEAR = 0.20
SEED = 2026


def read_emoji(found: sources.Sources) -> tuple[list[Picture], list[Picture]]:
    """The pictures of the training hands, and those of the held-out one."""
    concepts = emoji.read_cldr(found.annotations, found.annotations_derived)
    names = (*emoji.TRAIN_SETS, emoji.UNSEEN_SET)
    sets = {name: emoji.load_set(found.iconify, name) for name in names}
    resolver = emoji.SlugResolver(sets, concepts)

    # Shorter character sequences first: of equal pictures "family" stays before "family: man, woman, boy".
    def by_sequence(picture: Picture) -> tuple[int, str]:
        return len(picture.concept or ""), picture.concept or ""

    pictures = {name: sorted(emoji.read_set(name, sets[name], resolver), key=by_sequence) for name in names}
    train = [picture for name in emoji.TRAIN_SETS for picture in pictures[name]]
    return train, pictures[emoji.UNSEEN_SET]


def draw(pictures: Sequence[Picture], workers: int | None = None) -> tuple[list[Sample], list[str]]:
    """The pictures that can be drawn, in order, and the keys of those that cannot."""
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(_try_rasterise, pictures, chunksize=32))
    samples = [Sample(picture, pixels) for picture, pixels in zip(pictures, drawn, strict=True) if pixels is not None]
    return samples, [picture.key for picture, pixels in zip(pictures, drawn, strict=True) if pixels is None]


def _try_rasterise(picture: Picture) -> Pixels | None:
    try:
        return rasterise(picture)
    except ValueError:
        return None


def write(out: Path, splits: Splits, extra: dict[str, object]) -> None:
    """Shards, class names and summary. Shards that were there before are removed first."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.tar.gz"):
        old.unlink()
    counts: dict[str, object] = {}
    for name, samples in (
        ("train", splits.train),
        ("unseen_style", splits.unseen_style),
        ("openclipart_test", splits.openclipart_test),
    ):
        shards = write_shards(out, name, shuffled(samples, SEED), PER_SHARD, QUALITY)
        counts[name] = {
            "samples": len(samples),
            "shards": len(shards),
            "captions": sum(len(sample.picture.captions) for sample in samples),
            "labels": len({sample.picture.label for sample in samples} - {None}),
            "by_source": dict(sorted(Counter(sample.picture.source for sample in samples).items())),
        }
    labels = sorted({str(sample.picture.label) for sample in splits.unseen_style})
    (out / "unseen_style.classes.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    summary = {
        "size": SIZE,
        "webp_quality": QUALITY,
        "seed": SEED,
        "near_threshold": NEAR,
        "sources": sources.VERSIONS,
        "splits": counts,
        "removed": {**splits.removed, **extra},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m clip_train.embedded.build", description=__doc__)
    parser.add_argument("--sources", type=Path, required=True, help="folder of the packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictograms")
    parser.add_argument("--workers", type=int, default=None, help="processes that draw (default: one a core)")
    options = parser.parse_args(arguments)
    found = sources.prepare(options.sources)
    train, unseen = read_emoji(found)
    clip_art = list(clipart.read(found.openclipart))
    print(f"drawing {len(train)} + {len(unseen)} emoji and {len(clip_art)} pieces of clip art", flush=True)
    drawn: list[list[Sample]] = []
    failed: list[str] = []
    for pictures in (train, unseen, clip_art):
        samples, missing = draw(pictures, options.workers)
        drawn.append(samples)
        failed += missing
    splits = make_splits(*drawn, near=NEAR, seed=SEED)
    write(options.out, splits, {"not_drawn": sorted(failed)})
    print((options.out / "summary.json").read_text("utf-8"))


if __name__ == "__main__":
    main()
