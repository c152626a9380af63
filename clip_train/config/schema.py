"""What a run is, whole: every key a recipe may have, its type, its default and what it does.

Models are frozen and forbid unknown keys. Where there is a choice of kinds, the field is a union tagged by
`kind`, so that each kind has only the keys that act on it. Nothing below `config` imports this file: modules
take plain keyword arguments, and `clip_train.build` turns one into the other. The parts are in `data.py`, `towers.py`,
`training.py` and `evaluation.py`; all are imported from here.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, model_validator

from clip_train.config.data import Augment, ColorJitter, Data, Preprocess, RandAugment, Source, Tokenizer
from clip_train.config.evaluation import Classified, Evaluation, Knn, LinearProbe, Logging, Retrieval, Task, ZeroShot
from clip_train.config.section import Section
from clip_train.config.towers import (
    BertText,
    Joint,
    ModernText,
    ResNet,
    T5Text,
    TextTransformer,
    Timm,
    VisionTransformer,
)
from clip_train.config.training import (
    DDP,
    EMA,
    FSDP,
    AdamW,
    CheckpointPolicy,
    Constant,
    ConstantCooldown,
    Cosine,
    Faults,
    InfoNCE,
    Lamb,
    LayerDecay,
    Lion,
    Muon,
    Sigmoid,
    Stage,
    Training,
)

__all__ = [
    "DDP",
    "EMA",
    "FSDP",
    "AdamW",
    "Augment",
    "BertText",
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
    "LayerDecay",
    "LinearProbe",
    "Lion",
    "Logging",
    "ModernText",
    "Muon",
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
    "VisionTransformer",
    "ZeroShot",
]


def _clips_kind(text: Any) -> Any:
    """A `[text]` table that names no kind is of CLIP's."""
    return {"kind": "transformer", **cast("dict[str, Any]", text)} if isinstance(text, dict) else text


Text = Annotated[
    Annotated[TextTransformer | BertText | T5Text | ModernText, Field(discriminator="kind")],
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
    image: Annotated[VisionTransformer | ResNet | Timm, Field(discriminator="kind")]
    text: Text = TextTransformer()
    model: Joint = Joint()
    loss: Annotated[InfoNCE | Sigmoid, Field(discriminator="kind")] = InfoNCE()
    optimizer: Annotated[AdamW | Lamb | Lion | Muon, Field(discriminator="kind")]
    schedule: Annotated[Cosine | Constant | ConstantCooldown, Field(discriminator="kind")] = Cosine()
    training: Training
    faults: Faults = Faults()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.evaluation.weights == "ema" and self.training.ema is None:
            raise ValueError("evaluation.weights = 'ema' needs an average to measure: add [training.ema]")
        if self.training.sync_batch_norm and self.image.kind != "resnet":
            raise ValueError("training.sync_batch_norm is for image.kind = 'resnet': there is no BatchNorm elsewhere")
        for stage in self.training.stages:
            _check_stage(stage, self.image)
        if self.training.parallel.kind == "fsdp" and self.optimizer.kind in ("muon", "lamb"):
            kind = self.optimizer.kind
            raise ValueError(f"optimizer.kind = '{kind}' needs whole matrices: take training.parallel.kind = 'ddp'")
        return self


def _check_stage(stage: Stage, image: VisionTransformer | ResNet | Timm) -> None:
    size = stage.image_size
    if size is None:
        if stage.context_length is None:
            raise ValueError(
                f"the stage until step {stage.until_step} changes nothing: give image_size, context_length"
            )
        return
    if not isinstance(image, VisionTransformer):
        raise ValueError(f"training.stages: image.kind = {image.kind!r} takes one size; only 'vit' can start smaller")
    if size > image.image_size or size % image.patch_size:
        raise ValueError(
            f"training.stages: image_size = {size} is not a multiple of image.patch_size = {image.patch_size} up to "
            f"image.image_size = {image.image_size}"
        )
