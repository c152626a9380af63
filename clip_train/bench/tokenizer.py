"""Our tokenizer beside open_clip's SimpleTokenizer and transformers' CLIPTokenizerFast, our trainer beside BpeTrainer.

    clip-train bench tokenizer --bar 10                            # encoding, beside open_clip
    clip-train bench tokenizer --against transformers --bar 2      # encoding, beside transformers
    clip-train bench tokenizer --against tokenizers --bar 1        # training on 100 MB, beside BpeTrainer

Everything runs in one thread. Encoding uses OpenAI's merges out of the installed open_clip, on the same captions, and
the ids are compared before anything is timed. Once with tokenizers that have seen the captions before (their caches of
words are warm, as in all but the first minute of a run), once with new ones.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from clip_train.bench.measure import Times, conclude, interleave, machine, median_ratio
from clip_train.errors import UserError
from tokenizer import BPETokenizer, train_bpe
from tokenizer.corpus import read_captions
from tokenizer.vocabulary import END_OF_WORD

OURS = "clip-train"
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `clip-train bench tokenizer`."""
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="captions (.txt, .csv, .jsonl, .tar …); default: synthetic"
    )
    parser.add_argument(
        "--against",
        choices=["open_clip", "transformers", "tokenizers"],
        default="open_clip",
        help="whose ratio is the last line; 'tokenizers' times training instead of encoding",
    )
    parser.add_argument("--captions", type=int, default=20_000, metavar="N", help="to encode (default %(default)s)")
    parser.add_argument(
        "--train-megabytes", type=float, default=100, metavar="M", help="to train on (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each (default %(default)s)")
    parser.add_argument("--bar", type=float, metavar="Y", help="exit with 1 where the ratio is smaller")


def main(args: argparse.Namespace) -> int:
    """Compare, time, print one table and the ratio."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the Rust libraries start their threads
    console = Console(highlight=False)
    console.print(machine())
    if args.against == "tokenizers":
        ratio = bench_training(_texts(args.files, args.train_megabytes), args.rounds, console)
    else:
        captions = [text for text, _ in zip(_texts(args.files), range(args.captions), strict=False)]
        ratio = bench_encoding(captions, args.rounds, console)[args.against]
    return conclude(ratio, args.bar, console)


def bench_encoding(captions: list[str], rounds: int, console: Console) -> dict[str, float]:
    """Times encoding of the same captions; returns how many times faster ours is than each peer, caches warm."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    merges = default_bpe()
    make: dict[str, Callable[[], Callable[[], object]]] = {
        OURS: lambda: _ours(BPETokenizer.from_openai(merges), captions),
        "open_clip": lambda: _open_clip(SimpleTokenizer(), captions),
        "transformers": lambda: _transformers(BPETokenizer.from_openai(merges), captions),
    }
    check_same_ids({name: side() for name, side in make.items()}, captions, console)
    warm = interleave({name: side() for name, side in make.items()}, rounds=rounds)
    new = {name: iter([side() for _ in range(rounds)]) for name, side in make.items()}
    cold = interleave({name: lambda runs=runs: next(runs)() for name, runs in new.items()}, rounds=rounds, warmup=0)

    characters = sum(map(len, captions))
    table = Table(
        title=f"encoding {len(captions):,} captions of {characters / len(captions):.0f} characters, one thread"
    )
    for column in ("", "captions/s", "ours is faster by", "captions/s, new", "ours is faster by"):
        table.add_column(column, justify="right" if column else "left")
    for name in make:
        rates = (len(captions) / times[name].median for times in (warm, cold))
        factors = (f"{median_ratio(times[name], times[OURS]):.1f}×" if name != OURS else "" for times in (warm, cold))
        (warm_rate, cold_rate), (warm_factor, cold_factor) = rates, factors
        table.add_row(name, f"{warm_rate:,.0f}", warm_factor, f"{cold_rate:,.0f}", cold_factor)
    console.print(table)
    return {name: median_ratio(warm[name], warm[OURS]) for name in make}


def check_same_ids(sides: dict[str, Callable[[], Any]], captions: list[str], console: Console) -> None:
    """Compares the ids of all; transformers, which has no ftfy, may differ where a caption needs one, and is counted.

    Raises:
        UserError: ids differ where they must not.
    """
    ids, lengths = sides[OURS]()
    ours = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    for name in ("open_clip", "transformers"):
        theirs = sides[name]()
        different = [text for text, a, b in zip(captions, ours, theirs, strict=True) if a != b]
        unexpected = [text for text in different if name == "open_clip" or (text.isascii() and "&" not in text)]
        if unexpected:
            raise UserError(f"{name} gives other ids for {len(unexpected)} captions, the first is {unexpected[0]!r}")
        note = f"; {len(different)} differ, which ftfy or unescaping changes" if different else ""
        console.print(f"ids equal to those of {name} for {len(captions) - len(different):,} captions{note}")


