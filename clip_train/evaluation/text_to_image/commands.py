"""`clip-train generator train | grid`. Modules that are slow to import are imported when a command runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from clip_train.errors import UserError

DEFAULT = Path("runs/generator")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds the commands; each sets `run`, a function of the parsed arguments to an exit code."""
    train = commands.add_parser(
        "train", help="codebook, judge and transformer, once for all encoders; goes on where it was cut"
    )
    train.add_argument("--out", type=Path, default=DEFAULT, metavar="DIR", help=f"default: {DEFAULT}")
    train.add_argument("--budget", choices=["full", "small"], default="full", help="small is for trials (default full)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--train", nargs="+", metavar="PATTERN", help="pictures to learn from (default: the embedded pictograms)"
    )
    train.add_argument(
        "--test",
        nargs="*",
        metavar="NAME=PATTERN",
        help="pictures that are only measured; none of them: held-out names of --train",
    )
    train.add_argument("--image", default="jpg;jpeg;png;webp", metavar="EXT", help="member that holds the picture")
    train.add_argument("--caption", default="json.captions", metavar="COL", help="member, json.FIELD or json.FIELD[:N]")
    train.set_defaults(run=run_train)

    grid = commands.add_parser("grid", help="a PNG of what several probed encoders made of the same captions")
    grid.add_argument("probes", nargs="+", type=Path, metavar="RUN", help="run folders or folders that hold text.npz")
    grid.add_argument("--generator", type=Path, default=DEFAULT, metavar="DIR", help=f"default: {DEFAULT}")
    grid.add_argument("--out", type=Path, default=Path("grid.png"), metavar="PNG")
    grid.set_defaults(run=run_grid)


def run_train(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from clip_train.evaluation.text_to_image.stages import BUDGETS
    from clip_train.evaluation.text_to_image.train import TEST, TRAIN, train_generator

    console = Console(highlight=False)
    settings = replace(BUDGETS[args.budget], seed=args.seed)
    test = dict(_named(text) for text in args.test or ())
    if args.test is None and args.train is None:
        test = TEST
    generator = train_generator(
        args.out,
        settings,
        train=args.train or TRAIN,
        test=test,
        image=args.image,
        caption=args.caption,
        console=console,
    )
    figures, seconds = generator.about["figures"], generator.about["seconds"]
    for name, unit in (
        ("bits", "bits a code"),
        ("concept", "rank score"),
        ("recall", "recall at 10"),
        ("colour", "right colour"),
    ):
        console.print(f"{unit}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures[name].items()))
    console.print(
        f"{args.out}: generator {generator.fingerprint}, {seconds['wall']:.0f} s ({seconds['cpu']:.0f} s of processor)",
        soft_wrap=True,
    )
    return 0


def _named(text: str) -> tuple[str, str]:
    name, equals, pattern = text.partition("=")
    if not equals or not name or not pattern or not name.replace("-", "").isalnum():
        raise UserError(f"--test {text!r}: write NAME=PATTERN, the name of letters, digits and '-'")
    return name, pattern


def run_grid(args: argparse.Namespace) -> int:
    from clip_train.evaluation.text_to_image.generator import load_generator
    from clip_train.evaluation.text_to_image.grid import grid_of_codes
    from clip_train.evaluation.text_to_image.score import GRID, read_grid

    generator = load_generator(args.generator)
    codes = {path.name: read_grid(path, generator) for path in args.probes}
    grid_of_codes(generator, GRID, codes, args.out)
    Console(highlight=False).print(str(args.out), soft_wrap=True)
    return 0
