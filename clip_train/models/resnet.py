"""CLIP's modified ResNet (Radford et al. 2021, section 2.4).

ResNet-D's three-convolution stem (He et al. 2019), strides by average pooling (Zhang 2019), and attention
pooling in place of the global average.

Shapes: `B` batch, `G = (image_size / 32)^2` cells of the last map, `W = 32 * width` features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.attention import attention
from clip_train.models.base import Tower, TowerOutput


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; a stride is an average pooling after the 3x3 and in the shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False) if changes else None
        self.shortcut_bn = nn.BatchNorm2d(out_channels) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        if self.stride > 1:
            y = F.avg_pool2d(y, self.stride)
        y = self.bn3(self.conv3(y))
        if self.shortcut_conv is not None and self.shortcut_bn is not None:
            if self.stride > 1:
                x = F.avg_pool2d(x, self.stride)
            x = self.shortcut_bn(self.shortcut_conv(x))
        return F.relu(y + x, inplace=True)


class ResNetAttentionPool(nn.Module):
    """The mean of the map, with a position of its own, attends to itself and to every cell.

    The output projection of the paper's layer is `TwoTower.image_projection`.
    """

    def __init__(self, cells: int, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} features (32 x width) are not divisible by heads={heads}")
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(cells + 1, width))
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, cells: Tensor) -> Tensor:
        """`(B, G, W)` -> `(B, W)`."""
        x = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(x[:, :1]), self.key(x), self.value(x))
        )
        return attention(q, k, v).transpose(1, 2).flatten(1)


class ModifiedResNet(Tower):
    """CLIP's ResNet; its pooled vector has `32 * width` features and is projected with a bias.

    Args:
        image_size: height and width of the input in pixels, a multiple of 32.
        layers: bottlenecks in each of the four stages.
        width: channels of the stem.
        heads: heads of the attention pooling.

    Raises:
        ValueError: sizes that do not divide.
    """

    projection_bias = True

    def __init__(self, image_size: int, layers: Sequence[int] = (3, 4, 6, 3), width: int = 64, heads: int = 32) -> None:
        super().__init__()
        if image_size % 32:
            raise ValueError(f"image_size={image_size} is not a multiple of 32")
        if len(layers) != 4:
            raise ValueError(f"layers={tuple(layers)} must name the bottlenecks of four stages")
        self.image_size, self.width = image_size, 32 * width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        stages: list[nn.Sequential] = []
        in_channels = width
        for stage, depth in enumerate(layers):
            channels = width * 2**stage
            stack: list[nn.Module] = []
            for i in range(depth):
                stack.append(Bottleneck(in_channels, channels, stride=2 if stage > 0 and i == 0 else 1))
                in_channels = channels * Bottleneck.expansion
            stages.append(nn.Sequential(*stack))
        self.stages = nn.ModuleList(stages)
        self.blocks = [block for stage in stages for block in stage]
        self.attention_pool = ResNetAttentionPool((image_size // 32) ** 2, self.width, heads)
        self.init_parameters()

    def init_parameters(self) -> None:
        """Pooling in `W^-1/2` and the last gain of each bottleneck 0, so that it starts as its shortcut."""
        pool = self.attention_pool
        nn.init.normal_(pool.positional_embedding, std=self.width**-0.5)
        for linear in (pool.query, pool.key, pool.value):
            nn.init.normal_(linear.weight, std=self.width**-0.5)
            nn.init.zeros_(linear.bias)
        for block in self.blocks:
            assert isinstance(block, Bottleneck)
            nn.init.zeros_(block.bn3.weight)

    def forward(self, images: Tensor, *, pooled_only: bool = False) -> TowerOutput:
        """`images` `(B, 3, image_size, image_size)` float, normalised. Tokens: cells of the last map, always all."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"images are {tuple(images.shape)}, this tower takes (B, 3, {size}, {size})")
        # Channels last is what convolution kernels work in on CPU and on tensor cores.
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        x = F.avg_pool2d(x, 2)
        for stage in self.stages:
            x = stage(x)
        tokens = x.flatten(2).transpose(1, 2)
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device)
        return TowerOutput(tokens, valid, self.attention_pool(tokens))
