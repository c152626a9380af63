"""Models from elsewhere: open_clip's, OpenAI's archives, transformers'; and starting a run from one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import metrics_of
from safetensors.torch import load_file, save_file
from test_export import small
from torch.nn import functional as F

import clip_train
from clip_train.cli import main
from clip_train.errors import CheckpointError
from clip_train.export.bring_in import bring_in
from clip_train.export.open_clip_keys import from_open_clip, to_open_clip
from clip_train.export.open_clip_relocate import relocate
from clip_train.export.run import export
from clip_train.export.transformers import load_transformers
from clip_train.training.initial import resize_grid, resize_text_positions

TEXT = {"width": 64, "layers": 2, "heads": 1}
VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 64}


def peer(*, quick_gelu: bool = False, vision: Any = VISION) -> Any:
    """open_clip's CLIP with OpenAI's vocabulary, small, no parameter at its initial value."""
    torch.manual_seed(5)
    text: Any = {**TEXT, "context_length": 77, "vocab_size": 49408}
    model = open_clip.CLIP(32, vision, text, quick_gelu=quick_gelu)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def read(source: Path, out: Path, **options: Any) -> clip_train.LoadedModel:
    options = {"recipe": "imported", "overrides": [], "quick_gelu": False, "vocabulary": None, **options}
    bring_in(source, out, **options)
    return clip_train.load(out)


def check_same(loaded: clip_train.LoadedModel, model: Any, size: int = 32) -> None:
    texts = ["a diagram", "a dog", "Fish &amp; CHIPS"]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = F.normalize(model.encode_image(pixels), dim=-1)
        text = F.normalize(model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts)), dim=-1)
    assert (loaded.encode_image(pixels) - image).abs().max() <= 1e-5
    assert (loaded.encode_text(texts) - text).abs().max() <= 1e-5


@pytest.mark.parametrize("form", ["flat", "wrapped", "safetensors"])
def test_a_state_dict_of_open_clip(form: str, tmp_path: Path) -> None:
    model = peer()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if form == "wrapped":  # DDP around FSDP around compiled blocks
        deep = [(name.replace("resblocks.0.", "resblocks.0._orig_mod."), tensor) for name, tensor in state.items()]
        state = {f"module._fsdp_wrapped_module.{name}": tensor for name, tensor in deep}
    source = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, source)
    else:
        torch.save({"epoch": 3, "state_dict": state} if form == "wrapped" else state, source)
    check_same(read(source, tmp_path / "run"), model)


def test_openai_archives_are_torchscript_with_quick_gelu_in_half_precision(tmp_path: Path) -> None:
    model = peer(quick_gelu=True)
    half = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    model.load_state_dict(half)

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in {**half, "input_resolution": torch.tensor(32.0)}.items():
                holder: torch.nn.Module = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(holder, part):
                        holder.add_module(part, torch.nn.Module())
                    holder = getattr(holder, part)
                holder.register_buffer(last, tensor.half())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Archive()), str(tmp_path / "ViT-B-32.pt"))
    loaded = read(tmp_path / "ViT-B-32.pt", tmp_path / "run")
    assert loaded.recipe.text.activation == "quick_gelu"
    check_same(loaded, model)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        *(("vit", text) for text in ("causal", "sigmoid", "siglip", "bert", "t5-relu")),
        ("vit-quick", "quick"),
        ("vit-plain", "causal-last"),
        ("resnet", "t5"),
        ("timm", "bert-mean"),
        ("timm-pool", "attended"),
    ],
)
def test_export_to_open_clip_and_back_is_the_identity(image: str, text: str, tmp_path: Path) -> None:
    ours = small(image, text)
    export(ours, "open_clip", tmp_path / "there", source=tmp_path)
    back = read(tmp_path / "there", tmp_path / "back")
    assert back.tokenizer.fingerprint == ours.tokenizer.fingerprint
    assert back.preprocess == ours.preprocess
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name
    export(back, "open_clip", tmp_path / "again", source=tmp_path)
    if (tmp_path / "again" / "text_config").is_dir():
        relocate(tmp_path / "again", tmp_path / "there")  # their places are all that differs
    first, second = (load_file(tmp_path / folder / "open_clip_model.safetensors") for folder in ("there", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for file in ("open_clip_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "there" / file).read_text()) == json.loads(
            (tmp_path / "again" / file).read_text()
        )


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_names_of_the_published_models_there_and_back(name: str) -> None:
    state = open_clip.create_model(name).state_dict()
    again = to_open_clip(from_open_clip(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("image", "text"),
    [("vit", "causal"), ("vit-quick", "quick"), ("vit-siglip", "siglip-loss"), ("timm", "bert"), ("vit", "bi-cls")],
)
def test_transformers_and_back(image: str, text: str, tmp_path: Path) -> None:
    ours = small(image, text)
    export(ours, "transformers", tmp_path / "there", source=tmp_path)
    back = read(tmp_path / "there", tmp_path / "back")
    assert back.recipe.text == ours.recipe.text
    assert back.recipe.image == ours.recipe.image
    assert back.preprocess == ours.preprocess
    assert all(torch.equal(back.model.state_dict()[name], tensor) for name, tensor in ours.model.state_dict().items())


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_what_cannot_be_imported_is_an_error_that_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: tensor.clone() for name, tensor in peer().state_dict().items()}

    def refused(source: Path, message: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=message):
            read(source, tmp_path / "run", **options)
        assert not (tmp_path / "run" / "checkpoints").exists()
        for path in (tmp_path / "run").glob("*"):
            path.unlink()

    torch.save({"state_dict": state, "args": Harmful()}, tmp_path / "code.pt")
    refused(tmp_path / "code.pt", "more than tensors")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harmful()))
    refused(tmp_path / "plain.pt", "more than tensors|not a whole file")
    assert "this ran" not in capsys.readouterr().out

    save_file({name: t for name, t in state.items() if "resblocks.1.ln_1" not in name}, tmp_path / "few.safetensors")
    refused(tmp_path / "few.safetensors", r"attention_norm\.\w+ is missing")
    save_file({**state, "extra.weight": torch.ones(3)}, tmp_path / "more.safetensors")
    refused(tmp_path / "more.safetensors", "extra.weight")
    width = {**state, "visual.proj": torch.ones(16, 32)}
    save_file(width, tmp_path / "width.safetensors")
    refused(tmp_path / "width.safetensors", "image_projection.weight is")
    fewer = {**state, "token_embedding.weight": torch.ones(1000, 64)}
    save_file(fewer, tmp_path / "ids.safetensors")
    refused(tmp_path / "ids.safetensors", "--vocabulary")
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    refused(tmp_path / "cut.safetensors", "not a whole file")
    refused(tmp_path / "nothing", "neither a file")
    refused(
        whole,
        "another vocabulary",
        vocabulary=Path(clip_train.__file__).parents[1] / "tokenizer/vocabularies/default-49152.json.gz",
    )


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "act_kwargs", {"approximate": "none"}),
        ("text_cfg", "pool_type", "none"),
        ("text_cfg", "embed_cls", True),
        ("text_cfg", "norm_kwargs", {"bias": False}),
    ],
)
def test_settings_without_a_twin_here_are_refused_by_name(table: str, key: str, value: Any, tmp_path: Path) -> None:
    export(small("vit"), "open_clip", tmp_path / "there", source=tmp_path)
    file = tmp_path / "there" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][table][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{key} ="):
        read(tmp_path / "there", tmp_path / "run")


def test_berts_own_pooler_and_segments(tmp_path: Path) -> None:
    """BERT's tanh pooler has no twin; the vector of its one segment becomes part of the positions."""
    ours = small("vit", "bert")
    export(ours, "transformers", tmp_path / "there", source=tmp_path)
    file = tmp_path / "there" / "model.safetensors"
    state = load_file(file)
    state["text_model.embeddings.token_type_embeddings.weight"] = torch.randn(1, 32)
    save_file(state, file, metadata={"format": "pt"})
    back, there = read(tmp_path / "there", tmp_path / "run"), load_transformers(tmp_path / "there").encode_text
    texts = ["a diagram", "a dog"]
    assert there is not None
    assert (back.encode_text(texts) - there(texts)).abs().max() <= 1e-5
    assert (back.encode_text(texts) - ours.encode_text(texts)).abs().max() > 1e-3
    state["text_model.pooler.dense.weight"] = torch.eye(32)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="pooler"):
        read(tmp_path / "there", tmp_path / "other")


