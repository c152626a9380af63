"""What a run is, whole: every key a recipe may have, its type, its default and what it does.

Models are frozen and forbid unknown keys. Where there is a choice of kinds, the field is a union tagged by
`kind`, so that each kind has only the keys that act on it. Nothing below `config` imports this file: modules
take plain keyword arguments, and `clip_train.build` turns one into the other.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every part of a recipe: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------- data


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
    """Extension of the member that holds the caption, or `json.FIELD` for a field (text or list) of a JSON member."""
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
    """`default` (the shipped 49,152), a vocabulary JSON, or OpenAI's merges (.txt or .gz)."""
    context_length: PositiveInt | None = None
    """Longest caption in tokens, SOT and EOT included; the default is the vocabulary's own (76 or 77)."""


# -------------------------------------------------------------------------------------------- towers


class VisionTransformer(Section):
    """CLIP's ViT (paper, section 2.4)."""

    kind: Literal["vit"] = "vit"
    image_size: PositiveInt
    patch_size: PositiveInt
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveFloat = 4.0
    pool: Literal["cls", "mean", "map"] = "cls"
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    patch_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of a picture's patches that training leaves out, drawn anew in every step (FLIP)."""


class ResNet(Section):
    """CLIP's ModifiedResNet: three-convolution stem, anti-aliased strides, attention pooling."""

    kind: Literal["resnet"] = "resnet"
    image_size: PositiveInt
    layers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    width: PositiveInt = 64
    heads: PositiveInt


class Timm(Section):
    """Any timm backbone, its head replaced by CLIP's projection."""

    kind: Literal["timm"] = "timm"
    name: str
    image_size: PositiveInt
    pretrained: bool = False
    arguments: dict[str, Any] = {}
    """Passed to `timm.create_model`."""


class TextTransformer(Section):
    """The text tower: CLIP's causal transformer, or its bidirectional twin."""

    kind: Literal["transformer"] = "transformer"
    width: PositiveInt = 512
    layers: PositiveInt = 12
    heads: PositiveInt = 8
    mlp_ratio: PositiveFloat = 4.0
    attention: Literal["causal", "bidirectional"] = "causal"
    pool: Literal["eot", "cls", "mean", "map"] = "eot"
    activation: Literal["gelu", "quick_gelu"] = "gelu"


class Joint(Section):
    """The space both towers project into."""

    embed_dim: PositiveInt = 512
    init_temperature: PositiveFloat = 0.07
    """Initial temperature; the learned logit scale starts at its inverse."""
    max_logit_scale: PositiveFloat = 100.0
    """The logit scale is clamped to this after every update."""


# --------------------------------------------------------------------------------- objective, update


class InfoNCE(Section):
    """The symmetric cross-entropy of CLIP's Figure 3."""

    kind: Literal["infonce"] = "infonce"
    equal_captions_positive: bool = False
    """Pairs of a batch whose captions are equal are positives of each other. For clip art; not for web data."""
    impl: Literal["auto", "dense", "tiled"] = "auto"
    """How it is computed. `dense` holds all logits of a process, `tiled` only a few rows of them at a time; the result
    is the same. `auto` tiles where the logits are many."""


class Sigmoid(Section):
    """SigLIP's loss: every pair of a picture and a caption is a question of its own, yes or no."""

    kind: Literal["sigmoid"] = "sigmoid"
    equal_captions_positive: bool = False
    """As for `infonce`."""
    impl: Literal["auto", "dense", "tiled"] = "auto"
    """As for `infonce`."""
    init_logit_bias: float = -10.0
    """Where the learned bias of the logits starts: most pairs do not belong together. SigLIP starts at -10, with
    `model.init_temperature = 0.1`."""


class LayerDecay(Section):
    """Learning rate of a layer relative to the next one, for each tower; 1 leaves a tower alone."""

    image: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    text: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    @model_validator(mode="after")
    def _acts(self) -> LayerDecay:
        if self.image == self.text == 1.0:
            raise ValueError("layer_decay = 1 decays nothing: give a smaller number, or leave it away")
        return self


