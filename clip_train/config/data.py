"""The data of a recipe: sources, order, views, vocabulary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from clip_train.config.section import Fraction, Section


class ColorJitter(Section):
    """Largest relative change of each property, drawn uniformly (as in torchvision)."""

    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0


class RandAugment(Section):
    """A few operations out of 14 (shear, shift, rotate, colours, …), all at one magnitude (as in torchvision)."""

    ops: Annotated[int, Field(ge=1, le=4)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class Augment(Section):
    """Random changes of a training picture, drawn by (seed, epoch, sample)."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.0)
    """Share of the area that the random resized crop keeps (OpenCLIP's default is (0.9, 1.0))."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333)
    """Aspect ratio of the crop."""
    flip: Fraction = 0.0
    """Probability of a horizontal flip."""
    rotate: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """Largest rotation in degrees; the corners are filled with `fill`."""
    zoom_out: Annotated[float, Field(ge=1.0)] = 1.0
    """Largest factor by which the cropped picture is shrunk onto a `fill` canvas."""
    fill: Annotated[int, Field(ge=0, le=255)] = 255
    """Grey level behind a rotated or shrunk picture."""
    color: ColorJitter = ColorJitter()
    color_probability: Fraction = 0.8
    """Probability that a picture's colours are changed at all."""
    grayscale: Fraction = 0.0
    """Probability of turning the picture grey."""
    rand_augment: RandAugment | None = None
    """RandAugment after the crop, before all else; what it moves in is `fill`. None does without."""


class Source(Section):
    """Shards of one kind, and where in a sample its picture and its captions are."""

    shards: str | list[str]
    """Path, brace pattern (`a-{000..099}.tar`), glob, or a list of them; also URLs (http, https, s3, gs, …),
    `pipe:COMMAND` whose output is the shard, and `embedded:` for shipped data. Relative paths are taken from the
    recipe's folder, then from the working directory."""
    image: str = "jpg;jpeg;png;webp"
    """Extensions of the member that holds the picture, the first present wins."""
    caption: str = "txt"
    """Extension of the member that holds the caption, or `json.FIELD` for a field (text or list) of a JSON member;
    `json.FIELD[:N]` takes the first N of a list."""
    caption_choice: Literal["first", "random", "all"] = "first"
    """Which of several captions: the first; one drawn by (seed, epoch, sample); or all in turn, another one each epoch,
    so that n epochs show each of n captions once."""
    weight: PositiveFloat | None = None
    """Share of each batch among several sources; the default is proportional to the number of samples."""
    augment: Augment | None = None
    """Random changes of this source's pictures, in place of `data.augment`."""


class Data(Section):
    """What is trained on, and in which order."""

    batch_size: PositiveInt
    """Pairs in a *global* batch, over all processes."""
    sources: dict[str, Source]
    workers: NonNegativeInt = 2
    """Loader processes for each training process; 0 loads in the training process."""
    sampling: Literal["epoch", "replacement"] = "epoch"
    """Every sample once an epoch, or each drawn from all samples of its source, as if none had been drawn before."""
    threads: PositiveInt = 1
    """Threads of each loader process, which decode at the same time."""
    lanes: PositiveInt = 16
    """Parallel sequences of shards that a batch is dealt from (fewer where there are fewer shards)."""
    shuffle_window: PositiveInt = 8192
    """Samples of a lane that are shuffled together."""
    augment: Augment = Augment()
    max_bad_fraction: Fraction = 0.01
    """Share of undecodable samples above which the run stops."""
    cache_decoded: bool = False
    """Keep decoded pictures in memory: for sets far smaller than memory."""
    cache_decoded_gib: PositiveFloat | None = None
    """Most GiB of decoded pictures that a training process and its workers keep together, by default 4; what comes
    later is decoded each time."""
    scaled_decode: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 of their size where the crop still has as many pixels as the view: faster for
    pictures at least twice the view's size, at a small loss. Training only."""
    cache_dir: str | None = None
    """Where shards from elsewhere (http, s3, …) are kept while they are used, shared by the processes of a node, and
    the listings of all shards; the default is `$XDG_CACHE_HOME/clip-train/shards`."""
    cache_gib: PositiveFloat | None = None
    """Most GiB of shards in `cache_dir`; what was read longest ago goes. The default is what the disk holds."""

    @model_validator(mode="after")
    def _has_sources(self) -> Data:
        if not self.sources:
            raise ValueError("name at least one source: [data.sources.NAME] with `shards`")
        for name, source in self.sources.items():
            if self.sampling == "replacement" and source.caption_choice == "all":
                raise ValueError(
                    f"data.sources.{name}.caption_choice = 'all' goes through captions epoch by epoch, which "
                    "data.sampling = 'replacement' does not have: take 'random'"
                )
        if self.cache_decoded_gib is not None and not self.cache_decoded:
            raise ValueError("cache_decoded_gib says how much cache_decoded = true may keep: set that, too")
        if self.scaled_decode and self.cache_decoded:
            raise ValueError("cache_decoded keeps whole pictures, scaled_decode decodes them for one crop: choose one")
        return self


class Preprocess(Section):
    """How a picture becomes the tower's input; it travels with every export."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    """Evaluation: resize the shortest side and crop the centre, pad the longest, or squash to a square."""


class Tokenizer(Section):
    """Which vocabulary."""

    path: str = "default"
    """`default` (the shipped 49,152), a vocabulary (.json, .json.gz), OpenAI's merges (.txt, .txt.gz), or a directory
    of transformers with a `tokenizer.json` of CLIP's kind. Of a run: `runs/X/checkpoints/latest/tokenizer.json`."""
    context_length: PositiveInt | None = None
    """Longest caption in tokens, SOT and EOT included; the default is the vocabulary's own (76 or 77)."""
