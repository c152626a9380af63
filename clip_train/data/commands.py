"""`clip-train data pack | inspect | order`. Modules that are slow to import are imported when a command runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.text import Text


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds the commands; each sets `run`, a function of the parsed arguments to an exit code."""
    workers = min(16, os.cpu_count() or 1)

    pack = commands.add_parser("pack", help="make shards from a folder, csv, tsv, jsonl, parquet or lines of text")
    pack.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder with captions, .csv, .tsv, .jsonl, .parquet; .txt, a text a line",
    )
    pack.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one whose pack was interrupted")
    pack.add_argument(
        "--image",
        metavar="COL",
        help="column of the pictures: bytes or paths (default: the usual names); none packs texts alone",
    )
    pack.add_argument(
        "--caption", metavar="COL", help="column of the captions: a text or a list (default: usual names)"
    )
    pack.add_argument(
        "--keep", action="append", default=[], metavar="COL", help="keep this column, too; may be repeated"
    )
    pack.add_argument("--image-root", type=Path, metavar="DIR", help="where paths begin (default: the table's folder)")
    pack.add_argument(
        "--encoding", default="utf-8-sig", metavar="NAME", help="of tables and lines of text (default UTF-8)"
    )
    pack.add_argument("--per-shard", type=int, default=1000, metavar="N", help="samples in a shard (default 1000)")
    pack.add_argument("--name", default="shard", help="shards are NAME-000000.tar, … (default shard)")
    pack.add_argument("--max-size", type=int, metavar="PX", help="shrink pictures whose longest side is above this")
    pack.add_argument("--format", choices=["jpg", "png", "webp"], help="encode all pictures so (default: as they are)")
    pack.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="of jpg and webp that are encoded (default 90)"
    )
    pack.add_argument(
        "--max-bad-fraction", type=float, default=0.01, metavar="F", help="stop above this (default 0.01)"
    )
    pack.add_argument("--workers", type=int, default=workers, metavar="K", help=f"processes (default {workers})")
    pack.set_defaults(run=run_pack)

    inspect = commands.add_parser("inspect", help="what is in shards: sizes, captions, duplicates, broken samples")
    inspect.add_argument("patterns", nargs="+", metavar="PATTERN", help="as `shards` in a recipe")
    inspect.add_argument(
        "--image",
        metavar="EXT",
        help="as in a recipe, for example 'jpg;png' (default: what is there); none: texts alone",
    )
    inspect.add_argument(
        "--caption", metavar="COL", help="txt, json.FIELD or json.FIELD[:N], as in a recipe (default: what is there)"
    )
    inspect.add_argument("--tokenizer", default="default", metavar="PATH", help="that captions are measured with")
    inspect.add_argument("--out", type=Path, metavar="DIR", help="write inspect.json and contact_sheet.png there")
    inspect.add_argument("--fix", type=Path, metavar="OUT", help="write a copy without the broken samples there")
    inspect.add_argument("--sample", type=int, metavar="N", help="look at N samples, drawn evenly (default: all)")
    inspect.add_argument("--workers", type=int, default=workers, metavar="K", help=f"processes (default {workers})")
    inspect.add_argument("--cache-dir", type=Path, metavar="DIR", help="where shards from elsewhere are kept")
    inspect.add_argument("--cache-gib", type=float, metavar="G", help="most GiB of them (default: what the disk holds)")
    inspect.set_defaults(run=run_inspect)

    order = commands.add_parser("order", help="the samples of a recipe's batches, in order; reads no picture")
    order.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
    order.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    order.add_argument(
        "--steps", required=True, metavar="A:B", help="both included, numbered as in metrics.jsonl: from 1"
    )
    order.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help="as a run goes on from it: after --allow-changed, samples count on",
    )
    order.add_argument("--ranks", type=int, default=1, metavar="N", help="training processes (default 1)")
    order.add_argument("--workers", type=int, metavar="K", help="loader workers of each (default: the recipe's)")
    lines = order.add_mutually_exclusive_group()
    lines.add_argument("--batches", action="store_true", help="a line a batch: its digest, first and last key")
    lines.add_argument("--captions", action="store_true", help="the chosen captions too, for which shards are read")
    order.set_defaults(run=run_order)


