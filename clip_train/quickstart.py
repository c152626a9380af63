"""The whole way in one command: captions -> vocabulary -> training -> evaluation -> report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from clip_train.config import load_recipe
from clip_train.data.shards import resolve
from clip_train.evaluation.report import write_report
from clip_train.launch import run_recipe
from tokenizer.commands import train_from_files


def quickstart(run_dir: Path, overrides: Sequence[str], console: Console) -> int:
    """Run the shipped `quickstart` recipe with a vocabulary learned from its own captions."""
    vocabulary = run_dir / "vocabulary.json"
    if not vocabulary.exists():
        console.rule("1 · a vocabulary from the captions")
        shards = [Path(shard) for shard in resolve("embedded:pictograms/train-*.tar")]
        train_from_files(shards, vocabulary, console=console)
    recipe = load_recipe("quickstart", [f"tokenizer.path={vocabulary.resolve()}", *overrides])
    console.rule("2 · training and evaluation")
    code = run_recipe(recipe, run_dir, resume="auto", console=console)
    if code == 0:
        console.rule("3 · report")
        console.print(f"[bold green]report:[/] {write_report(run_dir).resolve()}", soft_wrap=True)
    return code
