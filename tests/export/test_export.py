"""Exports against the libraries they are for: embeddings, token ids, fresh processes, refusals."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from clip_train.config.load import parse_toml
from clip_train.errors import ExportError
from clip_train.export.open_clip import load_open_clip
from clip_train.export.open_clip_keys import from_open_clip, to_open_clip
from clip_train.export.parity import PROBES, compare
from clip_train.export.run import export
from clip_train.export.transformers_keys import from_transformers, to_transformers
from clip_train.from_recipe.data import build_preprocess
from clip_train.from_recipe.model import build_two_tower
from clip_train.loading import LoadedModel
from tokenizer import BPETokenizer
from tokenizer.training import train_bpe

BASE = """
name = "small"
[data]
batch_size = 8
[data.sources.s]
shards = "none.tar"
[image]
{image}
[text]
width = 32
layers = 2
heads = 2
{text}
[model]
embed_dim = 24
[optimizer]
kind = "adamw"
lr = 1e-3
[training]
steps = 1
"""
IMAGES = {
    "vit": "kind = 'vit'\nimage_size = 32\npatch_size = 8\nwidth = 32\nlayers = 2\nheads = 4",
    "vit-mean": "kind = 'vit'\nimage_size = 32\npatch_size = 8\nwidth = 32\nlayers = 2\nheads = 4\npool = 'mean'",
    "vit-quick": "kind = 'vit'\nimage_size = 32\npatch_size = 8\nwidth = 32\nlayers = 1\nheads = 2\n"
    "activation = 'quick_gelu'",
    "vit-map": "kind = 'vit'\nimage_size = 32\npatch_size = 8\nwidth = 32\nlayers = 2\nheads = 4\npool = 'map'\n"
    "activation = 'quick_gelu'",
    "vit-siglip": "kind = 'vit'\nimage_size = 32\npatch_size = 8\nwidth = 24\nlayers = 2\nheads = 4\npool = 'map'\n"
    "pre_norm = false\nprojection = false\nactivation = 'gelu_tanh'\nnorm_eps = 1e-6",
    "vit-plain": "kind = 'vit'\nimage_size = 32\npatch_size = 8\nwidth = 24\nlayers = 2\nheads = 4\n"
    "pre_norm = false\nprojection = false\nactivation = 'gelu_tanh'\nnorm_eps = 1e-6",
    "resnet50": "kind = 'resnet'\nimage_size = 64\nlayers = [3, 4, 6, 3]\nwidth = 16\nheads = 8",
    "resnet": "kind = 'resnet'\nimage_size = 64\nlayers = [1, 1, 1, 1]\nwidth = 16\nheads = 8",
    "timm": "kind = 'timm'\nname = 'test_resnet'\nimage_size = 32",
    "timm-pool": "kind = 'timm'\nname = 'test_resnet'\nimage_size = 32\narguments = {global_pool = 'max'}",
    "timm-vit": "kind = 'timm'\nname = 'test_vit'\nimage_size = 96",
    "timm-vit-160": "kind = 'timm'\nname = 'test_vit'\nimage_size = 160",
}  # fmt: skip
SIGMOID = "[loss]\nkind = 'sigmoid'\n"
TEXTS = {
    "causal": "",
    "quick": "activation = 'quick_gelu'",
    "sigmoid": SIGMOID,
    "causal-last": "pool = 'last'\nnorm_eps = 1e-4",
    "causal-mean": "pool = 'mean'",
    "bi-cls": "attention = 'bidirectional'\npool = 'cls'\nactivation = 'quick_gelu'",
    "bi-max": "attention = 'bidirectional'\npool = 'max'",
    "bi-map": "attention = 'bidirectional'\npool = 'map'",
    "siglip": "attention = 'bidirectional'\npadding = 'attended'\npool = 'last'\nprojection_bias = true\n"
    "activation = 'gelu_tanh'\nnorm_eps = 1e-6",
    "siglip-loss": "attention = 'bidirectional'\npadding = 'attended'\npool = 'last'\nprojection_bias = true\n"
    + SIGMOID,
    "attended": "attention = 'bidirectional'\npadding = 'attended'",
    "bert": "kind = 'bert'",
    "bert-mean": "kind = 'bert'\npool = 'mean'\nactivation = 'gelu_tanh'",
    "t5": "kind = 't5'",
    "t5-relu": "kind = 't5'\nmlp = 'relu'\nhead_dim = 8\npool = 'cls'",
    "modern": "kind = 'modern'",
    "modern-bi": "kind = 'modern'\nattention = 'bidirectional'\npool = 'mean'",
}


@cache
def vocabulary() -> BPETokenizer:
    """1,000 ids, which libraries load in no time."""
    words = [f"{caption} {number} {'naïve' if number % 3 else 'crème'} café!" for number, caption in enumerate(PROBES)]
    return train_bpe([*words, *captions(500)], 1000, context_length=40)


def small(image: str, text: str = "causal", tokenizer: BPETokenizer | None = None) -> LoadedModel:
    """A model whose every parameter and statistic matters: none is zero or one, and attention is not flat."""
    recipe = parse_toml(BASE.format(image=IMAGES[image], text=TEXTS[text]), where="test")
    tokenizer = tokenizer or vocabulary()
    torch.manual_seed(3)
    model = build_two_tower(recipe, tokenizer).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.ndim <= 1 and tensor.numel() > 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
            elif name.startswith("text."):
                tensor.add_(0.1 * torch.randn_like(tensor))
    return LoadedModel(model, build_preprocess(recipe), tokenizer, recipe, 1)


# Every image tower and every text tower of each target once; towers do not know of each other.
EXPRESSIBLE = [
    *(("open_clip", image, "causal") for image in
      ("vit", "vit-plain", "resnet", "timm", "timm-vit-160", "timm-pool")),
    *(("open_clip", "vit-quick", text) for text in ("quick", "bert")),
    *(("open_clip", "vit", text) for text in
      ("sigmoid", "siglip", "attended", "causal-last", "bert-mean", "t5", "t5-relu")),
    *(("transformers", image, "causal") for image in
      ("vit", "vit-mean", "vit-map", "vit-plain", "vit-siglip", "resnet50", "timm", "timm-vit", "timm-pool")),
    *(("transformers", "vit-quick", text) for text in ("quick", "causal-last", "bi-cls", "bert")),
    ("transformers", "timm", "bert"),
    ("transformers", "vit-siglip", "siglip-loss"),
    *(("sentence_transformers", "vit", text) for text in
      ("causal", "sigmoid", "causal-mean", "bi-max", "bert-mean", "t5", "t5-relu", "modern", "modern-bi")),
    ("sentence_transformers", "resnet50", "bi-cls"),
    ("sentence_transformers", "timm", "modern"),
    *(("timm", image, "causal") for image in
      ("vit", "vit-mean", "vit-map", "vit-quick", "vit-plain", "vit-siglip")),
    *(("timm", image, "causal") for image in ("resnet50", "timm", "timm-vit", "timm-pool")),
    ("onnx", "vit", "siglip"),
    ("onnx", "vit-map", "t5"),
    ("onnx", "resnet", "bi-map"),
    ("onnx", "timm", "modern"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "image", "text"), EXPRESSIBLE)
def test_embeddings_and_ids_are_the_same_there(target: str, image: str, text: str, tmp_path: Path) -> None:
    parity = export(small(image, text), target, tmp_path / "out", source=tmp_path)
    assert parity.images is not None
    assert parity.images <= 1e-5
    if target != "timm":
        assert parity.texts is not None
        assert parity.texts <= 1e-5
        assert parity.captions == len(PROBES)
        vectors = small(image, text).encode_text(PROBES)
        assert vectors.std(dim=0).mean() > 0.01, "captions are told apart, so that equal embeddings mean something"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "width = 32" in card
    assert "compared: images within" in card


@pytest.mark.parametrize(
    ("target", "image", "text", "names"),
    [
        ("open_clip", "vit-mean", "causal", "pool 'mean'.*timm, transformers or onnx"),
        ("open_clip", "timm-vit", "causal", "its own 160 px"),
        ("open_clip", "vit", "bi-max", "bidirectional with pool 'max'. Export it to sentence_transformers or onnx"),
        ("open_clip", "vit", "bi-map", "with pool 'map'. Export it to onnx"),
        ("open_clip", "vit", "modern", "modern causal with pool 'eot'"),
        ("open_clip", "vit-quick", "causal", "QuickGELU in both"),
        ("transformers", "vit", "sigmoid", "no logit bias"),
        ("transformers", "resnet", "causal", "open_clip or onnx"),
        ("transformers", "vit", "bi-max", "bidirectional with pool 'max'. Export it to sentence_transformers or onnx"),
        ("transformers", "vit", "siglip", "Export it to open_clip or onnx"),
        ("sentence_transformers", "vit", "bi-map", "pool 'map'. Export it to onnx"),
        ("sentence_transformers", "vit-siglip", "siglip-loss", "Export it to transformers, open_clip or onnx"),
        ("timm", "resnet", "causal", "open_clip or onnx"),
    ],
)
def test_what_a_target_cannot_express_is_refused_by_name(
    target: str, image: str, text: str, names: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=names):
        export(small(image, text), target, tmp_path / "out", source=tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"


def test_an_export_that_came_out_different_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = small("vit")
    from clip_train.export import open_clip as target

    write = target.write_open_clip

    def damaged(model: LoadedModel, out: Path) -> None:
        with torch.no_grad():
            model.model.image_projection.weight[0, 0] += 1.0
            write(model, out)
            model.model.image_projection.weight[0, 0] -= 1.0

    monkeypatch.setattr(target, "write_open_clip", damaged)
    with pytest.raises(ExportError, match="embeddings of images differ"):
        export(loaded, "open_clip", tmp_path / "out", source=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ExportError, match="choose a new folder"):
        export(small("vit"), "timm", tmp_path, source=tmp_path)
    assert (tmp_path / "kept.txt").read_text() == "mine"


def captions(count: int) -> list[str]:
    """Embedded captions, varied in case, punctuation and white space, and the probes."""
    from clip_train.data import columns
    from clip_train.data.files import ShardFiles
    from clip_train.data.shards import index_all, resolve

    files, found = ShardFiles(), list(PROBES)
    column = columns.parse("json.captions")
    for one in index_all(resolve("embedded:pictograms/train-*.tar")):
        for sample in range(len(one)):
            found += columns.read_captions(*columns.read(files, one, sample, column))
            if len(found) >= count:
                changes = (str, str.upper, str.title, lambda text: f"  {text}!?  ", lambda text: f"“{text}” — №1, café")
                return [changes[number % 5](text) for number, text in enumerate(found[:count])]
    raise AssertionError(f"only {len(found)} captions")


@pytest.mark.parametrize("target", ["open_clip", "transformers", "sentence_transformers", "onnx"])
def test_token_ids_of_ten_thousand_captions(target: str, tmp_path: Path) -> None:
    import importlib

    from clip_train.export.parity import Peer

    loaded = small("vit", tokenizer=BPETokenizer.default())
    export(loaded, target, tmp_path / "out", source=tmp_path)
    peer = importlib.import_module(f"clip_train.export.{target}").__dict__[f"load_{target}"](tmp_path / "out")
    parity = compare(loaded, Peer(None, None, peer.tokenize), captions(10_000))
    assert parity.captions == 10_000


def test_a_moved_folder_with_a_bert_finds_its_shape_again(tmp_path: Path) -> None:
    import open_clip

    export(small("vit", "bert"), "open_clip", tmp_path / "out", source=tmp_path)
    assert load_open_clip(tmp_path / "out").encode_text is not None, (
        "its path is of the folder, not of where it was written"
    )
    shutil.move(tmp_path / "out", tmp_path / "moved")
    with pytest.raises(OSError, match="text_config"):
        open_clip.create_model(f"local-dir:{tmp_path / 'moved'}")
    subprocess.run([sys.executable, "-I", str(tmp_path / "moved" / "relocate.py")], check=True)
    assert compare(small("vit", "bert"), load_open_clip(tmp_path / "moved")).texts is not None


def test_names_there_and_back_are_the_identity() -> None:
    state = small("vit").model.state_dict()
    for there, back in ((to_open_clip, from_open_clip), (to_transformers, from_transformers)):
        again = back(there(state))
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)
