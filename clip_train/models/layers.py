"""The pieces of transformer blocks (Vaswani et al. 2017), and CLIP's block (pre-norm, as in GPT-2).

Shapes: `B` batch, `L` tokens of a sample, `T` packed tokens of a batch, `W` width, `H` heads, `D = W / H`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.attention import Layout, SelfAttention
from clip_train.models.packing import take_rows

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the approximation of OpenAI's weights (Hendrycks & Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        # silu(a x) / a is the same function, and keeps one tensor for the backward pass, not three.
        return F.silu(1.702 * x) / 1.702


def activation_module(name: Activation) -> nn.Module:
    """The module of an activation's name. Raises ValueError for an unknown one."""
    if name == "gelu":
        return nn.GELU()
    if name == "gelu_tanh":  # transformers' `gelu_new` and `gelu_pytorch_tanh`
        return nn.GELU(approximate="tanh")
    if name == "quick_gelu":
        return QuickGELU()
    if name == "relu":
        return nn.ReLU()
    if name == "silu":
        return nn.SiLU()
    raise ValueError(f"activation={name!r} is unknown: choose one of {', '.join(get_args(Activation))}")


class LayerNorm(nn.LayerNorm):
    """Layer norm with statistics in fp32 whatever the input's dtype, which it keeps."""

    def forward(self, input: Tensor) -> Tensor:
        # Under autocast CUDA answers in fp32; on CPU the kernel takes bf16 and computes in fp32 itself.
        return super().forward(input).to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * weight` (Zhang & Sennrich 2019), computed in fp32 whatever the input's dtype, which it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def to_compute_dtype(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast computes in, so that the residual stream has it too.

    Without autocast, `x` itself. A bf16 stream halves the memory traffic of everything between the matrix
    products. ViT's starts as the output of a product and is bf16 by itself; text starts as a table look-up.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, activation: Activation = "gelu", *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.activation = activation_module(activation)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMlp(nn.Module):
    """`down(activation(gate(x)) * up(x))` without biases (Shazeer 2020, *GLU Variants Improve Transformer*)."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.activation = activation_module(activation)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def gated_hidden(width: int, mlp_ratio: float) -> int:
    """Inner size of a gated MLP: `width * mlp_ratio`, to the next multiple of 8, which matrix units like."""
    return 8 * math.ceil(width * mlp_ratio / 8)


class PreNormBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(
        self, attention_norm: nn.Module, attention: SelfAttention, mlp_norm: nn.Module, mlp: Mlp | GatedMlp
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        mixed = self.attention(self.attention_norm(x), layout)
        x = (x if layout.read is None else take_rows(x, layout.read)[:, None]) + mixed
        return x + self.mlp(self.mlp_norm(x))


class Block(PreNormBlock):
    """CLIP's."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: Activation = "gelu",
        *,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            LayerNorm(width, eps=norm_eps),
            SelfAttention(width, heads),
            LayerNorm(width, eps=norm_eps),
            Mlp(width, int(width * mlp_ratio), activation),
        )


def init_blocks_(blocks: Iterable[nn.Module]) -> None:
    """Initialise the blocks of one transformer as CLIP does (its released code, `initialize_parameters`).

    The outputs that are added to the residual stream are scaled by `(2 layers)^-1/2`, as in GPT-2.
    """
    blocks = list(blocks)
    for block in blocks:
        assert isinstance(block, PreNormBlock)
        width = block.attention.out.out_features
        into_stream = width**-0.5 * (2 * len(blocks)) ** -0.5
        nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attention.out.weight, std=into_stream)
        nn.init.normal_(block.mlp.up.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.down.weight, std=into_stream)
        if isinstance(block.mlp, GatedMlp):
            nn.init.normal_(block.mlp.gate.weight, std=(2 * width) ** -0.5)
        for name, parameter in block.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
