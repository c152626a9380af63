"""The trained generator as it lies on disk: `generator.safetensors` and `generator.json`.

It holds all that experiment 3 needs, so that no picture is read again and every encoder is asked the same: the frozen
networks, the codes and captions of training, dev and test pictures, and the figures that bound the scores.

Shapes: `N` pictures of a part, `L` codes of a picture, `A` attributes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_train.errors import DataError
from clip_train.evaluation.text_to_image.classifier import Classifier
from clip_train.evaluation.text_to_image.codebook import Codebook
from clip_train.evaluation.text_to_image.model import PictureModel, WordPrefix

WEIGHTS, ABOUT = "generator.safetensors", "generator.json"
FORMAT = 1


@dataclass(frozen=True)
class Part:
    """Pictures with the captions they are asked for."""

    codes: Tensor
    """(N, L) int64."""
    captions: list[list[str]]
    texts: list[str]
    """The caption of each picture that an encoder is given: its name or its fullest caption, by a hash of its key."""
    sets: list[str]
    """Which data each picture came from."""
    keys: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, rows: list[int]) -> Part:
        """Some of them."""
        return Part(
            self.codes[rows],
            [self.captions[row] for row in rows],
            [self.texts[row] for row in rows],
            [self.sets[row] for row in rows],
            [self.keys[row] for row in rows],
        )


@dataclass(frozen=True)
class Networks:
    """The four networks."""

    codebook: Codebook
    model: PictureModel
    words: WordPrefix
    classifier: Classifier

    def modules(self) -> dict[str, nn.Module]:
        """By name."""
        return {"codebook": self.codebook, "model": self.model, "words": self.words, "classifier": self.classifier}


@dataclass(frozen=True)
class Generator(Networks):
    """Everything frozen: no parameter asks for a gradient, and all modules are in evaluation mode."""

    attributes: list[str]
    train: Part
    dev: Part
    test: Part
    unconditional: Tensor
    """(N of test,) bits a code of the test pictures without any caption."""
    about: dict[str, Any]
    """Settings, seed, versions, seconds, and `figures`: bounds of the scores."""
    fingerprint: str = ""
    """Of the weights' file."""

    def freeze_(self) -> Generator:
        """No gradients, evaluation mode."""
        for module in self.modules().values():
            module.eval().requires_grad_(False)
        return self


def save_generator(generator: Generator, out: Path) -> str:
    """Write both files, each whole or not at all, and return the fingerprint."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{key}": value.contiguous() for name, module in generator.modules().items()
               for key, value in module.state_dict().items()}  # fmt: skip
    parts = {"train": generator.train, "dev": generator.dev, "test": generator.test}
    tensors |= {f"codes.{name}": part.codes.to(torch.int16) for name, part in parts.items()}
    tensors["unconditional"] = generator.unconditional.float().contiguous()
    save_file(tensors, out / f"{WEIGHTS}.part", metadata={"format": "pt"})
    fingerprint = _fingerprint(out / f"{WEIGHTS}.part")
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        **generator.about,
        "attributes": generator.attributes,
        "vocabulary": list(generator.words.vocabulary),
        "parts": {name: {"captions": part.captions, "texts": part.texts, "sets": part.sets, "keys": part.keys}
                  for name, part in parts.items()},
    }  # fmt: skip
    (out / f"{ABOUT}.part").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (out / f"{WEIGHTS}.part").replace(out / WEIGHTS)
    (out / f"{ABOUT}.part").replace(out / ABOUT)
    return fingerprint


def load_generator(folder: str | os.PathLike[str]) -> Generator:
    """A generator that `clip-train generator train` wrote, frozen.

    Raises:
        DataError: it is not there, one file is missing or damaged, or the two do not belong together.
    """
    folder = Path(folder)
    how = f"train one with `clip-train generator train --out {folder}`"
    if not (folder / WEIGHTS).is_file() or not (folder / ABOUT).is_file():
        raise DataError(f"{folder}: no generator here ({WEIGHTS} and {ABOUT}); {how}")
    try:
        content: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: the generator cannot be read: {error}; {how}") from error
    fingerprint = _fingerprint(folder / WEIGHTS)
    if content.get("format") != FORMAT or content.get("fingerprint") != fingerprint:
        raise DataError(f"{folder}: {WEIGHTS} and {ABOUT} do not belong together or are of another version; {how}")
    attributes, vocabulary, parts = content.pop("attributes"), content.pop("vocabulary"), content.pop("parts")
    networks = build(content["settings"], vocabulary, attributes)
    try:
        for name, module in networks.modules().items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            module.load_state_dict(own)
    except RuntimeError as error:
        raise DataError(f"{folder}: weights of another size than {ABOUT} says: {error}; {how}") from error
    read = {name: Part(tensors[f"codes.{name}"].long(), **part) for name, part in parts.items()}
    return Generator(
        networks.codebook,
        networks.model,
        networks.words,
        networks.classifier,
        attributes,
        read["train"],
        read["dev"],
        read["test"],
        tensors["unconditional"],
        content,
        fingerprint,
    ).freeze_()


def build(settings: Mapping[str, Any], vocabulary: list[str], attributes: list[str]) -> Networks:
    """New networks of these sizes."""
    codebook = Codebook(settings["size"], settings["patch"], settings["codes"], settings["codebook_width"])
    prefix, width = settings["prefix"], settings["width"]
    return Networks(
        codebook,
        PictureModel(settings["codes"], codebook.length, width, settings["layers"], settings["heads"], prefix),
        WordPrefix(vocabulary, prefix * width),
        Classifier(len(attributes), settings["classifier_width"]),
    )


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
