"""What a run is, whole: every key a recipe may have, its type, its default and what it does.

Models are frozen and forbid unknown keys. Where there is a choice of kinds, the field is a union tagged by
`kind`, so that each kind has only the keys that act on it. Nothing below `config` imports this file: modules
take plain keyword arguments, and `clip_train.from_recipe` turns one into the other. The parts are in `data.py`,
`towers.py`, `training.py` and `evaluation.py`; all are imported from here.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, model_validator

from clip_train.config.data import Augment, ColorJitter, Data, Preprocess, RandAugment, Source, Tokenizer
from clip_train.config.evaluation import (
    Classified,
    Evaluation,
    Knn,
    Language,
    LinearProbe,
    Logging,
    PictureTask,
    Retrieval,
    Task,
    ZeroShot,
)
from clip_train.config.section import Section
from clip_train.config.towers import (
    BertText,
    Joint,
    ModernText,
    ResNet,
    T5Text,
    TextTransformer,
    Timm,
    TransformersText,
    VisionTransformer,
)
from clip_train.config.training import (
    DDP,
    EMA,
    FSDP,
    AdamW,
    CausalLM,
    CheckpointPolicy,
    Constant,
    ConstantCooldown,
    Cosine,
    Faults,
    InfoNCE,
    Lamb,
    LayerDecay,
    Lion,
    Lock,
    MaskedLM,
    Muon,
    Sigmoid,
    Stage,
    Training,
)
from clip_train.errors import ConfigError

__all__ = [
    "DDP",
    "EMA",
    "FSDP",
    "AdamW",
    "Augment",
    "BertText",
    "CausalLM",
    "CheckpointPolicy",
    "Classified",
    "ColorJitter",
    "Constant",
    "ConstantCooldown",
    "Cosine",
    "Data",
    "Evaluation",
    "Faults",
    "InfoNCE",
    "Joint",
    "Knn",
    "Lamb",
    "Language",
    "LayerDecay",
    "LinearProbe",
    "Lion",
    "Lock",
    "Logging",
    "MaskedLM",
    "ModernText",
    "Muon",
    "PictureTask",
    "Preprocess",
    "RandAugment",
    "Recipe",
    "ResNet",
    "Retrieval",
    "Section",
    "Sigmoid",
    "Source",
    "Stage",
    "T5Text",
    "Task",
    "TextTransformer",
    "Timm",
    "Tokenizer",
    "Training",
    "TransformersText",
    "VisionTransformer",
    "ZeroShot",
]


def _clips_kind(text: Any) -> Any:
    """A `[text]` table that names no kind is of CLIP's."""
    return {"kind": "transformer", **cast("dict[str, Any]", text)} if isinstance(text, dict) else text


Text = Annotated[
    Annotated[TextTransformer | BertText | T5Text | ModernText | TransformersText, Field(discriminator="kind")],
    BeforeValidator(_clips_kind),
]


