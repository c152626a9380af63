"""The objective, the update and the run of a recipe."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from clip_train.config.section import Fraction, Section


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


class MaskedLM(Section):
    """Text alone: tell hidden tokens from all others. A bidirectional tower with BERT's or a plain tied head."""

    kind: Literal["mlm"] = "mlm"
    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the tokens that are to be told: 80 % of them are masked, 10 % are others, 10 % stay."""
    whole_words: bool = False
    """Hide all tokens of a word together."""


class CausalLM(Section):
    """Text alone: tell each token from those before it. A causal tower."""

    kind: Literal["clm"] = "clm"


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


class Lock(Section):
    """Towers that keep the weights they start with, or all but their last blocks (LiT, Zhai et al. 2022). The
    projections and the temperature are always trained."""

    image: Literal["all"] | PositiveInt | None = None
    """`all`, or how many of the last blocks, with what lies behind them, are still trained."""
    text: Literal["all"] | PositiveInt | None = None
    """As `image`."""

    @model_validator(mode="after")
    def _acts(self) -> Lock:
        if self.image is None and self.text is None:
            raise ValueError("training.lock locks nothing: give image or text, 'all' or a number of blocks")
        return self


class Training(Section):
    """The loop."""

    steps: NonNegativeInt | None = None
    """Optimizer steps of the whole run; resuming does not change it. 0 saves the model as it begins."""
    epochs: PositiveInt | None = None
    """In place of `steps`: passes over all samples. The last batch is filled up from the pass that would follow."""
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the towers; weights, optimizer, features and loss stay fp32. fp16 scales the loss. A CPU
    without bf16 arithmetic computes in fp32 and says so."""
    micro_batch: PositiveInt | None = None
    """Samples a process holds activations for. A smaller one than its share turns on gradient caching for contrastive
    losses, which still see every negative of the global batch, and adds gradients up for the others."""
    gradient_clip: PositiveFloat | None = None
    """Largest norm of the gradient."""
    deterministic: bool = False
    """Refuse operations that are not reproducible (slower on GPU; CPU runs are reproducible anyway)."""
    compile: bool = False
    """torch.compile the blocks of both towers."""
    init: str | None = None
    """Run folder or checkpoint whose weights the first step starts from: fine-tuning, also of imported models. Position
    embeddings are interpolated where sizes differ."""
    init_text: str | None = None
    """Run folder or checkpoint, also of a language model, whose text tower this one starts from; after `init`."""
    init_image: str | None = None
    """Run folder or checkpoint whose image tower this one starts from; after `init`."""
    lock: Lock | None = None
    """What keeps the weights it starts with."""
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
    """Warn of a logged loss that lies so many sigmas above the median of the last 64; `inf` never warns."""
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
