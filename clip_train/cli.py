"""The commands, thin: each parses its arguments, calls one function and prints what came of it.

Modules that need torch are imported inside the commands, so that `--help` and mistakes in a recipe answer at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from clip_train.errors import LostError, UserError

EXPORTS = ("open_clip", "transformers", "sentence_transformers", "timm", "onnx")
console = Console(stderr=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 for a mistake of the user's, 75 to try again, 128 + a signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # keys and file names may be anything but UTF-8
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        rank = os.environ.get("RANK")
        where = f" (rank {rank})" if rank not in (None, "0") else ""
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error{where}:[/]", end=" ")
        print(error, file=sys.stderr, flush=True)
        return 75 if isinstance(error, LostError) else 2
    except BrokenPipeError:  # `clip-train … | head`
        sys.stderr.close()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}. Free some space, then run again.", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    parser = argparse.ArgumentParser(
        prog="clip-train", description="Contrastive image-text pretraining from scratch.", allow_abbrev=False
    )
    from clip_train import __version__

    parser.add_argument("--version", action="version", version=f"clip-train {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a recipe, or go on with a run")
    add_recipe_arguments(train)
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/NAME")
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the run's newest checkpoint where there is one (default), never, or from this checkpoint",
    )
    train.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY[,KEY]",
        help="go on although these differ from the checkpoint, e.g. data.batch_size,training.seed,data.sources",
    )
    train.set_defaults(run=run_train)

    quickstart = commands.add_parser("quickstart", help="tokenizer, training, evaluation and report in one go")
    quickstart.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    quickstart.add_argument("--run-dir", type=Path, metavar="DIR", default=Path("runs/quickstart"))
    quickstart.set_defaults(run=run_quickstart)

    evaluate = commands.add_parser("eval", help="a run's tasks: zero-shot, retrieval, probes, nearest neighbours")
    evaluate.add_argument("checkpoint", type=Path, help="a run folder or a checkpoint")
    evaluate.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                          help="change the recipe's evaluation, e.g. evaluation.tasks.NAME.shards=…")  # fmt: skip
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="where eval.json goes; default: the run folder")
    evaluate.add_argument("--weights", choices=["raw", "ema"], help="trained or averaged; default: as the recipe says")
    evaluate.set_defaults(run=run_eval)

    from clip_train.evaluation.text.commands import add_arguments as add_probe_arguments

    probe = commands.add_parser("probe", help="what text encoders know: probes, same-picture tasks")
    add_probe_arguments(probe)

    export = commands.add_parser(
        "export", help="a checkpoint for open_clip, transformers, sentence-transformers, timm or ONNX"
    )
    export.add_argument("checkpoint", type=Path, help="a run folder or a checkpoint")
    export.add_argument("--to", required=True, choices=EXPORTS)
    export.add_argument("out", type=Path, help="a new folder")
    export.add_argument("--weights", choices=["raw", "ema"], default="raw", help="trained (default) or averaged")
    export.set_defaults(run=run_export)

    bring_in = commands.add_parser("import", help="a model of open_clip, OpenAI or transformers as a checkpoint")
    bring_in.add_argument(
        "source", type=Path, help="an open_clip or transformers directory, a state dict, OpenAI's .pt"
    )
    bring_in.add_argument("out", type=Path, help="a new run folder")
    bring_in.add_argument("--recipe", default="imported", help="data, optimizer and evaluation around it")
    bring_in.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    bring_in.add_argument("--quick-gelu", action="store_true", help="of a bare state dict with OpenAI's activation")
    bring_in.add_argument("--vocabulary", type=Path, metavar="FILE", help="a vocabulary JSON or OpenAI's merges")
    bring_in.set_defaults(run=run_import)

    consolidate = commands.add_parser("consolidate", help="a checkpoint of whole files from one saved in shards")
    consolidate.add_argument("checkpoint", type=Path, help="a run folder or a checkpoint")
    consolidate.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    consolidate.set_defaults(run=run_consolidate)

    embed = commands.add_parser("embed", help="embeddings of shards, resumable, on all processes")
    embed.add_argument("checkpoint", type=Path, help="a run folder or a checkpoint")
    embed.add_argument("shards", help="path, braces, glob or embedded:…")
    embed.add_argument("out", type=Path, help="folder; a run that was cut goes on where it is given again")
    embed.add_argument("--image", default="jpg;jpeg;png;webp", help="member that holds the picture")
    embed.add_argument(
        "--caption", default="txt", help="member, json.FIELD or json.FIELD[:N]; 'none' embeds pictures alone"
    )
    embed.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16", help="numbers on disk (numpy has no bf16)")
    embed.add_argument("--precision", choices=["fp32", "bf16", "fp16"],
                       help="the towers' arithmetic (default: on a GPU that of training, else fp32)")  # fmt: skip
    embed.add_argument("--batch-size", type=int, default=256)
    embed.add_argument("--workers", type=int, default=0)
    embed.set_defaults(run=run_embed)

    search = commands.add_parser("search", help="exact search in embeddings, by captions or pictures")
    search.add_argument("embeddings", type=Path, help="what clip-train embed wrote")
    search.add_argument("checkpoint", type=Path, help="the model that wrote it")
    search.add_argument("query", nargs="+", help="captions, or paths of pictures")
    search.add_argument("--among", choices=["images", "captions"], default="images")
    search.add_argument("--count", type=int, default=12)
    search.add_argument("--page", type=Path, metavar="HTML", help="default: search.html beside the embeddings")
    search.set_defaults(run=run_search)

    report = commands.add_parser("report", help="write report.html and PNGs into a run folder")
    report.add_argument("run_dir", type=Path, metavar="RUN")
    report.set_defaults(run=run_report)

    estimate = commands.add_parser("estimate", help="parameters, FLOPs, memory and days, without allocating anything")
    add_recipe_arguments(estimate)
    estimate.add_argument("--devices", type=int, default=8, metavar="K", help="how many (default 8)")
    estimate.add_argument("--device", default="H100", choices=["A100", "H100", "H200", "L40S", "RTX4090"])
    estimate.add_argument("--peak-tflops", type=float, metavar="T", help="another device's 16-bit peak")
    estimate.add_argument("--mfu", type=float, default=0.35, help="model FLOPs utilisation (default 0.35)")
    estimate.add_argument("--tokens", type=float, metavar="L", help="mean caption length (default: the cap)")
    estimate.add_argument("--samples", type=float, metavar="N", help="samples to see (default: the recipe's)")
    estimate.set_defaults(run=run_estimate)

    recipe = commands.add_parser("recipe", help="print the resolved recipe, or the JSON schema of all keys")
    recipe.add_argument("recipe", nargs="?", help="a TOML file, or the name of a shipped recipe")
    recipe.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    recipe.add_argument("--schema", action="store_true", help="JSON schema, for editors")
    recipe.set_defaults(run=run_recipe)

    from clip_train.ablation.commands import add_command as add_ablate_command

    add_ablate_command(commands)

    from tokenizer.commands import add_commands as add_tokenizer_commands

    tokenizer = commands.add_parser("tokenizer", help="train, encode, inspect")
    add_tokenizer_commands(tokenizer.add_subparsers(title="commands", metavar="COMMAND", required=True))

    from clip_train.data.commands import add_commands as add_data_commands

    data = commands.add_parser("data", help="make shards, look into them, list the samples of a recipe's batches")
    add_data_commands(data.add_subparsers(title="commands", metavar="COMMAND", required=True))

    from clip_train.evaluation.text_to_image.commands import add_commands as add_generator_commands

    generator = commands.add_parser("generator", help="text-to-image: the generator that probes of text encoders share")
    add_generator_commands(generator.add_subparsers(title="commands", metavar="COMMAND", required=True))

    from clip_train.bench.commands import add_commands as add_bench_commands

    bench = commands.add_parser("bench", help="ours beside a peer, interleaved")
    add_bench_commands(bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True))
    return parser


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe and its overrides, as several commands take them."""
    parser.add_argument("recipe", help="a TOML file, or the name of a shipped recipe (quickstart)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="e.g. text.pool=mean"
    )