def bench_training(texts: Iterator[str], rounds: int, console: Console) -> float:
    """Times learning 49,152 ids from the same texts; returns how many times faster ours is."""
    corpus = list(texts)
    megabytes = sum(len(text.encode()) + 1 for text in corpus) / 1e6
    sizes: dict[str, int] = {}

    def ours() -> None:
        sizes[OURS] = train_bpe(corpus).vocab_size

    def theirs() -> None:
        sizes["tokenizers"] = _bpe_trainer(corpus)

    times = interleave({OURS: ours, "tokenizers": theirs}, rounds=rounds, warmup=0)
    table = Table("", "seconds", "ids", title=f"learning a vocabulary from {megabytes:.0f} MB of text, one thread")
    for name, spent in times.items():
        table.add_row(name, _seconds(spent), f"{sizes[name]:,}")
    console.print(table)
    return median_ratio(times["tokenizers"], times[OURS])


def synthetic_captions(seed: int = 0, words: int = 1_000_000) -> Iterator[str]:
    """Endless captions with the statistics of text: Zipf's law over the default vocabulary's words and, rarer than all
    of these, blends of two of them, so that new words keep coming (about as fast as in the glosses of a dictionary:
    30,000 distinct among 200,000); some punctuation, capitals, digits, accents, emoji.
    """
    generator = np.random.default_rng(seed)
    tokens = BPETokenizer.default().vocabulary.tokens
    known = [t.removesuffix(END_OF_WORD) for t in tokens if t.endswith(END_OF_WORD) and t.isascii() and len(t) > 5]
    first, second = generator.integers(0, len(known), (2, words - len(known)))
    blends = (
        known[a][: len(known[a]) // 2 + 1] + known[b][len(known[b]) // 2 :] for a, b in zip(first, second, strict=True)
    )
    lexicon = [*known, *blends]
    share = np.cumsum(1 / (np.arange(words) + 2.7) ** 1.2)
    decorate = ("{}.", "{}, {}", "{} ({})", "A {}", "{} - {} 2024", "{}'s", "{} café {}", "{} 🐶", "“{}” {}")
    while True:
        drawn = np.searchsorted(share, generator.random(120_000) * share[-1]).tolist()
        ends = np.cumsum(generator.integers(5, 16, 10_000))
        kinds = generator.choice(
            len(decorate) + 1, 10_000, p=[0.25, 0.2, 0.05, 0.15, 0.05, 0.05, 0.01, 0.01, 0.01, 0.22]
        )
        start = 0
        for end, kind in zip(ends.tolist(), kinds.tolist(), strict=True):
            if end > len(drawn):
                break
            caption = [lexicon[number] for number in drawn[start:end]]
            start = end
            half = len(caption) // 2
            template = decorate[kind] if kind < len(decorate) else "{}"
            parts = [caption] if template.count("{}") == 1 else [caption[:half], caption[half:]]
            yield template.format(*map(" ".join, parts))


def _texts(files: list[Path], megabytes: float | None = None) -> Iterator[str]:
    """Captions of the files, or synthetic ones; where a size is given repeated or cut to it."""
    size = 0
    while True:
        for text in read_captions(files) if files else synthetic_captions():
            yield text
            size += len(text.encode()) + 1
            if megabytes is not None and size >= megabytes * 1e6:
                return
        if megabytes is None:
            return


def _seconds(times: Times) -> str:
    return f"{times.median:.1f} ({min(times.seconds):.1f}–{max(times.seconds):.1f})"


def _ours(tokenizer: BPETokenizer, captions: list[str]) -> Callable[[], object]:
    return lambda: tokenizer.encode_batch(captions)


def _open_clip(tokenizer: Any, captions: list[str]) -> Callable[[], object]:
    """Ids alone, without the padded tensor that its `__call__` makes of them besides: to its advantage."""
    sot, eot, longest = tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.context_length - 2
    return lambda: [[sot, *tokenizer.encode(text)[:longest], eot] for text in captions]


def _transformers(openai: BPETokenizer, captions: list[str]) -> Callable[[], object]:
    """CLIPTokenizerFast out of OpenAI's merges, without a model hub."""
    import transformers

    vocabulary = openai.vocabulary
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    tokenizer: Any = cast("Any", transformers).CLIPTokenizerFast(vocab=ids, merges=list(vocabulary.merges))
    return lambda: tokenizer(captions, truncation=True, max_length=vocabulary.context_length)["input_ids"]


def _bpe_trainer(corpus: list[str]) -> int:
    """The size of the vocabulary that `tokenizers` learns, with CLIP's normaliser and pieces."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    space = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer: Any = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer: Any = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=49_152,
        min_frequency=2,
        special_tokens=["<|PAD|>", "<|MASK|>", "<|SOT|>", "<|EOT|>"],
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return int(tokenizer.get_vocab_size())