def run_pack(args: argparse.Namespace) -> int:
    from clip_train.data.pack import pack
    from clip_train.data.pack_sources import open_source

    console = Console(highlight=False)
    try:
        packed = pack(
            open_source(args.source, image_root=args.image_root, encoding=args.encoding),
            args.out,
            image=args.image,
            caption=args.caption,
            keep=args.keep,
            per_shard=args.per_shard,
            name=args.name,
            max_size=args.max_size,
            format=args.format,
            quality=args.quality,
            workers=args.workers,
            max_bad_fraction=args.max_bad_fraction,
            console=console,
        )
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on with the shards that are missing")
        raise
    what = "already there" if packed.already else "packed"
    shards = sum(record.samples > 0 for record in packed.shards)
    console.print(
        f"{args.out}: {what}: {packed.samples:,} samples with {packed.captions:,} captions in {shards:,} shards, "
        f"fingerprint {packed.fingerprint}",
        soft_wrap=True,
    )
    for one in packed.skipped[:5]:
        console.print(Text.assemble(("skipped: ", "yellow"), f"{one.name}: {one.cause}"), soft_wrap=True)
    if packed.skipped:
        console.print(f"{len(packed.skipped):,} skipped in all: {args.out / 'skipped.jsonl'}", soft_wrap=True)
    console.print("\nIn a recipe:\n")
    print(packed.stanza())
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    import json

    from clip_train.data.cache import Cache, default_folder
    from clip_train.data.inspect import inspect
    from clip_train.data.inspect_fix import check_destination, fix
    from clip_train.data.inspect_report import show
    from clip_train.data.inspect_sheet import contact_sheet
    from clip_train.data.pack_shard import NO_PICTURE
    from clip_train.errors import DataError
    from tokenizer.commands import open_tokenizer

    console = Console(highlight=False)
    if args.fix is not None:
        if args.sample is not None:
            raise DataError("--fix needs all samples looked at: leave --sample out")
        check_destination(args.fix, [])
    try:
        tokenizer = open_tokenizer(args.tokenizer)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer {args.tokenizer}: {error}") from error
    found = inspect(
        args.patterns,
        image=args.image,
        caption=args.caption,
        tokenizer=tokenizer,
        sample=args.sample,
        workers=args.workers,
        console=console,
        cache=Cache(
            folder=args.cache_dir.absolute() if args.cache_dir else default_folder(),
            max_bytes=int(args.cache_gib * 2**30) if args.cache_gib else None,
            commands=True,  # whoever names a command here wants it run
        ),
    )
    show(found, console)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found.figures, indent=1, ensure_ascii=False)
        (args.out / "inspect.json").write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")
        if found.image != NO_PICTURE:
            contact_sheet(args.out / "contact_sheet.png", found.scans, found.good, found.image)
        sheet = "" if found.image == NO_PICTURE else ", contact_sheet.png"
        console.print(f"{args.out}: inspect.json{sheet}", soft_wrap=True)
    if args.fix is not None:
        fixed = fix(found, args.fix)
        lost = f"; nothing left of {', '.join(fixed.without)}" if fixed.without else ""
        console.print(
            f"{args.fix}: {fixed.samples:,} samples in {len(fixed.shards):,} shards, {fixed.left_out:,} left out "
            f"(left_out.jsonl){lost}; fingerprint {fixed.fingerprint}",
            soft_wrap=True,
        )
    console.print("\nIn a recipe:\n")
    print(found.stanza)
    return 0


def run_order(args: argparse.Namespace) -> int:
    # Above this package, and slow (torch): a command may reach up, the modules here may not.
    from clip_train.config import load_recipe
    from clip_train.data.inspect_order import listing, parse_steps
    from clip_train.from_recipe.data import build_stream
    from clip_train.from_recipe.model import build_tokenizer
    from clip_train.from_recipe.update import total_steps
    from clip_train.training.changes import origin_after
    from clip_train.training.checkpoint import read_checkpoint

    steps = parse_steps(args.steps)
    recipe = load_recipe(args.recipe, args.overrides)
    stream = build_stream(recipe, build_tokenizer(recipe))
    if args.checkpoint is not None:
        stream.order.origin = origin_after(recipe, read_checkpoint(args.checkpoint), stream)
    last = total_steps(recipe, stream.order)
    if steps[-1] > last:
        note = f"note: the recipe ends with step {last} (training.{'epochs' if recipe.training.epochs else 'steps'})"
        Console(stderr=True, highlight=False).print(note, soft_wrap=True)
    workers = recipe.data.workers if args.workers is None else args.workers
    for line in listing(
        stream, steps, ranks=args.ranks, workers=workers, batches_only=args.batches, captions=args.captions
    ):
        print(line)
    return 0
