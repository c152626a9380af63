"""`clip-train ablate`: its arguments, and what is done with them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds `ablate`, which sets `run`, a function of the parsed arguments to an exit code."""
    ablate = commands.add_parser("ablate", help="a grid of recipes: run what is missing, one table, one report")
    ablate.add_argument("grid", type=Path, metavar="GRID", help="a TOML file, as configs/ablations/text-tower.toml")
    ablate.add_argument("--budget", metavar="NAME", help="of the grid's budgets; default: everything")
    ablate.add_argument("--out", type=Path, metavar="DIR", help="default: runs/GRID, or runs/GRID-BUDGET")
    ablate.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at once, cores // N threads each (default: 1 beside a GPU, else one a core, four at most)",
    )
    ablate.add_argument("--share", metavar="I/N", help="the I-th of N parts, for arrays of jobs")
    what = ablate.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="show runs, steps and measured time, and stop")
    what.add_argument("--report", action="store_true", help="write table and report of what is finished, and stop")
    ablate.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from clip_train.ablation.main import ablate

    return ablate(
        args.grid, args.out, budget=args.budget, jobs=args.jobs, share=args.share, plan_only=args.plan,
        report_only=args.report, console=Console(highlight=False),
    )  # fmt: skip
