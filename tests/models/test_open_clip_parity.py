"""The towers against open_clip's, with the same weights: outputs, gradients, names, counts."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch.nn import functional as F

from clip_train.export.open_clip_keys import from_open_clip, to_open_clip
from clip_train.models.adapters import TimmTower
from clip_train.models.presets import PRESETS, ResNetSize, build_preset
from clip_train.models.resnet import ModifiedResNet
from clip_train.models.text import TextTransformer
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer

VOCABULARY, CONTEXT = 96, 12
TEXT = {"vocab_size": VOCABULARY, "context_length": CONTEXT, "width": 64, "heads": 2, "layers": 3}
EOT = VOCABULARY - 1


def captions(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions of every length from 2 to the cap, EOT the largest id and last, padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, CONTEXT + 1, (batch,), generator=generator)
    lengths[0], lengths[1] = 2, CONTEXT
    ids = torch.randint(1, EOT, (batch, CONTEXT), generator=generator)
    ids[torch.arange(CONTEXT) >= lengths[:, None]] = 0
    ids[torch.arange(batch), lengths - 1] = EOT
    return ids, lengths


def pair(kind: str) -> tuple[TwoTower, open_clip.CLIP, int]:
    """One of our models and open_clip's with its own random weights, shared."""
    torch.manual_seed(1)
    quick = kind == "vit-quick"
    activation = "quick_gelu" if quick else "gelu"
    text = TextTransformer(VOCABULARY, CONTEXT, 64, 3, 2, activation=activation)
    if kind == "resnet":
        size = 64
        vision = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "head_width": 64}
        image = ModifiedResNet(64, (1, 2, 1, 1), 16, 8)
    elif kind == "timm":
        size = 32
        vision = {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}
        image = TimmTower("test_resnet", 32)
    else:
        size = 48
        vision = {"image_size": 48, "layers": 3, "width": 96, "patch_size": 16, "head_width": 32}
        image = VisionTransformer(48, 16, 96, 3, 3, activation=activation)
    ours = TwoTower(image, text, 40)
    theirs = open_clip.CLIP(40, vision, TEXT, quick_gelu=quick)
    with torch.no_grad():  # zero biases and unit gains would hide a misplaced one
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.abs().sum() > 0, name
    ours.load_state_dict(from_open_clip(theirs.state_dict()))
    return ours, theirs, size


@pytest.mark.parametrize("kind", ["vit", "vit-quick", "resnet", "timm"])
@pytest.mark.parametrize("training", [True, False])
def test_same_weights_give_the_same_features_and_gradients(kind: str, training: bool) -> None:
    ours, theirs, size = pair(kind)
    ours.train(training)
    theirs.train(training)
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(2))
    ids, lengths = captions(6)

    image, text, scale = ours(images, ids, lengths)
    their_image, their_text, their_scale = theirs(images, ids)
    torch.testing.assert_close(image, their_image, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, their_text, atol=1e-5, rtol=0)
    torch.testing.assert_close(scale, their_scale, atol=1e-5, rtol=0)

    labels = torch.arange(6)
    F.cross_entropy(scale * image @ text.T, labels).backward()
    F.cross_entropy(their_scale * their_image @ their_text.T, labels).backward()
    expected = from_open_clip({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    actual = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in actual.items():
        tolerance = 1e-5 * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(gradient, expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    if training:  # running statistics too
        torch.testing.assert_close(ours.state_dict(), from_open_clip(theirs.state_dict()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_names_map_both_ways(kind: str) -> None:
    ours, theirs, _ = pair(kind)
    theirs.load_state_dict(to_open_clip(ours.state_dict()), strict=True)
    torch.testing.assert_close(from_open_clip(to_open_clip(ours.state_dict())), ours.state_dict(), rtol=0, atol=0)


def test_a_parameter_without_a_place_is_named() -> None:
    model = TwoTower(VisionTransformer(16, 8, 16, 1, 2), TextTransformer(9, 4, 16, 1, 2, pool="map"), 8)
    with pytest.raises(ValueError, match=r"no name in open_clip for .*text\.attention_pool\.probe"):
        to_open_clip(model.state_dict())
    with pytest.raises(ValueError, match=r"no name in clip-train for visual\.extra"):
        from_open_clip({"visual.extra": torch.zeros(()), "visual.proj": torch.zeros(2, 2)})


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_open_clips_configurations(name: str) -> None:
    config = open_clip.get_model_config(name.replace("/", "-").replace("@", "-"))
    with torch.device("meta"):
        ours, theirs = build_preset(name), open_clip.CLIP(**config)
    renamed = to_open_clip(ours.state_dict())
    expected = theirs.state_dict()
    assert {key: value.shape for key, value in renamed.items()} == {k: v.shape for k, v in expected.items()}
    # Heads leave no trace in the shapes.
    assert ours.text.blocks[0].attention.heads == config["text_cfg"]["heads"]
    image = PRESETS[name].image
    if isinstance(image, ResNetSize):
        assert ours.image.attention_pool.heads == theirs.visual.attnpool.num_heads
    else:
        assert ours.image.blocks[0].attention.heads == theirs.visual.transformer.resblocks[0].attn.num_heads


def test_vit_b_32_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = build_preset("ViT-B/32")
    assert sum(parameter.numel() for parameter in model.parameters()) == 151_277_313
    assert len(model.state_dict()) == 302
