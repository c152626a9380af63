"""What an inspection says in numbers: the content of `inspect.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.data.inspect_duplicates import NEAR, equal_groups, near_groups
from clip_train.data.inspect_shard import Measured, Scan, img2dataset_stats
from clip_train.data.pack_shard import NO_PICTURE
from clip_train.data.remote import is_remote
from clip_train.data.shards import EMBEDDED, data_fingerprint
from tokenizer import BPETokenizer

Figures = dict[str, Any]
"""Names to numbers, texts, and figures again: plain JSON."""


def shard_figures(scans: Sequence[Scan]) -> Figures:
    """Shards, samples, keys and members; the fingerprint where training would accept all shards."""
    counts = Counter[str]()
    keys = Counter[str]()
    shards: list[Figures] = []
    for one in scans:
        if one.index is not None:
            counts.update(dict(zip(one.index.extensions, (one.index.offsets >= 0).sum(axis=0).tolist(), strict=True)))
            keys.update(one.index.key(row) for row in range(len(one.index)))
        line: Figures = {"shard": one.shard, "samples": len(one.index) if one.index else 0, "bytes": one.size}
        if one.damage:
            line["damage"] = one.damage
        if one.strays:
            line["strays"] = one.strays
        if stats := img2dataset_stats(one.shard):
            line["img2dataset"] = _successes(stats)
        shards.append(line)
    whole = [one.index for one in scans if one.index is not None and one.damage is None]
    return {
        "samples": keys.total(),
        "bytes": sum(one.size for one in scans),
        "keys_in_several_shards": sum(count > 1 for count in keys.values()),
        "fingerprint": data_fingerprint(whole) if len(whole) == len(scans) else None,
        "extensions": dict(counts.most_common()),
        "shards": shards,
    }


def _successes(stats: Path) -> Figures:
    """What img2dataset says of a shard: how many it fetched, tried and lost."""
    try:
        found: Any = json.loads(stats.read_text())
    except ValueError:
        return {"unreadable": stats.name}
    wanted = ("count", "successes", "failed_to_download", "failed_to_resize")
    return {key: found[key] for key in wanted if key in found}


def picture_figures(column: str, measured: Sequence[Measured]) -> Figures:
    """Formats, modes and sizes of the pictures that can be decoded."""
    good = [one for one in measured if one.cause is None]
    return {
        "column": column,
        "formats": dict(Counter(one.format for one in good).most_common()),
        "modes": dict(Counter(one.mode for one in good).most_common()),
        "width": _spread([one.width for one in good]),
        "height": _spread([one.height for one in good]),
        "bytes": _spread([one.size for one in good]),
        "sizes": {f"{w}x{h}": n for (w, h), n in Counter((one.width, one.height) for one in good).most_common(10)},
        "blank": sum(one.blank for one in good),
    }


def caption_figures(column: str, measured: Sequence[Measured], tokenizer: BPETokenizer) -> Figures:
    """How many captions, how long in tokens, and how often the same."""
    good = [one for one in measured if one.cause is None]
    texts = Counter(text for one in good for text in one.captions)
    tokens = [count for one in good for count in one.tokens]
    cap = tokenizer.context_length
    beyond = sum(count > cap for count in tokens)
    return {
        "column": column,
        "captions": len(tokens),
        "a_sample": _spread([len(one.captions) for one in good]),
        "tokens": _spread(tokens),
        "cap": cap,
        "beyond_cap": beyond,
        "share_beyond_cap": beyond / max(1, len(tokens)),
        "distinct": len(texts),
        "most_frequent": {text: count for text, count in texts.most_common(5) if count > 1},
        "tokenizer": tokenizer.fingerprint,
    }


def duplicate_figures(scans: Sequence[Scan], measured: Sequence[Measured]) -> Figures:
    """Groups of samples, each a list of `SHARD: KEY`."""
    good = [one for one in measured if one.cause is None]
    patterned = [one for one in good if not one.blank]  # pictures of one colour have no structure to compare

    def described(groups: list[list[int]], of: list[Measured]) -> Figures:
        named = [[f"{scans[of[place].shard].shard}: {of[place].key}" for place in group] for group in groups]
        return {"groups": len(groups), "surplus": sum(len(group) - 1 for group in groups), "samples": named}

    return {
        "bytes": described(equal_groups([one.byte_hash for one in good]), good),
        "pixels": described(equal_groups([one.pixel_hash for one in good]), good),
        "look_alikes": described(near_groups([one.dhash for one in patterned]), patterned) | {"bits": NEAR},
    }


def _spread(values: Sequence[int]) -> Figures:
    if not values:
        return {}
    low, median, most, high = np.percentile(values, [0, 50, 95, 100])
    return {
        "min": int(low),
        "median": float(median),
        "mean": float(np.mean(values)),
        "p95": float(most),
        "max": int(high),
    }


def recipe_stanza(patterns: list[str], shards: list[str], image: str, caption: str, figures: Figures) -> str:
    """The recipe's part that reads these shards."""
    local = not any(map(is_remote, patterns))
    named = [
        one if one.startswith(EMBEDDED) or is_remote(one) else str(Path(one).expanduser().absolute())
        for one in patterns
    ]
    if local and len(named) > 3:  # the shell expanded a pattern
        folder = Path(shards[0]).absolute().parent
        if sorted(str(path) for path in folder.glob("*.tar")) == sorted(str(Path(one).absolute()) for one in shards):
            named = [str(folder / "*.tar")]
    lines = [
        "[data.sources.mine]",
        f"shards = {json.dumps(named[0] if len(named) == 1 else named, ensure_ascii=False)}",
        *([] if image == NO_PICTURE else [f"image = {json.dumps(image)}"]),
        f"caption = {json.dumps(caption, ensure_ascii=False)}",
    ]
    several = figures["captions"]["a_sample"].get("max", 1) > 1
    return "\n".join(lines + ['caption_choice = "random"'] * several)