def run_train(args: argparse.Namespace) -> int:
    from clip_train.config import load_recipe
    from clip_train.launch import run_recipe as launch

    recipe = load_recipe(args.recipe, args.overrides)
    run_dir = args.run_dir or Path("runs") / recipe.name
    allowed = [key for part in args.allow_changed for key in part.split(",") if key]
    return launch(recipe, run_dir, resume=args.resume, console=console, allow_changed=allowed)


def run_quickstart(args: argparse.Namespace) -> int:
    from clip_train.quickstart import quickstart

    return quickstart(args.run_dir, args.overrides, console)


def run_eval(args: argparse.Namespace) -> int:
    from clip_train.launch import run_evaluation

    weights = [] if args.weights is None else [f"evaluation.weights={args.weights}"]
    return run_evaluation(args.checkpoint, [*args.overrides, *weights], args.out, console)


def run_export(args: argparse.Namespace) -> int:
    from clip_train.export.run import export
    from clip_train.loading import load_any
    from clip_train.training.checkpoint import read_checkpoint

    loaded = load_any(read_checkpoint(args.checkpoint), weights=args.weights)
    parity = export(loaded, args.to, args.out, source=args.checkpoint)
    console.print(f"{args.out}: loaded again by {args.to}: {parity}", soft_wrap=True)
    return 0


