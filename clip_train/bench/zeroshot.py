"""Building a zero-shot classifier, beside open_clip's `build_zero_shot_classifier`: same weights, same prompts, fp32.

open_clip pads each prompt to the cap; ours sorts prompts by length and computes no padding. Before anything is timed
the two classifiers are compared. ImageNet's 1,000 classes × 80 templates take open_clip hours with a large tower on a
CPU: fewer classes are taken evenly from the list, so that their prompts are as long as all of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clip_train.bench.measure import conclude, interleave, machine, median_ratio
from clip_train.config import load_recipe
from clip_train.errors import UserError
from clip_train.evaluation.zeroshot import class_embeddings
from clip_train.export.run import export
from clip_train.from_recipe.data import build_preprocess
from clip_train.from_recipe.model import build_tokenizer, build_two_tower
from clip_train.loading import LoadedModel
from tokenizer import BPETokenizer


def main(args: argparse.Namespace) -> int:
    """Compare, time, print one table and the ratio."""
    import open_clip

    console, device = Console(highlight=False), torch.device(args.device)
    recipe = load_recipe(args.recipe, args.overrides)
    tokenizer = build_tokenizer(recipe)
    torch.manual_seed(0)
    loaded = LoadedModel(build_two_tower(recipe, tokenizer).eval(), build_preprocess(recipe), tokenizer, recipe, 0)
    names = evenly(list(open_clip.IMAGENET_CLASSNAMES), args.classes)
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        export(loaded, "open_clip", out, source=out)
        peer: Any = open_clip.create_model_and_transforms(f"local-dir:{out}")[0]  # pyright: ignore
        peer_tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{out}")  # pyright: ignore
    peer.eval().to(device)
    loaded.model.to(device)

    def theirs() -> Tensor:
        with torch.no_grad():
            classifier: Any = open_clip.build_zero_shot_classifier(  # pyright: ignore
                peer, peer_tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES, 10, device, use_tqdm=False
            )
        return classifier.T

    def ours() -> Tensor:
        with torch.no_grad():
            return class_embeddings(loaded.model, tokenizer, names, templates, device)

    with console.status("comparing classifiers"):
        gap = float((theirs() - ours()).abs().max())
    if gap > 1e-5:
        raise UserError(f"the two classifiers differ by {gap:.1e}: there is nothing to compare")
    with console.status("timing"):
        times = interleave({"open_clip": theirs, "clip-train": ours}, rounds=args.rounds, warmup=0, device=device)

    prompts = len(names) * len(templates)
    tokens = {len(part): _tokens(tokenizer, part, templates) for part in (names, open_clip.IMAGENET_CLASSNAMES)}
    table = Table(title=f"zero-shot classifier, {recipe.name}, {len(names)} classes × {len(templates)} templates, fp32")
    for column in ("", "prompts/s", "s for 1,000 classes"):
        table.add_column(column, justify="left" if not column else "right")
    for name, measured in times.items():
        rate = prompts / measured.median
        table.add_row(name, f"{rate:,.0f}", f"{1000 * len(templates) / rate:,.0f}")
    console.print(table)
    shown = ", ".join(f"{mean:.2f} of {classes:,} classes" for classes, mean in tokens.items())
    console.print(f"tokens a prompt: {shown}; open_clip pads to {tokenizer.context_length}")
    console.print(f"{machine(device)}; classifiers equal to {gap:.0e}; median of {args.rounds} rounds")
    return conclude(median_ratio(times["open_clip"], times["clip-train"]), args.bar, console)


def evenly(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names at equal distances; all where there are no more.

    Raises:
        UserError: less than one is asked for.
    """
    if count < 1:
        raise UserError("--classes must be at least 1")
    count = min(count, len(names))
    return [names[place * len(names) // count] for place in range(count)]


def _tokens(tokenizer: BPETokenizer, names: Sequence[str], templates: Sequence[str]) -> float:
    _, lengths = tokenizer.encode_batch([template.replace("{}", name) for name in names for template in templates])
    return float(lengths.mean())
