"""`clip-train probe PATH … --suite text`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from clip_train.errors import UserError

if TYPE_CHECKING:
    from clip_train.evaluation.text.compare import Difference
    from clip_train.evaluation.text.results import TaskResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `clip-train probe` takes."""
    parser.add_argument(
        "encoders", nargs="+", type=Path, metavar="PATH",
        help="runs or checkpoints of ours, transformers or open_clip directories; several are compared with the first",
    )  # fmt: skip
    parser.add_argument("--suite", choices=list(SUITES), default="text", help="what is asked (default text)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="default: PATH/probe; of several encoders each gets a folder of its name in DIR",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", default="", metavar="NAME[,NAME]", help="exp1, exp2, exp1/topic, … (default: all that are there)"
    )
    parser.add_argument(
        "--weights",
        choices=["raw", "ema"],
        help="of checkpoints of ours: trained or averaged; default: as the recipe says",
    )
    parser.add_argument("--device", default="cpu", help="where the encoder runs (default cpu; cuda where there is one)")
    parser.add_argument(
        "--sentiment", type=Path, metavar="DIR|FILE",
        help="sentiment with human ratings: what pip download --no-deps --no-build-isolation vaderSentiment==0.5 got",
    )  # fmt: skip
    parser.add_argument(
        "--glue",
        metavar="hub|DIR[:NAME,…]",
        help="GLUE through datasets, from the hub or a local folder; all its tasks",
    )
    parser.add_argument("--glue-limit", type=int, default=10_000, metavar="N", help="training texts of a task at most")
    parser.add_argument("--finetune", action="store_true", help="also fine-tune the tower on each task of experiment 1")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=2e-5, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument(
        "--generator", type=Path, metavar="DIR",
        help="experiment 3: what `clip-train generator train` made (default: runs/generator where it is finished)",
    )  # fmt: skip
    parser.add_argument("--budget", choices=["full", "small"], default="full", help="of experiment 3")
    parser.set_defaults(run=run_probe)


def run_probe(args: argparse.Namespace) -> int:
    """Run the suite that was asked for."""
    return SUITES[args.suite](args)


def probe_texts(args: argparse.Namespace) -> int:
    """Run the text suite on every encoder; several are compared at the end."""
    console = Console(highlight=False)
    from clip_train.evaluation.text.encoder import is_ours, open_encoder
    from clip_train.evaluation.text.finetune import Settings
    from clip_train.evaluation.text.suite import EXP3, Pictures, choose, run_suite, save_suite, tasks_from_elsewhere

    wanted = [name.strip() for name in args.tasks.split(",") if name.strip()]
    tasks = choose(wanted, tasks_from_elsewhere(args.sentiment, args.glue, args.glue_limit))
    finetune = Settings(epochs=args.epochs, lr=args.lr, seeds=args.seeds) if args.finetune else None
    generator = _generator(args.generator, asked=EXP3 in wanted) if not wanted or EXP3 in wanted else None
    places = _places(args.encoders, args.out)
    if args.weights is not None and not any(map(is_ours, args.encoders)):
        raise UserError("--weights chooses among those of a checkpoint of ours, and no path is one: leave it out")
    for path in args.encoders[1:]:
        open_encoder(path, weights=args.weights)  # takes seconds; its mistakes need not wait for the first one's suite
    found: dict[str, list[TaskResult]] = {}
    for (name, out), path in zip(places.items(), args.encoders, strict=True):
        encoder = open_encoder(path, device=args.device, weights=args.weights)
        pictures = None if generator is None else Pictures(generator, args.budget, out / "pictures.png")
        learned = sum(experiment == "exp1" for experiment, _ in tasks) if finetune else 0
        with _progress(console) as progress:
            bar = progress.add_task(name, total=len(tasks) + learned + (pictures is not None))
            found[name] = run_suite(
                encoder, tasks, finetune=finetune, pictures=pictures, advance=partial(_advance, progress, bar, name)
            )
        gone = save_suite(encoder, path, out, found[name])
        if gone:
            console.print(f"{out / 'text.json'}: held {gone}: replaced", soft_wrap=True)
        console.print(table_of(name, found[name]))
        console.print(f"{out / 'text.json'}, {out / 'text.npz'}", soft_wrap=True)
    if len(found) > 1:
        from clip_train.evaluation.text.compare import compare, kind_of, write_comparison

        differences = compare(found)
        console.print(comparison_table(list(found), differences))
        apart = {one.name for results in found.values() for one in results if kind_of(one) is None}
        if apart:
            console.print(f"not compared, being no mean, area or correlation of items: {', '.join(sorted(apart))}")
        target = (args.out or next(iter(places.values()))) / "comparison.json"
        write_comparison(target, list(found), differences)
        console.print(str(target), soft_wrap=True)
    return 0