def run_import(args: argparse.Namespace) -> int:
    from clip_train.export.bring_in import bring_in

    recipe, model = bring_in(
        args.source, args.out, recipe=args.recipe, overrides=args.overrides, quick_gelu=args.quick_gelu,
        vocabulary=args.vocabulary,
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{args.out}: {recipe.vision.kind} at {recipe.vision.image_size} px, {parameters:,} parameters. Try: "
        f"clip-train eval {args.out}, or --set training.init={args.out} with a recipe",
        soft_wrap=True,
    )
    return 0


def run_consolidate(args: argparse.Namespace) -> int:
    from clip_train.training.consolidate import consolidate

    console.print(f"{consolidate(args.checkpoint, args.out)} → {args.out}", soft_wrap=True)
    return 0


def run_embed(args: argparse.Namespace) -> int:
    from clip_train.launch import run_embedding

    return run_embedding(
        args.checkpoint, [args.shards], args.out, image=args.image,
        caption=None if args.caption == "none" else args.caption, dtype=args.dtype, precision=args.precision,
        batch_size=args.batch_size, workers=args.workers, console=console,
    )  # fmt: skip


def run_search(args: argparse.Namespace) -> int:
    import numpy as np
    from PIL import Image

    from clip_train.evaluation.search import search, write_page
    from clip_train.loading import load

    loaded = load(args.checkpoint)
    queries = [
        loaded.encode_image(Image.open(query)) if Path(query).is_file() else loaded.encode_text(query)
        for query in args.query
    ]
    found = search(args.embeddings, np.concatenate([one.numpy() for one in queries]), args.count, args.among)
    for query, hits in zip(args.query, found, strict=True):
        console.print(f"[bold]{query}[/]", soft_wrap=True)
        for hit in hits:
            console.print(f"  {hit.cosine:.3f}  {hit.key}  {hit.caption}", markup=False, soft_wrap=True)
    page = args.page or args.embeddings / "search.html"
    for note in write_page(args.embeddings, args.query, found, page):
        console.print(note, soft_wrap=True)
    console.print(f"page: {page}", soft_wrap=True)
    return 0


def run_report(args: argparse.Namespace) -> int:
    from clip_train.evaluation.report import write_report

    console.print(f"report: {write_report(args.run_dir)}", soft_wrap=True)
    return 0


def run_estimate(args: argparse.Namespace) -> int:
    from clip_train.config import load_recipe
    from clip_train.estimate import main as estimate

    return estimate(load_recipe(args.recipe, args.overrides), args, console)


def run_recipe(args: argparse.Namespace) -> int:
    import json

    from clip_train.config import Recipe, dump_recipe, load_recipe

    if args.schema:
        print(json.dumps(Recipe.model_json_schema(), indent=2))
    elif args.recipe is None:
        raise UserError("name a recipe, or ask for --schema")
    else:
        print(dump_recipe(load_recipe(args.recipe, args.overrides)), end="")
    return 0