class AdamW(Section):
    """Decoupled weight decay on matrices and embeddings; none on gains, biases and the logit scale."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.2
    layer_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | LayerDecay | None = None
    """Learning rate of a layer relative to the next one, of both towers or of each: for fine-tuning (0.65 to 0.9)."""


class Lamb(Section):
    """LAMB: Adam's step, as long as `lr` times the tensor. For very large batches; tensors without decay as in Adam."""

    kind: Literal["lamb"] = "lamb"
    lr: PositiveFloat
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.2
    layer_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | LayerDecay | None = None
    """Learning rate of a layer relative to the next one, of both towers or of each: for fine-tuning (0.65 to 0.9)."""


class Lion(Section):
    """Lion: the sign of a momentum; one moment instead of two. Learning rates 3-10 times below AdamW's."""

    kind: Literal["lion"] = "lion"
    lr: PositiveFloat
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    weight_decay: Annotated[float, Field(ge=0.0)] = 1.0
    layer_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | LayerDecay | None = None
    """Learning rate of a layer relative to the next one, of both towers or of each: for fine-tuning (0.65 to 0.9)."""


class Muon(Section):
    """Muon for hidden matrices and convolutions, AdamW for the rest, sharing learning rate and weight decay."""

    kind: Literal["muon"] = "muon"
    lr: PositiveFloat
    momentum: Fraction = 0.95
    """Of Muon."""
    beta1: Fraction = 0.9
    """Of AdamW, as the next two."""
    beta2: Fraction = 0.98
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.2
    layer_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | LayerDecay | None = None
    """Learning rate of a layer relative to the next one, of both towers or of each: for fine-tuning (0.65 to 0.9)."""