SUITES: dict[str, Callable[[argparse.Namespace], int]] = {"text": probe_texts}
"""By name; each writes NAME.json and NAME.npz."""


def _generator(folder: Path | None, *, asked: bool) -> Any:
    """The generator that was given, or the default one; None where there is none finished and none was asked for."""
    from clip_train.evaluation.text_to_image.commands import DEFAULT
    from clip_train.evaluation.text_to_image.generator import ABOUT, load_generator

    if folder is None and not (DEFAULT / ABOUT).is_file() and not asked:
        return None
    return load_generator(folder or DEFAULT)


def _advance(progress: Progress, bar: TaskID, name: str, task: str, _: list[TaskResult]) -> None:
    progress.update(bar, advance=1, description=f"{name} {task}")


def _places(paths: Sequence[Path], out: Path | None) -> dict[str, Path]:
    """A name and a folder for each encoder."""
    if len(paths) == 1:
        return {paths[0].name or str(paths[0]): out or _folder(paths[0]) / "probe"}
    names = [path.name for path in paths]
    if len(set(names)) < len(names):  # runs/a/probe and runs/b/probe: tell them apart by what comes before
        names = [str(path).strip("/.").replace("/", "-") for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"an encoder is named twice: {', '.join(map(str, paths))}")
    return {
        name: _folder(path) / "probe" if out is None else out / name for name, path in zip(names, paths, strict=True)
    }


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
        transient=True,
    )  # fmt: skip


def table_of(name: str, results: Sequence[TaskResult]) -> Table:
    """One encoder's figures."""
    table = slim_table(f"{name} (words: a bag of words)", ("task", "metric"), ("value", "chance", "words", "n", "pool"))
    for one in results:
        bag = one.more.get("bag_of_words")
        table.add_row(
            one.name, one.metric, f"[bold]{one.value:.3f}[/]", f"{one.chance:.3f}",
            "" if bag is None else f"{bag:.3f}", str(one.n), one.pool,
        )  # fmt: skip
    return table


def slim_table(title: str, texts: Sequence[str], figures: Sequence[str]) -> Table:
    """A table that loses no digit in 80 columns: what is long folds, and there are few lines."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.collapse_padding = True
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def comparison_table(names: Sequence[str], differences: Sequence[Difference]) -> Table:
    """Differences from the first encoder, with their intervals."""
    table = slim_table(
        f"against {names[0]}: value, difference and its 95 % interval, p by Holm and by Williams",
        ("task", "encoder"),
        ("value", "difference", "interval", "p", "Williams"),
    )
    for one in differences:
        task = one.task + " (less is better)" * one.less_is_better
        table.add_row(
            task, one.encoder, f"{one.value:.3f}", f"{one.value - one.reference:+.3f}",
            f"{one.low:+.3f} … {one.high:+.3f}", f"{one.p:.2g}",
            "" if one.williams_p is None else f"{one.williams_p:.2g}",
        )  # fmt: skip
    return table