def test_a_run_starts_from_imported_weights_at_another_size(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(peer().state_dict(), tmp_path / "w.pt")
    assert main(["import", str(tmp_path / "w.pt"), str(tmp_path / "imported")]) == 0
    imported = clip_train.load(tmp_path / "imported")
    recipe_tree["image"] = {"kind": "vit", "image_size": 48, "patch_size": 8, "width": 64, "layers": 2, "heads": 1}
    recipe_tree["text"], recipe_tree["model"] = TEXT, {"embed_dim": 32}
    recipe_tree["tokenizer"] = {"path": str(tmp_path / "imported/vocabulary.json"), "context_length": 30}
    recipe_tree["training"] |= {"steps": 1, "init": str(tmp_path / "imported")}
    recipe_tree["optimizer"]["lr"] = 1e-12  # what is saved is what it started from
    assert main(["train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "17 positions" in shown
    assert "interpolated to 37" in shown
    tuned = clip_train.load(tmp_path / "run")
    before, after = imported.model.state_dict(), tuned.model.state_dict()
    for name in before:
        if "positional" not in name:
            assert torch.allclose(after[name], before[name], atol=1e-6), name
    grid = resize_grid(before["image.positional_embedding"], 37)
    assert torch.allclose(after["image.positional_embedding"], grid, atol=1e-6)
    assert torch.allclose(after["text.positional_embedding"], before["text.positional_embedding"][:30], atol=1e-6)
    assert len(metrics_of(tmp_path / "run")) == 1

    recipe_tree["tokenizer"] = {}
    assert main(["train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "other")]) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_positions_are_resized_as_open_clip_does() -> None:
    table = torch.randn(1 + 49, 8)

    class Peer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid_size = (9, 9)

    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    holder = torch.nn.Module()
    holder.visual = Peer()
    state = {"visual.positional_embedding": table.clone()}
    resize_pos_embed(state, holder, antialias=True)
    assert torch.allclose(resize_grid(table, 82), state["visual.positional_embedding"], atol=1e-5)

    holder.positional_embedding = torch.nn.Parameter(torch.empty(90, 8))
    state = {"positional_embedding": table.clone()}
    resize_text_pos_embed(state, holder)
    assert torch.allclose(resize_text_positions(table, 90), state["positional_embedding"], atol=1e-5)
