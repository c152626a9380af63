"""Compiled blocks: the same gradients, and no new graph for captions of other lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from clip_train.errors import ConfigError
from clip_train.models.text import TextTransformer
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer
from clip_train.runtime.compilation import compile_blocks


def gradients(model: TwoTower, lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    images = torch.randn(4, 3, 16, 16, generator=generator)
    ids = torch.randint(0, 50, (4, max(lengths)), generator=generator)
    model.zero_grad(set_to_none=True)
    image, text, scale = model(images, ids, torch.tensor(lengths))
    F.cross_entropy(scale * image @ text.T, torch.arange(4)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_blocks_give_the_gradients_and_know_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Module.compile

    def without_code(module: nn.Module, **options: Any) -> None:  # graphs are what is tested; their C++ takes minutes
        plain(module, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", without_code)
    torch.manual_seed(0)
    model = TwoTower(VisionTransformer(16, 8, 16, 2, 2), TextTransformer(50, 20, 16, 3, 2), 8)
    compiled = copy.deepcopy(model)
    torch.compiler.reset()
    counters.clear()
    compile_blocks([*compiled.image.blocks, *compiled.text.blocks])
    graphs: list[int] = []
    for lengths in ([5, 9, 3, 4], [7, 7, 2, 3], [6, 12, 3, 10], [2, 2, 2, 20]):
        expected, actual = gradients(model, lengths), gradients(compiled, lengths)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (actual[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0, "something was compiled"
    assert graphs == graphs[:1] * 4
    torch.compiler.reset()


def test_without_a_compiler_the_recipe_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler was not found"):
        compile_blocks([])
