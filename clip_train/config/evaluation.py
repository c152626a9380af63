"""What a recipe measures and where figures go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from clip_train.config.section import Section


class ZeroShot(Section):
    """Classification by the nearest class prompt."""

    kind: Literal["zeroshot"] = "zeroshot"
    shards: str | list[str]
    image: str = "jpg;jpeg;png;webp"
    label: str = "cls"
    """Member or `json.FIELD` with the class: its index in `classes`, or its name."""
    classes: str
    """Text file, one class name a line."""
    templates: str | list[str] = ["{}"]
    """Prompts with `{}` for the class name, or a text file of them."""


class Retrieval(Section):
    """Image to text and text to image, with every caption of a picture counted as right."""

    kind: Literal["retrieval"] = "retrieval"
    shards: str | list[str]
    image: str = "jpg;jpeg;png;webp"
    caption: str = "txt"


class Classified(Section):
    """Pictures with labels to learn from, and others to be tested on."""

    train_shards: str | list[str]
    """What is learned from; the tower stays as it is."""
    shards: str | list[str]
    """What is tested."""
    image: str = "jpg;jpeg;png;webp"
    label: str = "cls"
    """Member or `json.FIELD` with the class: its index in `classes`, or its name."""
    classes: str
    """Text file, one class name a line."""
    shots: PositiveInt | None = None
    """Training pictures of each class, drawn by their keys; all where it is not given."""


class LinearProbe(Classified):
    """Logistic regression on image embeddings, fitted by L-BFGS, its L2 weight swept (CLIP paper, section 3.2)."""

    kind: Literal["linear_probe"] = "linear_probe"


class Knn(Classified):
    """Votes of the nearest training pictures, weighted by exp(cosine / temperature)."""

    kind: Literal["knn"] = "knn"
    neighbours: PositiveInt = 20
    temperature: PositiveFloat = 0.07


Task = Annotated[ZeroShot | Retrieval | LinearProbe | Knn, Field(discriminator="kind")]


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
