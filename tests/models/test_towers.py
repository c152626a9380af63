"""Image towers, the joint model, adapters: what holds for each of them."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch.nn import functional as F

from clip_train.models.adapters import TimmTower
from clip_train.models.attention import attention
from clip_train.models.base import Tower, TowerOutput
from clip_train.models.layers import QuickGELU
from clip_train.models.resnet import ModifiedResNet
from clip_train.models.text import TextTransformer
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer

IMAGE_TOWERS = {
    "vit-cls": lambda: VisionTransformer(32, 8, 48, 2, 3),
    "vit-mean": lambda: VisionTransformer(32, 8, 48, 2, 3, pool="mean"),
    "vit-map": lambda: VisionTransformer(32, 8, 48, 2, 3, pool="map", activation="quick_gelu"),
    "vit-siglip": lambda: VisionTransformer(
        32, 8, 48, 2, 3, pool="map", activation="gelu_tanh", pre_norm=False, norm_eps=1e-6, projection=False
    ),
    "resnet": lambda: ModifiedResNet(32, (1, 1, 1, 1), 8, 4),
    "timm-resnet": lambda: TimmTower("test_resnet", 32),
    "timm-vit": lambda: TimmTower("test_vit", 32),
    "timm-convnext": lambda: TimmTower("test_convnext", 64),
}


@pytest.fixture(params=list(IMAGE_TOWERS))
def tower(request: pytest.FixtureRequest) -> Tower:
    torch.manual_seed(0)
    return IMAGE_TOWERS[request.param]()


def images_for(tower: Tower, batch: int = 4) -> torch.Tensor:
    size = tower.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_an_image_tower_gives_what_it_says(tower: Tower) -> None:
    output: TowerOutput = tower(images_for(tower))
    batch, length = output.valid.shape
    assert batch == 4
    assert output.pooled.shape == (4, tower.width)
    assert output.tokens.shape[:2] == (batch, length)
    assert output.valid.all()
    modules = set(tower.modules())
    blocks = list(tower.blocks)
    assert blocks
    assert all(block in modules for block in blocks)


def test_permuted_images_give_permuted_outputs(tower: Tower) -> None:
    tower.eval()
    images, order = images_for(tower), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(tower(images[order]).pooled, tower(images).pooled[order], atol=1e-5, rtol=1e-5)


def test_every_parameter_of_the_model_receives_a_gradient(tower: Tower) -> None:
    for module in tower.modules():  # gains that start at zero would hide what is behind them
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    model = TwoTower(tower, TextTransformer(20, 6, 16, 1, 2), 24 if tower.projection else tower.width)
    image, text, scale = model(images_for(tower), torch.randint(0, 20, (4, 6)), torch.tensor([6, 3, 2, 4]))
    F.cross_entropy(scale * image @ text.T, torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A bias of keys shifts all scores of a query alike: its exact gradient is zero.
        assert parameter.grad.abs().sum() > 0 or name.endswith("key.bias"), name


def test_gains_and_biases_do_not_decay(tower: Tower) -> None:
    model = TwoTower(tower, TextTransformer(20, 6, 16, 1, 2), 24 if tower.projection else tower.width)
    spared = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert spared <= parameters.keys()
    assert "logit_scale" in spared
    decayed = parameters.keys() - spared
    assert {"text.token_embedding.weight", "text.positional_embedding", "text_projection.weight"} <= decayed
    assert all(parameters[name].ndim >= 2 for name in decayed)
    assert not any(name.endswith("bias") or "norm" in name.rsplit(".", 2)[-2:] for name in decayed)


def test_a_picture_of_another_size_is_refused() -> None:
    for build in (IMAGE_TOWERS["vit-cls"], IMAGE_TOWERS["resnet"]):
        with pytest.raises(ValueError, match=r"images are \(1, 3, 64, 64\), this tower takes \(B, 3, 32, 32\)"):
            build()(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VisionTransformer(30, 8, 48, 1, 3), "image_size=30 is not a multiple of patch_size=8"),
        (lambda: VisionTransformer(32, 8, 48, 1, 5), "width=48 is not divisible by heads=5"),
        (lambda: VisionTransformer(32, 8, 48, 1, 3, pool="eot"), "pool='eot' is unknown for images"),
        (
            lambda: TwoTower(
                VisionTransformer(32, 8, 48, 1, 3, projection=False), TextTransformer(20, 6, 16, 1, 2), 24
            ),
            "width=48, embed_dim=24",
        ),
        (lambda: ModifiedResNet(40), "image_size=40 is not a multiple of 32"),
        (lambda: ModifiedResNet(32, (1, 1, 1)), "four stages"),
        (lambda: ModifiedResNet(32, (1, 1, 1, 1), 8, 5), "not divisible by heads=5"),
        (lambda: TimmTower("resnet5O", 32), "timm has no model 'resnet5O'; nearest: .*resnet50"),
    ],
)
def test_bad_sizes_and_names_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_vit_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    width, layers = 256, 4
    tower = VisionTransformer(64, 8, width, layers, 4)
    text = TextTransformer(4096, 64, width, layers, 4)
    model = TwoTower(tower, text, 128)
    into_stream = width**-0.5 * (2 * layers) ** -0.5
    expected = {
        "text.token_embedding.weight": 0.02,
        "text.positional_embedding": 0.01,
        "image.positional_embedding": width**-0.5,
        "image.class_embedding": width**-0.5,
        "image_projection.weight": width**-0.5,
        "text_projection.weight": width**-0.5,
    }
    for side in ("image", "text"):
        for i in range(layers):
            block = f"{side}.blocks.{i}"
            expected[f"{block}.attention.qkv.weight"] = width**-0.5
            expected[f"{block}.attention.out.weight"] = into_stream
            expected[f"{block}.mlp.up.weight"] = (2 * width) ** -0.5
            expected[f"{block}.mlp.down.weight"] = into_stream
    parameters = dict(model.named_parameters())
    for name, std in expected.items():
        values = parameters[name].detach()
        # Of n normal draws the std has a standard error of std / sqrt(2 n), the mean one of std / sqrt(n).
        assert abs(float(values.std()) / std - 1) < 5 / math.sqrt(2 * values.numel()), name
        assert abs(float(values.mean())) < 5 * std / math.sqrt(values.numel()), name
    for name, values in parameters.items():
        if name.endswith("bias"):
            assert not values.any(), name
        if name.endswith("norm.weight"):
            assert (values == 1).all(), name
    assert float(model.logit_scale.detach().exp()) == pytest.approx(1 / 0.07)


def test_resnet_starts_as_its_shortcuts() -> None:
    torch.manual_seed(0)
    model = TwoTower(ModifiedResNet(64, (2, 1, 1, 1), 32, 16), TextTransformer(20, 6, 16, 1, 2), 128)
    pool, width = model.image.attention_pool, 1024
    for weight in (pool.query.weight, pool.key.weight, pool.value.weight, model.image_projection.weight):
        assert abs(float(weight.detach().std()) * width**0.5 - 1) < 0.02
    assert not model.image_projection.bias.any()
    assert all(not block.bn3.weight.any() for block in model.image.blocks)
    second = model.image.blocks[1].eval()
    x = torch.randn(2, 128, 8, 8)
    torch.testing.assert_close(second(x), x.relu())


def test_features_have_unit_length_and_the_scale_is_clamped() -> None:
    torch.manual_seed(0)
    model = TwoTower(IMAGE_TOWERS["vit-cls"](), TextTransformer(20, 6, 16, 1, 2), 24, max_logit_scale=50.0)
    images, ids, lengths = torch.randn(3, 3, 32, 32), torch.randint(0, 20, (3, 6)), torch.tensor([6, 3, 2])
    with torch.autocast("cpu", torch.bfloat16):
        image, text, scale = model(images, ids, lengths)
    assert image.dtype == text.dtype == scale.dtype == torch.float32
    for features in (image, text):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)
    raw = model.encode_text(ids, lengths, normalize=False)
    torch.testing.assert_close(F.normalize(raw, dim=1), model.encode_text(ids, lengths))

    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    model.after_update_()
    assert float(model.logit_scale.detach().exp()) == pytest.approx(50.0)
    with torch.no_grad():
        model.logit_scale.fill_(-3.0)
    model.after_update_()
    assert model.logit_scale.item() == -3.0


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_timm_tower_is_timms_model(name: str) -> None:
    tower = TimmTower(name, 64).eval()
    sized = {"img_size": 64} if name == "test_vit" else {}
    reference = timm.create_model(name, num_classes=0, **sized).eval()
    reference.load_state_dict(tower.backbone.state_dict())
    images = images_for(tower)
    torch.testing.assert_close(tower(images).pooled, reference(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True), (True, True)])
def test_attention_is_the_formula(dtype: torch.dtype, causal: bool, masked: bool) -> None:
    """Against float64 and one query at a time; both of our ways of computing it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    valid = torch.arange(7) < torch.tensor([[7], [4]]) if masked else None
    out = attention(q, k, v, causal=causal, valid=valid)
    assert out.dtype == dtype
    weights = torch.randn(out.shape, generator=generator)
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))

    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    rows: list[torch.Tensor] = []
    for b in range(2):
        keys = 7 if valid is None else int(valid[b].sum())
        for h in range(3):
            for i in range(7):
                seen = min(i + 1, keys) if causal else keys
                probabilities = (k64[b, h, :seen] @ q64[b, h, i] / math.sqrt(8)).softmax(dim=0)
                rows.append(probabilities @ v64[b, h, :seen])
    expected = torch.stack(rows).view(2, 3, 7, 8)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (q64, k64, v64))
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    for actual, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual.double(), reference, atol=tolerance * 2, rtol=0)


def test_quick_gelu_is_the_formula() -> None:
    x = torch.linspace(-20, 20, 401, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))
