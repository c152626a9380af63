"""Training the generator, once: codebook, judge, transformer.

Everything is a function of the settings, the seed and the data: on one machine and number of threads the same command
gives the same bits, and the same fingerprint.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.text_to_image.classifier import attributes_of, rank_scores, recall_at, targets_of
from clip_train.evaluation.text_to_image.codebook import Codebook
from clip_train.evaluation.text_to_image.colours import CAPTIONS, colour_scores, dominant_colour, named_colour
from clip_train.evaluation.text_to_image.fitting import train_classifier, train_codebook, train_model
from clip_train.evaluation.text_to_image.generator import ABOUT, Generator, Part, build, save_generator
from clip_train.evaluation.text_to_image.model import words_of
from clip_train.evaluation.text_to_image.pictures import Pictures, read_pictures, share
from clip_train.evaluation.text_to_image.stages import Settings, Stages

TRAIN = ["embedded:pictograms/train-*.tar"]
TEST = {
    "clipart": "embedded:pictograms/openclipart_test-*.tar",
    "style": "embedded:pictograms/unseen_style-*.tar",
}
MOST_OF_A_SET = 300
"""Test pictures of a set and fold, at most: what an encoder's evaluation costs grows with them."""


def train_generator(
    out: Path,
    settings: Settings,
    *,
    train: str | list[str] = TRAIN,
    test: dict[str, str] = TEST,
    image: str = "jpg;jpeg;png;webp",
    caption: str = "json.captions",
    console: Console | None = None,
) -> Generator:
    """Train on the pictures of `train` and write both files into `out`.

    Args:
        test: further pictures by name, which are only measured; each set is counted for itself, apart by whether its
            names are held out of any training. Names of `train` that are held out are measured where `test` is empty.

    Raises:
        ConfigError: `out` holds a finished generator of other settings or data.
        DataError: shards, columns or captions that cannot be used; too few pictures.
    """
    data = {"train": train, "test": test, "image": image, "caption": caption}
    refuse_another(out, {"settings": asdict(settings), "data": data})
    started, cpu = time.perf_counter(), time.process_time()
    pictures = read_pictures(train, settings.size, image=image, caption=caption)
    folds = pictures.split()
    if min(len(folds[name]) for name in ("train", "dev")) < 8 or (not test and not folds["held"]):
        raise DataError(f"{train}: {len(pictures)} pictures are too few to hold some names out: give more")
    learned, dev = folds["train"], folds["dev"]
    sets = {name: read_pictures(shards, settings.size, image=image, caption=caption) for name, shards in test.items()}
    asked = test_pictures(sets) if sets else [("held", folds["held"])]
    stages = Stages(out / "stages", settings, learned, console)

    attributes = attributes_of(learned.captions, least=min(30, max(2, len(learned) // 20)))
    if not attributes:
        raise DataError(f"{train}: no word occurs in enough captions to judge generated pictures by")
    vocabulary = vocabulary_of(learned.captions)
    torch.manual_seed(settings.seed)
    made = build(asdict(settings), vocabulary, attributes)
    codebook, judge, model, words = made.codebook, made.classifier, made.model, made.words
    stages.run("codebook", [codebook], lambda: train_codebook(codebook, learned.images, settings, stages))
    targets = targets_of(learned.captions, attributes)
    stages.run("classifier", [judge], lambda: train_classifier(judge, learned.images, targets, settings, stages))
    stages.run("model", [model, words], lambda: train_model(model, words, codebook, learned, settings, stages))

    tests = part_of(codebook, asked)
    about = {
        "settings": asdict(settings),
        "data": data,
        "pictures": {"train": len(learned), "dev": len(dev), "test": dict(Counter(tests.sets))},
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()},
    }  # fmt: skip
    generator = Generator(
        codebook,
        model,
        words,
        judge,
        attributes,
        part_of(codebook, [("train", learned)]),
        part_of(codebook, [("dev", dev)]),
        tests,
        model.eval().bits_of(tests.codes),
        about,
    ).freeze_()
    about["figures"] = bounds(generator, torch.cat([one.images for _, one in asked]), learned)
    about["seconds"] = {"wall": round(time.perf_counter() - started, 1), "cpu": round(time.process_time() - cpu, 1)}
    fingerprint = save_generator(generator, out)
    stages.clear()
    return replace(generator, fingerprint=fingerprint)


def refuse_another(out: Path, wanted: dict[str, dict[str, Any]]) -> None:
    """Raises ConfigError where `out` holds a finished generator of other settings or data: encoders were probed with
    it, and their figures would compare with nothing any more.
    """
    if not (out / ABOUT).is_file():
        return
    try:
        content: dict[str, Any] = json.loads((out / ABOUT).read_text(encoding="utf-8"))
        known = {part: values | dict(content[part]) for part, values in wanted.items()}  # older files lack some
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out / ABOUT}: cannot be read: {error}; give another --out, or delete {out}") from None
    other = [
        f"{key} {known[part].get(key)!r}, not {value!r}"
        for part, values in wanted.items()
        for key, value in values.items()
        if known[part].get(key) != value
    ]
    if other:
        raise ConfigError(
            f"{out} holds a finished generator of other settings ({'; '.join(other)}): give another --out, or delete it"
        )


def test_pictures(sets: dict[str, Pictures]) -> list[tuple[str, Pictures]]:
    """Each set apart by whether the generator's training may have held the name; at most `MOST_OF_A_SET` of each, those
    whose key's hash is smallest.
    """
    found: list[tuple[str, Pictures]] = []
    for name, pictures in sets.items():
        for fold, part in pictures.split().items():
            if fold == "dev":  # pools and penalties are chosen on these names
                continue
            rows = sorted(range(len(part)), key=lambda row: share(part.keys[row]))[:MOST_OF_A_SET]
            if rows:
                found.append((name if fold == "train" else f"{name}_held", part.where(sorted(rows))))
    return found


def part_of(codebook: Codebook, sets: list[tuple[str, Pictures]]) -> Part:
    """Codes and captions of some pictures, one set after the other."""
    codebook.eval()
    return Part(
        torch.cat([codebook.encode(pictures.images) for _, pictures in sets]),
        [texts for _, pictures in sets for texts in pictures.captions],
        [asked_text(key, texts) for _, one in sets for key, texts in zip(one.keys, one.captions, strict=True)],
        [name for name, pictures in sets for _ in pictures.keys],
        [key for _, pictures in sets for key in pictures.keys],
    )


def asked_text(key: str, captions: list[str]) -> str:
    """The name or the fullest caption, half of the pictures each."""
    return captions[0] if share("text " + key) < 0.5 else captions[-1]


def vocabulary_of(captions: list[list[str]], least: int = 2) -> list[str]:
    """Words of at least `least` pictures' captions, the most frequent first."""
    counts = Counter(word for texts in captions for word in {word for text in texts for word in words_of(text)})
    return [word for word, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if n >= least]


def bounds(generator: Generator, images: Tensor, learned: Pictures) -> dict[str, Any]:
    """What the scores can be: of real test pictures, through the codebook, of samples without a caption, and of samples
    with the neutral conditioning that the generator was trained with (no bound, but a mark).

    Args:
        images: of the test pictures.
        learned: the training pictures; those whose name holds a colour bound `exp3/colour`.
    """
    test, settings = generator.test, generator.about["settings"]
    offset = generator.words(generator.words.bags(test.texts))
    targets = targets_of(test.captions, generator.attributes)
    rows = [row for row, wanted in enumerate(targets.tolist()) if any(wanted) and not all(wanted)]
    how = {"guidance": settings["guidance"], "temperature": settings["temperature"]}
    shown = {
        "real": images[rows],
        "codebook": generator.codebook.decode(test.codes[rows]),
        "unconditional": generator.codebook.decode(generator.model.sample(None, len(rows), **how)),
        "neutral": generator.codebook.decode(generator.model.sample(offset[rows], len(rows), **how)),
    }
    evidence = {name: generator.classifier.evidence(pictures) for name, pictures in shown.items()}
    return {
        "pictures_judged": len(rows),
        "concept": {name: float(rank_scores(one, targets[rows]).mean()) for name, one in evidence.items()},
        "recall": {name: float(recall_at(one, targets[rows]).mean()) for name, one in evidence.items()},
        "colour": colour_bounds(generator, learned),
        "bits": {"unconditional": float(generator.unconditional.mean()),
                 "neutral": float(generator.model.bits_of(test.codes, offset).mean()),
                 "uniform": math.log2(settings["codes"])},
        "codebook_error": float((shown["codebook"].float() - shown["real"].float()).square().mean().sqrt()),
    }  # fmt: skip


def colour_bounds(generator: Generator, learned: Pictures) -> dict[str, float]:
    """As `bounds`, of the dominant colour; real pictures are those whose name holds exactly one of the colours."""
    settings, words = generator.about["settings"], generator.words
    how = {"guidance": settings["guidance"], "temperature": settings["temperature"]}
    named = [named_colour(captions[0]) for captions in learned.captions]
    rows = [row for row, colour in enumerate(named) if colour is not None]
    found: dict[str, float] = {}
    if rows:
        wanted = torch.tensor([named[row] for row in rows])
        for name, shown in (
            ("real", learned.images[rows]),
            ("codebook", generator.codebook.decode(generator.train.codes[rows])),
        ):
            found[name] = float((dominant_colour(shown) == wanted).float().mean())
    for name, offset in (("unconditional", None), ("neutral", words(words.bags(CAPTIONS)))):
        shown = generator.codebook.decode(generator.model.sample(offset, len(CAPTIONS), **how))
        found[name] = float(colour_scores(shown, 1).mean())
    return found
