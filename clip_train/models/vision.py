"""CLIP's Vision Transformer (Radford et al. 2021, section 2.4; Dosovitskiy et al. 2020), and SigLIP's.

SigLIP's (Zhai et al. 2023) is `pool="map"`, `pre_norm=False`, `projection=False`, `activation="gelu_tanh"`,
`norm_eps=1e-6`.

Shapes: `B` batch, `P` patch size, `G = (image_size / P)^2` patches, `L = G + 1` tokens, `W` width.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.attention import Layout
from clip_train.models.base import Tower, TowerOutput
from clip_train.models.layers import Activation, Block, LayerNorm, init_blocks_
from clip_train.models.pooling import AttentionPool, mean_of_valid
from clip_train.models.positions import resample_grid


class VisionTransformer(Tower):
    """Patches without bias, a class token, learned positions, a norm before and one after the blocks.

    Args:
        image_size: height and width of the input in pixels, a multiple of `patch_size`.
        pool: `cls` takes the class token (CLIP), `mean` averages the patches, `map` attends to the patches
            with a learned query. Only `cls` has a class token.
        pre_norm: whether there is a norm before the blocks, as in CLIP; SigLIP has none.
        projection: whether CLIP's projection stands behind the tower; SigLIP has none.
        patch_dropout: share of the patches that training leaves out, drawn for each picture (FLIP, Li et al. 2023);
            evaluation sees all.
        smaller_sizes: sizes that pictures may also have; the positions are then interpolated from those of
            `image_size`, which alone are learned.

    Raises:
        ValueError: sizes that do not divide, or an unknown `pool` or `activation`.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        pool: Literal["cls", "mean", "map"] = "cls",
        activation: Activation = "gelu",
        pre_norm: bool = True,
        norm_eps: float = 1e-5,
        projection: bool = True,
        patch_dropout: float = 0.0,
        smaller_sizes: Collection[int] = (),
    ) -> None:
        super().__init__()
        for size in (image_size, *smaller_sizes):
            if size % patch_size:
                raise ValueError(f"image_size={size} is not a multiple of patch_size={patch_size}")
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"patch_dropout={patch_dropout} is not in [0, 1)")
        if pool not in ("cls", "mean", "map"):
            raise ValueError(f"pool={pool!r} is unknown for images: choose 'cls', 'mean' or 'map'")
        self.image_size, self.patch_size = image_size, patch_size
        self.width, self.pool, self.projection = width, pool, projection
        self.patch_dropout, self.sizes = patch_dropout, {image_size, *smaller_sizes}
        patches = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width)) if pool == "cls" else None
        self.positional_embedding = nn.Parameter(torch.empty(patches + (pool == "cls"), width))
        self.pre_norm = LayerNorm(width, eps=norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, activation, norm_eps=norm_eps) for _ in range(layers)
        )
        self.post_norm = LayerNorm(width, eps=norm_eps)
        self.attention_pool = AttentionPool(width, heads, mlp_ratio, activation, norm_eps) if pool == "map" else None
        self.init_parameters()

    def init_parameters(self) -> None:
        """The paper's initialisation; the patch convolution keeps torch's, as in the released code."""
        nn.init.kaiming_uniform_(self.patch_embedding.weight, a=math.sqrt(5))
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding, std=self.width**-0.5)
        nn.init.normal_(self.positional_embedding, std=self.width**-0.5)
        init_blocks_(self.blocks)

    def patches_seen(self, image_size: int, training: bool) -> int:
        """Patches of a picture that the blocks work on."""
        patches = (image_size // self.patch_size) ** 2
        return max(1, int(patches * (1 - self.patch_dropout))) if training else patches

    def embed_patches(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` -> `(B, patches seen, W)` with their positions; the convolution is one matrix product."""
        p = self.patch_size
        # (B, 3, rows, p, columns, p) -> (B, rows, columns, 3, p, p): one row of pixels for each patch
        pixels = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        pixels = pixels.flatten(3).flatten(1, 2)
        table = self.positional_embedding if self.class_embedding is None else self.positional_embedding[1:]
        positions = resample_grid(table, images.shape[-1] // p)
        seen, patches = self.patches_seen(images.shape[-1], self.training), pixels.shape[1]
        if seen < patches:
            # Drawn from torch's generator, which a step seeds: gradient caching sees the same patches twice.
            chosen = torch.rand(pixels.shape[:2], device=pixels.device).topk(seen, dim=1, sorted=False).indices
            pixels = pixels.gather(1, chosen[..., None].expand(-1, -1, pixels.shape[2]))
            positions = F.embedding(chosen, positions)
        x = F.linear(pixels, self.patch_embedding.weight.flatten(1))
        return x + positions.to(x.dtype)

    def forward(self, images: Tensor, *, pooled_only: bool = False) -> TowerOutput:
        """`images` `(B, 3, image_size, image_size)` float, normalised, or smaller ones. The class token is token 0.

        With `pooled_only` and `pool = "cls"` the last block computes the class token alone.
        """
        if images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.shape[3] not in self.sizes:
            sizes = " or ".join(f"(B, 3, {size}, {size})" for size in sorted(self.sizes, reverse=True))
            raise ValueError(f"images are {tuple(images.shape)}, this tower takes {sizes}")
        x = self.embed_patches(images)
        if self.class_embedding is not None:
            first = self.class_embedding.to(x.dtype) + self.positional_embedding[0].to(x.dtype)
            x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)
        x = self.pre_norm(x)
        layout = Layout()
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, layout)
        if pooled_only and self.pool == "cls":
            layout = Layout(read=torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device))
        x = last(x, layout)
        tokens: Tensor = self.post_norm(x)
        if self.attention_pool is not None:
            pooled = self.attention_pool(tokens, None)
        else:
            pooled = tokens[:, 0] if self.pool == "cls" else mean_of_valid(tokens, None)
        return TowerOutput(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device), pooled)
