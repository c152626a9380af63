"""What a recipe measures and where figures go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from clip_train.config.section import Section
from clip_train.dataset_spec import parse_spec

PICTURE, LABEL, CAPTION = "jpg;jpeg;png;webp", "cls", "txt"

CorruptionName = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise",
    "gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur",
    "fog", "brightness", "contrast",
    "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip


class Measured(Section):
    """The pictures that are measured on: shards, or other data."""

    shards: str | list[str] | None = None
    data: str | None = None
    """Data that are no shards: `folder:PATH`, `captions:FILE?images=PATH`, `torchvision:NAME?root=PATH&split=test`,
    `datasets:NAME_OR_PATH?split=test`."""
    image: str = PICTURE
    """The member of a shard's sample with its picture."""

    @field_validator("data", "train_data", check_fields=False)
    @classmethod
    def _is_a_spec(cls, value: str | None) -> str | None:
        return value if value is None else str(parse_spec(value))

    @model_validator(mode="after")
    def _one_of_two(self) -> Measured:
        if (self.shards is None) == (self.data is None):
            raise ValueError("give one of `shards` (tar files) and `data` (folder:…, captions:…, torchvision:…, …)")
        return self

    def _refuse_columns(self, **defaults: str) -> None:
        for key, default in {"image": PICTURE, **defaults}.items():
            if getattr(self, key) != default:
                raise ValueError(f"`{key}` names a member of shards; in `data` it is an option")


class ZeroShot(Measured):
    """Classification by the nearest class prompt."""

    kind: Literal["zeroshot"] = "zeroshot"
    label: str = LABEL
    """Member of a shard's sample or `json.FIELD` with the class: its index in `classes`, or its name."""
    classes: str | None = None
    """Text file, one class name a line. Other data than shards have names of their own: a line then is another name of
    the class that has its number, unless all names are lines."""
    templates: str | list[str] = ["{}"]
    """Prompts with `{}` for the class name, or a text file of them."""
    corruptions: Literal["all"] | list[CorruptionName] = []
    """Measure again on pictures spoiled in these ways."""
    severities: list[Annotated[int, Field(ge=1, le=5)]] = Field([1, 2, 3, 4, 5], min_length=1)
    """How badly."""
    corruption_seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _fits(self) -> ZeroShot:
        if self.shards is None:
            self._refuse_columns(label=LABEL)
        elif self.classes is None:
            raise ValueError("`classes` is missing: shards hold no names of classes; give a text file of them")
        if not self.corruptions and (self.severities != [1, 2, 3, 4, 5] or self.corruption_seed):
            raise ValueError("`severities` and `corruption_seed` need `corruptions`")
        return self


class Retrieval(Measured):
    """Image to text and text to image, with every caption of a picture counted as right."""

    kind: Literal["retrieval"] = "retrieval"
    caption: str = CAPTION
    most_captions: PositiveInt | None = None
    """Only the first of each picture: COCO's and Flickr30k's figures are of five."""
    equal_captions: Literal["one", "each"] = "one"
    """Captions that are equal after cleaning are `one`, right for all their pictures; `each` counts them apart, as
    published figures do."""
    folds: PositiveInt = 1
    """Search within this many parts of equal size and average: 5 of COCO's 5,000 pictures are its "1k" figures."""

    @model_validator(mode="after")
    def _fits(self) -> Retrieval:
        if self.shards is None:
            self._refuse_columns(caption=CAPTION)
        return self


class Classified(Measured):
    """Pictures with labels to learn from, and others to be tested on (`shards` or `data`)."""

    train_shards: str | list[str] | None = None
    """What is learned from; the tower stays as it is."""
    train_data: str | None = None
    """The same, where it is no shards."""
    label: str = LABEL
    """Member of a shard's sample or `json.FIELD` with the class: its index in `classes`, or its name."""
    classes: str | None = None
    """Text file, one class name a line; see `ZeroShot.classes`."""
    shots: PositiveInt | list[PositiveInt] | None = None
    """Training pictures of each class, drawn by their keys; several numbers give a curve; all where it is not given."""
    draws: PositiveInt = 1
    """How many times shots are drawn: their mean and standard deviation are reported."""

    @model_validator(mode="after")
    def _fits(self) -> Classified:
        if (self.train_shards is None) == (self.train_data is None):
            raise ValueError("give one of `train_shards` and `train_data`: what is learned from")
        if self.shards is None and self.train_shards is None:
            self._refuse_columns(label=LABEL)
        elif self.classes is None:
            raise ValueError("`classes` is missing: shards hold no names of classes; give a text file of them")
        if isinstance(self.shots, list) and sorted(set(self.shots)) != self.shots:
            raise ValueError(f"shots = {self.shots}: give different numbers, the smallest first")
        if self.draws > 1 and self.shots is None:
            raise ValueError("`draws` needs `shots`: without it all training pictures are taken, always the same")
        return self


class LinearProbe(Classified):
    """Logistic regression on image embeddings, fitted by L-BFGS, its L2 weight swept (CLIP paper, section 3.2)."""

    kind: Literal["linear_probe"] = "linear_probe"


class Knn(Classified):
    """Votes of the nearest training pictures, weighted by exp(cosine / temperature)."""

    kind: Literal["knn"] = "knn"
    neighbours: PositiveInt = 20
    temperature: PositiveFloat = 0.07


class Language(Section):
    """Loss of held-out texts by a language model, by the run's own objective; which tokens are hidden is fixed."""

    kind: Literal["language"] = "language"
    shards: str | list[str]
    caption: str = "txt"


PictureTask = ZeroShot | Retrieval | LinearProbe | Knn
Task = Annotated[PictureTask | Language, Field(discriminator="kind")]


class Evaluation(Section):
    """What is measured, and when. The last step always is."""

    tasks: dict[str, Task] = {}
    every_steps: NonNegativeInt = 0
    """0 evaluates only at the end."""
    weights: Literal["raw", "ema"] = "raw"
    """Which weights are measured: the trained ones or their average (`training.ema`)."""
    batch_size: PositiveInt = 256


class Logging(Section):
    """Where figures go. `metrics.jsonl` is always written."""

    every_steps: PositiveInt = 10
    wandb_project: str | None = None
    """Log to wandb under this project (offline when no key is set)."""
    tensorboard: bool = False