class Recipe(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """The run's folder is `runs/NAME`."""
    description: str = ""
    data: Data
    preprocess: Preprocess = Preprocess()
    tokenizer: Tokenizer = Tokenizer()
    image: Annotated[VisionTransformer | ResNet | Timm, Field(discriminator="kind")] | None = None
    """The image tower; none where the loss is of text alone."""
    text: Text = TextTransformer()
    model: Joint | None = None
    """What the towers share; nothing where the loss is of text alone."""
    loss: Annotated[InfoNCE | Sigmoid | MaskedLM | CausalLM, Field(discriminator="kind")] = InfoNCE()
    optimizer: Annotated[AdamW | Lamb | Lion | Muon, Field(discriminator="kind")]
    schedule: Annotated[Cosine | Constant | ConstantCooldown, Field(discriminator="kind")] = Cosine()
    training: Training
    faults: Faults = Faults()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()

    @property
    def is_language(self) -> bool:
        """Whether it trains a text tower alone, to tell tokens."""
        return isinstance(self.loss, MaskedLM | CausalLM)

    @property
    def vision(self) -> VisionTransformer | ResNet | Timm:
        """The image tower of a recipe that has one. Raises ConfigError where there is none."""
        if self.image is None:
            raise ConfigError(f"recipe {self.name!r} trains a text tower alone: there is no image tower")
        return self.image

    @property
    def joint(self) -> Joint:
        """The joint space of a recipe that has one. Raises ConfigError where there is none."""
        if self.model is None:
            raise ConfigError(f"recipe {self.name!r} trains a text tower alone: there is no joint space")
        return self.model

    @model_validator(mode="before")
    @classmethod
    def _with_joint_space(cls, tree: Any) -> Any:
        """Contrastive recipes have one though none of its keys is given."""
        if not isinstance(tree, dict):
            return tree
        tree = cast(dict[str, Any], tree)
        loss = tree.get("loss", {})
        kind = cast(dict[str, Any], loss).get("kind") if isinstance(loss, dict) else getattr(loss, "kind", None)
        return tree if kind in ("mlm", "clm") else {"model": {}} | tree

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.is_language:
            check_language(self)
        elif self.image is None:
            raise ValueError(f"loss.kind = {self.loss.kind!r} needs pictures: give [image], a tower for them")
        elif named := [name for name, task in self.evaluation.tasks.items() if isinstance(task, Language)]:
            raise ValueError(f"evaluation.tasks.{named[0]} (language) is for loss.kind = 'mlm' or 'clm'")
        if self.evaluation.weights == "ema" and self.training.ema is None:
            raise ValueError("evaluation.weights = 'ema' needs an average to measure: add [training.ema]")
        if self.training.sync_batch_norm and (self.image is None or self.image.kind != "resnet"):
            raise ValueError("training.sync_batch_norm is for image.kind = 'resnet': there is no BatchNorm elsewhere")
        for stage in self.training.stages:
            _check_stage(stage, self.image)
        if self.training.parallel.kind == "fsdp" and self.optimizer.kind in ("muon", "lamb"):
            kind = self.optimizer.kind
            raise ValueError(f"optimizer.kind = '{kind}' needs whole matrices: take training.parallel.kind = 'ddp'")
        return self


def _check_stage(stage: Stage, image: VisionTransformer | ResNet | Timm | None) -> None:
    size = stage.image_size
    if size is None:
        if stage.context_length is None:
            raise ValueError(
                f"the stage until step {stage.until_step} changes nothing: give image_size, context_length"
            )
        return
    if image is None:
        raise ValueError("training.stages: image_size is of pictures, and this recipe has no image tower")
    if not isinstance(image, VisionTransformer):
        raise ValueError(f"training.stages: image.kind = {image.kind!r} takes one size; only 'vit' can start smaller")
    if size > image.image_size or size % image.patch_size:
        raise ValueError(
            f"training.stages: image_size = {size} is not a multiple of image.patch_size = {image.patch_size} up to "
            f"image.image_size = {image.image_size}"
        )


def check_language(recipe: Recipe) -> None:
    """Raises ValueError for what a language loss contradicts."""
    kind, text = recipe.loss.kind, recipe.text
    for key, value in (("image", recipe.image), ("model", recipe.model)):
        if value is not None:
            raise ValueError(f"{key}: loss.kind = {kind!r} trains text alone: take it away with --set {key}=none")
    # The mask of an architecture of transformers is known when it is built (`from_recipe.model.build_language_model`).
    attention = None if isinstance(text, TransformersText) else getattr(text, "attention", "bidirectional")
    if kind == "mlm" and attention == "causal":
        raise ValueError(
            "loss.kind = 'mlm' tells a token from both sides: text.attention = 'bidirectional', or loss.kind = 'clm'"
        )
    if kind == "clm" and attention == "bidirectional":
        raise ValueError(
            "loss.kind = 'clm' tells each token from those before it, which a bidirectional tower would just look up: "
            "take a causal one (text.attention = 'causal'), or loss.kind = 'mlm'"
        )
    if text.pool == "map":
        raise ValueError(
            f"text.pool = 'map' has weights that loss.kind = {kind!r} never trains: take 'mean' here and 'map' where "
            "the tower goes into a CLIP (training.init_text)"
        )
    if getattr(text, "padding", "masked") == "attended":
        raise ValueError(
            f"text.padding = 'attended' is for contrastive losses: take 'masked' with loss.kind = {kind!r}"
        )
    training, decay = recipe.training, recipe.optimizer.layer_decay
    if training.init_image is not None or training.lock is not None:
        raise ValueError(f"training.init_image and training.lock are for two towers: loss.kind = {kind!r} trains one")
    if isinstance(decay, LayerDecay) and decay.image != 1.0:
        raise ValueError(f"optimizer.layer_decay.image: loss.kind = {kind!r} trains no image tower")
    for name, task in recipe.evaluation.tasks.items():
        if isinstance(task, Language):
            continue
        raise ValueError(
            f"evaluation.tasks.{name} ({task.kind}) needs pictures, which loss.kind = {kind!r} has not: take it away "
            f"with --set evaluation.tasks=none"
        )
