"""`clip-train bench …`: each benchmark declares its arguments and runs when asked for."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:  # pyright: ignore[reportPrivateUsage]
    """Add every benchmark."""
    step = commands.add_parser("step", help="a training step beside open_clip's own loop")
    add_step_arguments(step)
    step.set_defaults(run=run_step)

    curves = commands.add_parser("curves", help="whole runs beside open_clip's: losses, seconds to equal accuracy")
    add_curves_arguments(curves)
    curves.set_defaults(run=run_curves)

    loss = commands.add_parser("loss", help="the tiled loss beside the dense one and open_clip's")
    add_loss_arguments(loss)
    loss.set_defaults(run=run_loss)

    tokenizer = commands.add_parser(
        "tokenizer", help="encoding and training beside open_clip, transformers, tokenizers"
    )
    add_tokenizer_arguments(tokenizer)
    tokenizer.set_defaults(run=run_tokenizer)

    zeroshot = commands.add_parser("zeroshot", help="building a zero-shot classifier beside open_clip's")
    add_zeroshot_arguments(zeroshot)
    zeroshot.set_defaults(run=run_zeroshot)

    checkpoint = commands.add_parser("checkpoint", help="how long saving keeps training waiting")
    add_checkpoint_arguments(checkpoint)
    checkpoint.set_defaults(run=run_checkpoint)

    memory = commands.add_parser("memory", help="what the input side holds, epoch after epoch")
    add_memory_arguments(memory)
    memory.set_defaults(run=run_memory)

    loader = commands.add_parser("loader", help="reading, decoding and views beside open_clip's own loader")
    add_loader_arguments(loader)
    loader.set_defaults(run=run_loader)

    resume = commands.add_parser("resume", help="from a recipe to its first batch at 90 % of an epoch")
    add_resume_arguments(resume)
    resume.set_defaults(run=run_resume)


def add_resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=100_000, help="of an epoch (default 100,000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bar", type=float, metavar="S", help="exit with 1 where a first start takes more seconds")


def run_resume(args: argparse.Namespace) -> int:
    from clip_train.bench.resume import main

    return main(args)


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", default="quickstart", help="whose model, data and precision (default quickstart)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--against", choices=["open_clip"], default="open_clip")
    parser.add_argument(
        "--embedded", action="store_true", help="the embedded pictures and captions instead of the recipe's"
    )
    parser.add_argument("--pad", action="store_true", help="ours pads to the cap too, as open_clip does")
    parser.add_argument(
        "--own-optimizer",
        action="store_true",
        help="ours updates with the recipe's optimizer; otherwise with AdamW, which is what open_clip has",
    )
    parser.add_argument("--compile", action="store_true", help="compile our blocks, and open_clip's model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--png", type=Path, metavar="OUT.png", help="draw the table")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bar", type=float, metavar="Y", help="exit with 1 where the ratio is smaller")


def add_curves_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="quickstart", help="whose model, data, task (default quickstart)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--against", choices=["open_clip"], default="open_clip")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--parts", type=int, default=6, help="turns of each side; accuracy is measured after each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW, where the recipe has another optimizer")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-curves"), metavar="DIR", help="JSON and PNG")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bar", type=float, metavar="Y", help="exit with 1 where the ratio is smaller")


def run_curves(args: argparse.Namespace) -> int:
    from clip_train.bench.curves import main

    return main(args)


def run_step(args: argparse.Namespace) -> int:
    from clip_train.bench.step import main

    return main(args)


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=["infonce", "sigmoid"], default="infonce")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument(
        "--against", choices=["dense", "open_clip"], default="dense", help="whose time the ratio is to (default dense)"
    )
    parser.add_argument("--alone", action="store_true", help="time the tiled loss and that peer, no third")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bar", type=float, metavar="Y", help="exit with 1 where the ratio is smaller")
    parser.add_argument(
        "--memory-bar", type=float, metavar="Y", help="exit with 1 where the peer needs less than Y times our memory"
    )
    parser.add_argument("--most-ms", type=float, metavar="T", help="exit with 1 where ours takes longer")
    parser.add_argument("--most-mib", type=float, metavar="M", help="exit with 1 where ours needs more memory")


def run_loss(args: argparse.Namespace) -> int:
    from clip_train.bench.loss import main

    return main(args)


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    from clip_train.bench.tokenizer import add_arguments

    add_arguments(parser)


def run_tokenizer(args: argparse.Namespace) -> int:
    from clip_train.bench.tokenizer import main

    return main(args)


def add_zeroshot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="vit-b-32", help="whose text tower (default vit-b-32)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--classes", type=int, default=20, help="of ImageNet's 1,000, taken evenly (default 20: minutes, not hours)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bar", type=float, metavar="Y", help="exit with 1 where the ratio is smaller")


def run_zeroshot(args: argparse.Namespace) -> int:
    from clip_train.bench.zeroshot import main

    return main(args)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="vit-b-32", help="whose model and optimizer (default vit-b-32)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: here)")
    parser.add_argument("--batch", type=int, default=16, help="pairs of the steps beside the write (default 16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bar", type=float, metavar="Y", help="exit with 1 where the ratio is smaller")


def run_checkpoint(args: argparse.Namespace) -> int:
    from clip_train.bench.checkpoint import main

    return main(args)


def add_loader_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="*", metavar="SHARDS", help="local shards with txt members; default: made here")
    parser.add_argument("--against", choices=["open_clip"], default="open_clip")
    parser.add_argument("--size", type=int, default=224, help="side of the views (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of both (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each of ours (default %(default)s)")
    parser.add_argument("--scaled", action="store_true", help="ours has data.scaled_decode = true; states the PSNR")
    parser.add_argument(
        "--photo", type=_size, default=(512, 384), metavar="WxH", help="of the pictures made here (default 512x384)"
    )
    parser.add_argument(
        "--ways", type=_way, nargs="+", default=[], metavar="W:T", help="more of ours: W workers of T threads"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8, help="timed in a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bar", type=float, metavar="Y", help="exit with 1 where the ratio to open_clip is smaller")
    parser.add_argument(
        "--share-bar", type=float, metavar="S", help="exit with 1 where the share of decoding alone is smaller"
    )


def run_loader(args: argparse.Namespace) -> int:
    from clip_train.bench.loader import main

    return main(args)


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default="quickstart", help="whose data is read (default quickstart)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--epochs", type=int, default=10, help="after those that fill (default 10)")
    parser.add_argument("--fill", type=int, default=1, metavar="N", help="first epochs that are not judged (default 1)")
    parser.add_argument("--workers", type=int, default=2, metavar="K", help="loader workers (default 2)")
    parser.add_argument("--bar", type=float, metavar="P", help="exit with 1 where an epoch differs by more than P %%")


def run_memory(args: argparse.Namespace) -> int:
    from clip_train.bench.memory import main

    return main(args)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def _way(text: str) -> tuple[int, int]:
    workers, _, threads = text.partition(":")
    return int(workers), int(threads)
