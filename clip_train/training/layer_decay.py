"""Layer-wise learning-rate decay: early layers, which hold what is general, learn more slowly (Bao et al. 2021, BEiT).

For fine-tuning: a tower of L blocks has L + 2 layers, layer 0 being what lies before the blocks (embeddings, a stem)
and layer L + 1 what lies behind them (last norm, pooling) and the projection. Layer i learns at `decay^(L + 1 - i)`.
"""

from __future__ import annotations

from collections.abc import Mapping

from clip_train.models.base import Model, Tower


def layer_scales(model: Model, decays: Mapping[str, float]) -> dict[str, float]:
    """Factor of the learning rate of every parameter, by name; 1 for what is in no tower, or one without a decay."""
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for prefix, tower in model.towers.items():
        layers, last = layers_of(tower)
        scales |= {f"{prefix}.{name}": decays.get(prefix, 1.0) ** (last - layer) for name, layer in layers.items()}
    return scales


def layers_of(tower: Tower) -> tuple[dict[str, int], int]:
    """Layer of each parameter, and the last layer's number. Blocks without parameters are no layers."""
    blocks = [block for block in tower.blocks if any(True for _ in block.parameters())]
    block_of = {id(parameter): number for number, block in enumerate(blocks, 1) for parameter in block.parameters()}
    layers: dict[str, int] = {}
    reached = 0
    for name, parameter in tower.named_parameters():  # in the order of the forward pass
        reached = block_of.get(id(parameter), reached)
        behind = id(parameter) not in block_of and reached == len(blocks)
        layers[name] = len(blocks) + 1 if behind else reached
    return layers, len(blocks) + 1
