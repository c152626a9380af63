"""FLOPs of a forward pass, 2 for each multiply-add, from sizes alone.

Counted: matrix products and convolutions, attention in full (a causal mask halves none of it), as
`torch.utils.flop_counter` and the published tables do. Norms, activations and softmax are left out.
Nothing is allocated: a model built under `torch.device("meta")` will do.

A tower's FLOPs are those of all its tokens, the figure that the field quotes; with `pooled_only` those of its pooled
vector alone, which is what a step computes (`Tower.forward`) and what its share of a device's peak is made of; so is
`training`, without the patches that training leaves out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_train.models.adapters import TimmTower, TransformersText
from clip_train.models.attention import SelfAttention
from clip_train.models.base import Tower
from clip_train.models.pooling import TOKEN_POOLS, AttentionPool
from clip_train.models.resnet import Bottleneck, ModifiedResNet
from clip_train.models.text_tower import TextTower
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one sample, its projection included."""

    image: float
    text: float

    @property
    def total(self) -> float:
        """Image and text together; a training step is three times this."""
        return self.image + self.text


def forward_flops(
    model: TwoTower,
    caption_length: float,
    pooled_only: bool = False,
    *,
    training: bool = False,
    image_size: int | None = None,
) -> ForwardFlops:
    """FLOPs of encoding one picture and one caption of `caption_length` tokens (a mean may be fractional)."""
    embed_dim = model.embed_dim
    return ForwardFlops(
        image=image_flops(model.image, pooled_only, training=training, image_size=image_size)
        + 2 * model.image.width * embed_dim,
        text=text_flops(model.text, caption_length, pooled_only) + 2 * model.text.width * embed_dim,
    )


def parameter_count(module: torch.nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def image_flops(
    tower: Tower, pooled_only: bool = False, *, training: bool = False, image_size: int | None = None
) -> float:
    """FLOPs of one picture through an image tower, without the projection. Only a ViT takes another `image_size`."""
    if isinstance(tower, VisionTransformer):
        patches = tower.patches_seen(image_size or tower.image_size, training)
        tokens = patches + (tower.pool == "cls")
        flops = 2 * patches * tower.patch_embedding.weight.numel()
        flops += _blocks(tower, tokens, pooled_only and tower.pool == "cls")
        return flops + _attention_pool(tower.attention_pool, tokens)
    if isinstance(tower, ModifiedResNet):
        return _resnet(tower)
    if isinstance(tower, TimmTower):
        return _counted(tower, tower.image_size)
    raise TypeError(f"no FLOP count for {type(tower).__name__}")


def text_flops(tower: Tower, length: float, pooled_only: bool = False) -> float:
    """FLOPs of one caption of `length` tokens through a text tower, without the projection."""
    if isinstance(tower, TransformersText):
        below = int(length)
        flops, part = _counted_text(tower, below), length - below
        if part:
            flops += part * (_counted_text(tower, below + 1) - flops)
        return flops + _attention_pool(tower.attention_pool, length)
    if not isinstance(tower, TextTower):
        raise TypeError(f"no FLOP count for {type(tower).__name__}")
    length = tower.tokens_encoded(length)
    flops = _blocks(tower, length, pooled_only and tower.pool in TOKEN_POOLS)
    return flops + _attention_pool(tower.attention_pool, length)


def _blocks(tower: VisionTransformer | TextTower, tokens: float, one_read: bool) -> float:
    flops = 0.0
    blocks = list(tower.blocks)
    for block in blocks:
        read = 1 if one_read and block is blocks[-1] else tokens
        attention = next(module for module in block.modules() if isinstance(module, SelfAttention))
        products = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
        flops += 2 * tokens * attention.qkv.weight.numel()
        flops += 2 * read * (products - attention.qkv.weight.numel())
        flops += 4 * read * tokens * attention.out.in_features  # queries x keys, weights x values
    return flops


def _attention_pool(pool: AttentionPool | None, tokens: float) -> float:
    if pool is None:
        return 0.0
    width = pool.query.in_features
    # The probe's projection is shared by the batch and left out.
    per_token = 2 * pool.key_value.weight.numel() + 4 * width
    per_sample = pool.out.weight.numel() + pool.mlp.up.weight.numel() + pool.mlp.down.weight.numel()
    return tokens * per_token + 2 * per_sample


def _resnet(tower: ModifiedResNet) -> float:
    cells = (tower.image_size // 2) ** 2
    flops = 2.0 * cells * sum(conv.weight.numel() for conv in (tower.conv1, tower.conv2, tower.conv3))
    cells //= 4
    for block in tower.blocks:
        assert isinstance(block, Bottleneck)
        flops += 2 * cells * (block.conv1.weight.numel() + block.conv2.weight.numel())
        cells //= block.stride**2
        flops += 2 * cells * block.conv3.weight.numel()
        if block.shortcut_conv is not None:
            flops += 2 * cells * block.shortcut_conv.weight.numel()
    tokens, pool = cells + 1, tower.attention_pool
    flops += 2 * pool.query.weight.numel()
    flops += 2 * tokens * (pool.key.weight.numel() + pool.value.weight.numel())
    return flops + 4 * tokens * tower.width


def _counted_text(tower: TransformersText, length: int) -> float:
    """FLOPs of a text's tokens, counted once for each length."""
    if length not in tower.flops_of_length:
        copied = copy.deepcopy(tower.backbone).to("meta").eval()
        counter = FlopCounterMode(display=False)
        # Fake tensors, for masks of decoders would ask those on meta for values.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), mode:
            embedded = torch.empty(1, length, tower.token_embedding.embedding_dim, device="meta")
            copied(inputs_embeds=embedded)
        tower.flops_of_length[length] = float(counter.get_total_flops())
    return tower.flops_of_length[length]


def _counted(tower: Tower, image_size: int) -> float:
    """Run one meta sample under torch's counter, for towers whose structure is not ours."""
    tower = copy.deepcopy(tower).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # not every torch counts its fused attention
        tower(torch.empty(1, 3, image_size, image_size, device="meta"))
    return float(counter.get_total_flops())
