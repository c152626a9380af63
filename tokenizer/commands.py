"""`clip-train tokenizer train | encode | inspect`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenizer.bpe import BPETokenizer
from tokenizer.corpus import read_captions
from tokenizer.training import SmallVocabularyWarning, train_bpe
from tokenizer.vocabulary import END_OF_WORD, OWN_CONTEXT, OWN_VOCAB

_TOKENIZER_HELP = "'default', a vocabulary (.json, .json.gz), OpenAI's merges (.txt, .txt.gz), a run or a checkpoint"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds `train`, `encode` and `inspect`; each sets `run`, a function of the parsed arguments to an exit code."""
    train = commands.add_parser("train", help="learn a vocabulary from captions")
    train.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help=".txt, .csv, .tsv, .jsonl (.gz), .tar shards"
    )
    train.add_argument("--out", type=Path, required=True, metavar="PATH", help="vocabulary.json or .json.gz")
    train.add_argument(
        "--vocab-size", type=int, default=OWN_VOCAB, metavar="N", help="ids in all (default %(default)s)"
    )
    train.add_argument("--context-length", type=int, default=OWN_CONTEXT, metavar="N", help="cap (default %(default)s)")
    train.add_argument("--min-count", type=int, default=2, metavar="N", help="rarest pair to merge (default 2)")
    train.add_argument(
        "--field", metavar="NAME", help="column or JSON field of the captions (default: the usual names)"
    )
    train.set_defaults(run=_guarded(_run_train))

    encode = commands.add_parser("encode", help="show the ids and pieces of texts")
    encode.add_argument("texts", nargs="+", metavar="TEXT", help="'-' reads a text a line from the standard input")
    encode.add_argument("--tokenizer", default="default", metavar="PATH", help=_TOKENIZER_HELP)
    encode.add_argument("--ids", action="store_true", help="the ids alone, a line a text")
    encode.set_defaults(run=_guarded(_run_encode))

    inspect = commands.add_parser("inspect", help="sizes, specials, fingerprint, longest tokens, tokens a word")
    inspect.add_argument("path", nargs="?", default="default", metavar="PATH", help=_TOKENIZER_HELP)
    inspect.add_argument("--captions", nargs="+", type=Path, default=[], metavar="FILE", help="measure on these")
    inspect.add_argument("--field", metavar="NAME", help="column or JSON field of the captions")
    inspect.set_defaults(run=_guarded(_run_inspect))


def train_from_files(
    paths: Sequence[Path],
    out: Path,
    *,
    vocab_size: int = OWN_VOCAB,
    context_length: int = OWN_CONTEXT,
    min_count: int = 2,
    field: str | None = None,
    console: Console | None = None,
) -> BPETokenizer:
    """Learns a vocabulary from caption files and saves it; on a console it says so when it came out smaller.

    Raises:
        FileNotFoundError, ValueError: see `read_captions` and `train_bpe`.
    """
    if not paths:
        raise ValueError("no caption files to learn a vocabulary from")
    with warnings.catch_warnings(record=console is not None) as caught:
        warnings.simplefilter("always", SmallVocabularyWarning)
        tokenizer = train_bpe(
            read_captions(paths, field),
            vocab_size,
            context_length=context_length,
            min_count=min_count,
            provenance="Learned from " + ", ".join(path.name for path in paths),
            console=console,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    if console is not None:
        for warning in caught or ():
            console.print(f"[yellow]note:[/] {warning.message}", soft_wrap=True)
        console.print(f"{out}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:12]}", soft_wrap=True)
    return tokenizer


def open_tokenizer(path: str | Path) -> BPETokenizer:
    """The tokenizer a person means: 'default', a vocabulary, OpenAI's merges, a run folder or a checkpoint.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not a vocabulary.
    """
    if str(path) == "default":
        return BPETokenizer.default()
    path = Path(path)
    if path.is_dir():
        places = [path / "tokenizer.json", path / "checkpoints/latest/tokenizer.json", path / "vocabulary.json"]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            raise ValueError(f"{path}: no tokenizer.json in this folder or in its checkpoints/latest")
        path = found
    if path.name.endswith((".txt", ".txt.gz")):
        return BPETokenizer.from_openai(path)
    return BPETokenizer.load(path)


def _run_train(args: argparse.Namespace, console: Console) -> None:
    train_from_files(
        args.files,
        args.out,
        vocab_size=args.vocab_size,
        context_length=args.context_length,
        min_count=args.min_count,
        field=args.field,
        console=console,
    )


def _run_encode(args: argparse.Namespace, console: Console) -> None:
    tokenizer = open_tokenizer(args.tokenizer)
    for argument in args.texts:
        for text in map(str.rstrip, sys.stdin) if argument == "-" else (argument,):
            ids, lengths = tokenizer.encode_batch([text])
            if args.ids:
                print(*ids.tolist())
                continue
            console.print(Text(text, style="bold"), soft_wrap=True)
            table = Table("id", "piece")
            for token_id, piece in zip(ids.tolist(), tokenizer.pieces(ids), strict=True):
                table.add_row(str(token_id), Text(piece))
            console.print(table)
            left_out = len(tokenizer.encode(text)) + 2 - int(lengths[0])
            cut = f", {left_out} more cut off at the cap of {tokenizer.context_length}" if left_out else ""
            console.print(f"{lengths[0]} tokens{cut}; decoded: ", end="")
            console.print(Text(tokenizer.decode(ids)))


def _run_inspect(args: argparse.Namespace, console: Console) -> None:
    tokenizer = open_tokenizer(args.path)
    vocabulary = tokenizer.vocabulary
    table = Table(show_header=False)
    table.add_row("ids", f"{tokenizer.vocab_size:,} (512 of bytes, {len(vocabulary.merges):,} merges,"
                         f" {len(vocabulary.own_specials)} specials)")  # fmt: skip
    table.add_row("context length", str(tokenizer.context_length))
    for role, token_id in sorted(vocabulary.special_ids.items(), key=lambda item: item[1]):
        table.add_row(role, Text(f"{token_id}  {vocabulary.specials[role]}"))
    table.add_row("fingerprint", tokenizer.fingerprint)
    table.add_row("provenance", Text(vocabulary.provenance or "unknown"))
    ordinary = vocabulary.tokens[: 512 + len(vocabulary.merges)]
    longest = sorted(ordinary, key=lambda token: (-len(token.removesuffix(END_OF_WORD)), token))[:10]
    table.add_row("longest tokens", Text(" ".join(longest)))
    table.add_row("whole words", f"{sum(token.endswith(END_OF_WORD) for token in ordinary):,}")
    if args.captions:
        captions = list(read_captions(args.captions, args.field))
        _, lengths = tokenizer.encode_batch(captions)
        words = sum(len(caption.split()) for caption in captions)
        cut = int((lengths == tokenizer.context_length).sum())
        table.add_row("captions", f"{len(captions):,} with {words:,} words")
        table.add_row("tokens a caption", f"mean {lengths.mean():.1f}, median {np.median(lengths):.0f},"
                                          f" longest {lengths.max()}, with SOT and EOT")  # fmt: skip
        table.add_row("tokens a word", f"{(lengths - 2).sum() / words:.2f} (of white-space-delimited words)")
        table.add_row("at the cap", f"{cut:,} captions ({cut / len(captions):.1%})")
    console.print(table)


def _guarded(run: Callable[[argparse.Namespace, Console], None]) -> Callable[[argparse.Namespace], int]:
    """Mistakes of the user become one line on the standard error and exit code 2."""

    def guarded(args: argparse.Namespace) -> int:
        try:
            run(args, Console(highlight=False))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return guarded