class Cosine(Section):
    """Linear warm-up, then a cosine to `final_lr`."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 2000
    final_lr: Annotated[float, Field(ge=0.0)] = 0.0


class Constant(Section):
    """Linear warm-up, then constant."""

    kind: Literal["constant"] = "constant"
    warmup_steps: NonNegativeInt = 2000


class ConstantCooldown(Section):
    """Linear warm-up, constant, and over the last steps a decay to `final_lr`."""

    kind: Literal["constant_cooldown"] = "constant_cooldown"
    warmup_steps: NonNegativeInt = 2000
    cooldown_steps: PositiveInt
    cooldown_power: PositiveFloat = 1.0
    final_lr: Annotated[float, Field(ge=0.0)] = 0.0


class DDP(Section):
    """Every process holds the whole model; gradients are averaged (torch's DistributedDataParallel)."""

    kind: Literal["ddp"] = "ddp"
    static_graph: bool = False
    """Promise torch that every step uses the same parameters in the same order: fewer look-ups in the backward pass."""
    bf16_gradients: bool = False
    """Send gradients in bf16: half the traffic, 3 significant digits."""


class FSDP(Section):
    """Every process holds a part of each weight, gradient and moment (torch's `fully_shard`)."""

    kind: Literal["fsdp"] = "fsdp"
    shard: Literal["full", "hybrid"] = "full"
    """Over all processes, or within each node with a replica on every node."""
    reshard_after_forward: bool = True
    """Drop a block's gathered weights after its forward pass and gather them again for the backward pass: less
    memory, half as much traffic again."""
    cpu_offload: bool = False
    """Keep the parts in host memory and update them there (GPUs only)."""


class EMA(Section):
    """An exponential moving average of the weights, beside them (`evaluation.weights`, `clip_train.load`, export)."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9999
    """Share of the average that an update keeps; less in the first updates: at most (1 + t) / (10 + t) after t."""


class Stage(Section):
    """The first part of a run at smaller sizes, as CLIPA and RECLIP do; each defaults to the full one."""

    until_step: PositiveInt
    """The stage's first step that is no longer in it; the next stage, or full size, begins there."""
    image_size: PositiveInt | None = None
    context_length: Annotated[int, Field(ge=3)] | None = None
    """Longest caption in tokens: SOT, its first tokens, EOT."""


class Training(Section):
    """The loop."""

    steps: PositiveInt | None = None
    """Optimizer steps of the whole run; resuming does not change it."""
    epochs: PositiveInt | None = None
    """In place of `steps`: passes over all samples. The last batch is filled up from the pass that would follow."""
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the towers; weights, optimizer, features and loss stay fp32. fp16 scales the loss."""
    micro_batch: PositiveInt | None = None
    """Pairs a process holds activations for. A smaller one than its share turns on gradient caching: the
    loss still sees every negative of the global batch."""
    gradient_clip: PositiveFloat | None = None
    """Largest norm of the gradient."""
    deterministic: bool = False
    """Refuse operations that are not reproducible (slower on GPU; CPU runs are reproducible anyway)."""
    compile: bool = False
    """torch.compile the blocks of both towers."""
    init: str | None = None
    """Run folder or checkpoint whose weights the first step starts from: fine-tuning, also of imported models. Position
    embeddings are interpolated where sizes differ."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and compute it again in the backward pass: a third more work, far less
    memory."""
    sync_batch_norm: bool = False
    """BatchNorm of a ResNet over the rows of all processes instead of each its own (GPUs only)."""
    ema: EMA | None = None
    """Keep an average of the weights: `[training.ema]`, or `--set training.ema.decay=0.9999`."""
    parallel: Annotated[DDP | FSDP, Field(discriminator="kind")] = DDP()
    """How the model is spread over several processes."""
    stages: list[Stage] = []
    """Smaller pictures and shorter captions first, in order of `until_step`; what remains is at full size."""

    @model_validator(mode="after")
    def _has_a_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give training.steps or training.epochs, one of them (`--set KEY=none` takes one away)")
        return self

    @model_validator(mode="after")
    def _fits_parallel(self) -> Training:
        if self.parallel.kind == "ddp" and self.parallel.static_graph and self.micro_batch is not None:
            raise ValueError("micro_batch runs several backward passes a step, which parallel.static_graph rules out")
        if self.stages and self.steps is None:
            raise ValueError("stages end at steps: give training.steps, not training.epochs")
        ends = [0, *(stage.until_step for stage in self.stages)]
        if any(end <= begin for begin, end in pairwise([*ends, self.steps or 1])):
            raise ValueError(f"stages end at {ends[1:]}: each must be longer than 0 steps, and end before {self.steps}")
        if self.precision == "fp16" and self.parallel.kind == "fsdp":
            raise ValueError("precision = 'fp16' scales the loss, which is not supported with parallel.kind = 'fsdp'")
        return self


class Faults(Section):
    """What is done about steps that go wrong and processes that stop."""

    max_skipped_steps: NonNegativeInt = 10
    """Updates that may be left out, within `window_steps`, because the gradient was not finite. One more stops the
    run and saves what is needed to look at it."""
    window_steps: PositiveInt = 1000
    spike_sigmas: PositiveFloat | None = 8.0
    """Warn of a logged loss that lies so many sigmas above the median of the last 64."""
    stall_minutes: PositiveFloat = 15.0
    """Without progress for so long, processes end themselves and name the one they waited for."""


class CheckpointPolicy(Section):
    """When the state is saved. The last step always is."""

    every_steps: NonNegativeInt = 1000
    """0 turns saving by steps off."""
    every_minutes: Annotated[float, Field(ge=0.0)] = 15.0
    """0 turns saving by minutes off."""
    keep_last: PositiveInt = 3
    """Older checkpoints are removed."""
    asynchronous: bool = True
    """Write while training goes on. Takes host memory for one more copy of what a process writes."""


# ---------------------------------------------------------------------------------------- evaluation


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


class Recipe(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """The run's folder is `runs/NAME`."""
    description: str = ""
    data: Data
    preprocess: Preprocess = Preprocess()
    tokenizer: Tokenizer = Tokenizer()
    image: Annotated[VisionTransformer | ResNet | Timm, Field(discriminator="kind")]
    text: TextTransformer = TextTransformer()
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
