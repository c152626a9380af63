"""A checkpoint as something to use: `clip_train.load(path)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from clip_train.config.load import parse_toml
from clip_train.config.schema import Recipe, Timm
from clip_train.data.transforms import Preprocess
from clip_train.errors import CheckpointError
from clip_train.from_recipe.data import build_preprocess
from clip_train.from_recipe.model import build_model
from clip_train.models.base import Model, Tower
from clip_train.models.language import LanguageModel
from clip_train.models.two_tower import TwoTower
from clip_train.training.checkpoint import Checkpoint, load_weights, read_checkpoint
from tokenizer import BPETokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with what its inputs need. Unpacks: `model, preprocess, tokenizer = clip_train.load(path)`."""

    model: TwoTower
    preprocess: Preprocess
    tokenizer: BPETokenizer
    recipe: Recipe
    step: int

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.preprocess, self.tokenizer))

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @torch.inference_mode()
    def encode_image(self, images: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
        """Pictures, or a preprocessed (B, 3, H, W) tensor -> unit vectors (B, D) fp32."""
        if isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, Tensor):
            images = torch.stack([self.preprocess(image) for image in images])
        return self.model.encode_image(images.to(self.device))

    @torch.inference_mode()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Captions -> unit vectors (B, D) fp32."""
        ids, lengths = self.tokenizer.encode_batch([texts] if isinstance(texts, str) else list(texts))
        padded = torch.from_numpy(self.tokenizer.padded(ids, lengths)).long()
        return self.model.encode_text(padded.to(self.device), torch.from_numpy(lengths).long().to(self.device))

    def similarity(self, images: Image.Image | Sequence[Image.Image] | Tensor, texts: str | Sequence[str]) -> Tensor:
        """Cosines (images, texts)."""
        return self.encode_image(images) @ self.encode_text(texts).T


Weights = Literal["raw", "ema"]
"""The trained ones, or their moving average (of runs with `[training.ema]`)."""


def load(path: str | Path, device: str | torch.device = "cpu", *, weights: Weights = "raw") -> LoadedModel:
    """Load a checkpoint, or the newest one of a run folder, for inference.

    Raises CheckpointError where there is none, it is damaged, or it lacks the average that `weights` asks for.
    """
    return load_checkpoint(read_checkpoint(Path(path)), device, weights=weights)


def load_any(checkpoint: Checkpoint, *, weights: Weights = "raw") -> LoadedModel | LoadedLanguageModel:
    """What a checkpoint that was read holds, on the CPU: both towers, or a language model."""
    recipe, tokenizer, model = _read(checkpoint, weights)
    if isinstance(model, LanguageModel):
        return LoadedLanguageModel(model.eval(), tokenizer, recipe, checkpoint.state.step)
    return LoadedModel(model.eval(), build_preprocess(recipe), tokenizer, recipe, checkpoint.state.step)


def load_checkpoint(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", *, weights: Weights = "raw"
) -> LoadedModel:
    """The model of a checkpoint that was read. Raises CheckpointError where it is of text alone."""
    recipe, tokenizer, model = _read(checkpoint, weights)
    if not isinstance(model, TwoTower):
        raise CheckpointError(
            f"{checkpoint.path}: is of a language model, which takes no pictures: clip_train.loading.load_text loads "
            "it, and training.init_text starts a CLIP from it"
        )
    model.to(device).eval()
    return LoadedModel(model, build_preprocess(recipe), tokenizer, recipe, checkpoint.state.step)


@dataclass(frozen=True)
class LoadedText:
    """A trained text tower, of a CLIP or of a language model, with its tokenizer."""

    tower: Tower
    tokenizer: BPETokenizer
    recipe: Recipe
    step: int


def load_text(path: str | Path, device: str | torch.device = "cpu", *, weights: Weights = "raw") -> LoadedText:
    """The text tower of a checkpoint of either kind, or of the newest one of a run folder, for inference.

    Raises CheckpointError as `load`.
    """
    checkpoint = read_checkpoint(Path(path))
    recipe, tokenizer, model = _read(checkpoint, weights)
    return LoadedText(model.towers["text"].to(device).eval(), tokenizer, recipe, checkpoint.state.step)


@dataclass(frozen=True)
class LoadedLanguageModel:
    """A text tower with the head that it was trained with."""

    model: LanguageModel
    tokenizer: BPETokenizer
    recipe: Recipe
    step: int


def _read(checkpoint: Checkpoint, weights: Weights) -> tuple[Recipe, BPETokenizer, TwoTower | LanguageModel]:
    recipe, tokenizer = read_recipe(checkpoint), load_tokenizer(checkpoint)
    model = _without_weights(recipe, tokenizer)
    load_weights(model, checkpoint, assign=True)
    if weights == "ema":
        if recipe.training.ema is None:
            raise CheckpointError(f"{checkpoint.path}: holds no averaged weights; runs with [training.ema] keep them")
        load_average(model, checkpoint)
    return recipe, tokenizer, model


def _without_weights(recipe: Recipe, tokenizer: BPETokenizer) -> TwoTower | LanguageModel:
    """On no device, where its tensors are all in a checkpoint; else fresh, for what checkpoints leave out (position ids
    of transformers' BERT, masks of timm's Swin) and what is found out by trying (the mask of transformers' towers)."""
    if recipe.text.kind != "transformers":
        with torch.device("meta"):
            model = build_model(recipe, tokenizer)
        if model.state_dict().keys() >= {name for name, _ in model.named_buffers()}:
            return model
    if isinstance(recipe.image, Timm):  # its weights come from the checkpoint
        recipe = recipe.model_copy(update={"image": recipe.image.model_copy(update={"pretrained": False})})
    with torch.random.fork_rng(devices=[]):
        return build_model(recipe, tokenizer)


def read_recipe(checkpoint: Checkpoint) -> Recipe:
    """The recipe that travels with a checkpoint."""
    return parse_toml(checkpoint.recipe_toml, where=str(checkpoint.path / "recipe.toml"))


def load_average(model: Model, checkpoint: Checkpoint) -> None:
    """Put the averaged weights in the place of the trained ones; buffers stay."""
    averaged = checkpoint.average()
    if averaged.keys() != {name for name, _ in model.named_parameters()}:
        raise CheckpointError(f"{checkpoint.path}: damaged: its average is not of this model; use an earlier one")
    model.load_state_dict(averaged, strict=False, assign=True)


def load_tokenizer(checkpoint: Checkpoint) -> BPETokenizer:
    """The vocabulary that travels with a checkpoint, proved to be the one it was trained with."""
    try:
        tokenizer = BPETokenizer.load(checkpoint.tokenizer_path)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.tokenizer_path}: {error}") from error
    if tokenizer.fingerprint != checkpoint.state.tokenizer_fingerprint:
        raise CheckpointError(f"{checkpoint.tokenizer_path}: not the vocabulary that this checkpoint was trained with")
    return tokenizer
