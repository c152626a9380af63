"""An inspection as tables on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clip_train.data.inspect import Inspection

_SHOWN = 10


def show(found: Inspection, console: Console) -> None:
    """Print what was found, worst last, so that it stays in sight."""
    figures = found.figures
    shards, image, captions = figures["shards"], figures["image"], figures["captions"]
    table = Table(show_header=False)
    table.add_row("shards", f"{len(shards)}, {figures['bytes'] / 1e6:,.1f} MB")
    table.add_row("samples", f"{figures['samples']:,}" + _partly(figures))
    table.add_row("members", _counts(figures["extensions"]))
    if image is not None:
        table.add_row("pictures", f"{found.image}: {_counts(image['formats'])}; modes {_counts(image['modes'])}")
        table.add_row("width", _spread(image["width"]))
        table.add_row("height", _spread(image["height"]))
        table.add_row("bytes a picture", _spread(image["bytes"]))
        table.add_row("frequent sizes", _counts(dict(list(image["sizes"].items())[:5])))
        if image["blank"]:
            table.add_row("of one colour", f"{image['blank']:,}")
    table.add_row("captions", f"{found.caption}: {captions['captions']:,}, {captions['distinct']:,} of them distinct")
    table.add_row("captions a sample", _spread(captions["a_sample"]))
    table.add_row("tokens a caption", _spread(captions["tokens"]))
    table.add_row(
        f"beyond the cap of {captions['cap']}", f"{captions['beyond_cap']:,} ({captions['share_beyond_cap']:.1%})"
    )
    for text, count in list(captions["most_frequent"].items())[:3]:
        table.add_row("frequent caption", Text(f"{count:,} times: {text[:80]}"))
    for kind, what in (("bytes", "equal files"), ("pixels", "equal pixels"), ("look_alikes", "look-alikes")):
        if figures["duplicates"] is None:
            break
        one = figures["duplicates"][kind]
        example = f", for example {' = '.join(_short(name) for name in one['samples'][0][:3])}" if one["groups"] else ""
        table.add_row(what, Text(f"{one['surplus']:,} beside the {one['groups']:,} first ones{example}"))
    if figures["keys_in_several_shards"]:
        table.add_row("keys in several shards", f"{figures['keys_in_several_shards']:,}")
    table.add_row("fingerprint", figures["fingerprint"] or "none: training would refuse a shard")
    console.print(table)
    _problems(found, console)


def _problems(found: Inspection, console: Console) -> None:
    for line in found.figures["shards"]:
        stats: dict[str, Any] = line.get("img2dataset", {})
        if "successes" in stats and stats["successes"] != line["samples"]:
            _warn(
                console, f"{line['shard']}: img2dataset wrote {stats['successes']} samples, {line['samples']} are here"
            )
        if line.get("strays"):
            _warn(
                console, f"{line['shard']}: {len(line['strays'])} members belong to no sample: {line['strays'][0]!r}, …"
            )
        if line.get("damage"):
            _warn(console, f"{line['damage']} Readable: {line['samples']} samples.")
    if found.broken:
        table = Table("shard", "key", "cause", title=f"{len(found.broken):,} broken samples", title_justify="left")
        for one in found.broken[:_SHOWN]:
            table.add_row(Path(one.shard).name, Text(one.key), Text(one.cause))
        console.print(table)
        if len(found.broken) > _SHOWN:
            console.print(f"… and {len(found.broken) - _SHOWN:,} more in inspect.json (--out DIR)")


def _warn(console: Console, text: str) -> None:
    console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def _partly(figures: dict[str, Any]) -> str:
    looked_at = figures["looked_at"]
    return f", {looked_at:,} of them looked at" if looked_at < figures["samples"] else ""


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ×{count:,}" for name, count in counts.items()) or "none"


def _spread(figures: dict[str, float]) -> str:
    if not figures:
        return "none"
    if figures["min"] == figures["max"]:
        return f"{figures['min']:,}"
    return f"{figures['min']:,} to {figures['max']:,}, median {figures['median']:,.0f}, mean {figures['mean']:,.1f}"


def _short(name: str) -> str:
    shard, _, key = name.rpartition(": ")
    return f"{Path(shard).name}:{key}"
