"""Exports against the libraries they are for: embeddings, token ids, fresh processes, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture, run_cli

from clip_train.build import build_preprocess, build_two_tower
from clip_train.cli import main
from clip_train.config.load import parse_toml
from clip_train.errors import ExportError
from clip_train.export.open_clip_keys import from_open_clip, to_open_clip
from clip_train.export.parity import PROBES, compare
from clip_train.export.run import TARGETS, export
from clip_train.export.transformers_keys import from_transformers, to_transformers
from clip_train.loading import LoadedModel
from tokenizer import BPETokenizer

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
    "resnet": "kind = 'resnet'\nimage_size = 64\nlayers = [1, 1, 1, 1]\nwidth = 16\nheads = 8",
    "timm": "kind = 'timm'\nname = 'test_resnet'\nimage_size = 32",
    "timm-vit": "kind = 'timm'\nname = 'test_vit'\nimage_size = 96",
    "timm-vit-160": "kind = 'timm'\nname = 'test_vit'\nimage_size = 160",
}  # fmt: skip
SIGMOID = "[loss]\nkind = 'sigmoid'\n"
TEXTS = {
    "causal": "",
    "quick": "activation = 'quick_gelu'",
    "sigmoid": SIGMOID,
    "bidirectional": "attention = 'bidirectional'\npool = 'mean'",
}


def small(image: str, text: str = "causal") -> LoadedModel:
    """A model whose every parameter and statistic matters: none is zero or one."""
    recipe = parse_toml(BASE.format(image=IMAGES[image], text=TEXTS[text]), where="test")
    tokenizer = BPETokenizer.default()
    torch.manual_seed(3)
    model = build_two_tower(recipe, tokenizer).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim <= 1 and tensor.numel() > 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return LoadedModel(model, build_preprocess(recipe), tokenizer, recipe, 1)


EXPRESSIBLE = [
    *(("open_clip", image, "causal") for image in ("vit", "resnet", "timm", "timm-vit-160")),
    ("open_clip", "vit-quick", "quick"),
    ("open_clip", "vit", "sigmoid"),
    *(("transformers", image, "causal") for image in ("vit", "timm", "timm-vit")),
    ("transformers", "vit-quick", "quick"),
    ("sentence_transformers", "vit", "causal"),
    *(("timm", image, "causal") for image in ("vit", "vit-mean", "vit-quick", "timm", "timm-vit")),
    ("onnx", "vit", "causal"),
    ("onnx", "resnet", "bidirectional"),
    ("onnx", "timm", "quick"),
]


@pytest.mark.parametrize(("target", "image", "text"), EXPRESSIBLE)
def test_embeddings_and_ids_are_the_same_there(target: str, image: str, text: str, tmp_path: Path) -> None:
    parity = export(small(image, text), target, tmp_path / "out", source=tmp_path)
    assert parity.images is not None
    assert parity.images <= 1e-5
    if target != "timm":
        assert parity.texts is not None
        assert parity.texts <= 1e-5
        assert parity.captions == len(PROBES)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "width = 32" in card
    assert "compared: images within" in card


@pytest.mark.parametrize(
    ("target", "image", "text", "names"),
    [
        ("open_clip", "vit-mean", "causal", "pool 'mean'"),
        ("open_clip", "timm-vit", "causal", "its own 160 px"),
        ("open_clip", "vit", "bidirectional", "bidirectional with pool 'mean'"),
        ("open_clip", "vit-quick", "causal", "one activation"),
        ("transformers", "vit", "sigmoid", "no logit bias"),
        ("transformers", "resnet", "causal", "open_clip or onnx"),
        ("transformers", "vit", "bidirectional", "bidirectional with pool 'mean'"),
        ("timm", "resnet", "causal", "onnx"),
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


@pytest.mark.parametrize("target", ["open_clip", "transformers", "onnx"])
def test_token_ids_of_ten_thousand_captions(target: str, tmp_path: Path) -> None:
    import importlib

    from clip_train.export.parity import Peer

    loaded = small("vit")
    export(loaded, target, tmp_path / "out", source=tmp_path)
    peer = importlib.import_module(f"clip_train.export.{target}").__dict__[f"load_{target}"](tmp_path / "out")
    parity = compare(loaded, Peer(None, None, peer.tokenize), captions(10_000))
    assert parity.captions == 10_000


def test_names_there_and_back_are_the_identity() -> None:
    state = small("vit").model.state_dict()
    for there, back in ((to_open_clip, from_open_clip), (to_transformers, from_transformers)):
        again = back(there(state))
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)


FRESH = {
    "open_clip": """
import open_clip, torch
model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model.eval()
with torch.no_grad():
    image = model.encode_image(torch.from_numpy(pixels), normalize=True).numpy()
    text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), normalize=True).numpy()
""",
    "transformers": """
import torch
from transformers import AutoModel, AutoTokenizer, pipeline
model = AutoModel.from_pretrained(folder).eval()
inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    image = model.get_image_features(pixel_values=torch.from_numpy(pixels)).pooler_output
    text = model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).pooler_output
image, text = (torch.nn.functional.normalize(t).numpy() for t in (image, text))
from PIL import Image
classify = pipeline("zero-shot-image-classification", model=folder)
scores = classify(Image.open(folder + "/../p.png"), candidate_labels=texts)
assert {s["label"] for s in scores} == set(texts)
""",
    "sentence_transformers": """
from sentence_transformers import SentenceTransformer
import torch
model = SentenceTransformer(folder, device="cpu")
with torch.no_grad():
    image = model[0].model.get_image_features(pixel_values=torch.from_numpy(pixels)).pooler_output
image, text = torch.nn.functional.normalize(image).numpy(), model.encode(texts)
from PIL import Image
assert abs(np.linalg.norm(model.encode([Image.open(folder + "/../p.png")])) - 1) < 1e-5
""",
    "timm": """
import timm, torch
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    image, text = torch.nn.functional.normalize(model(torch.from_numpy(pixels))).numpy(), None
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)(torch.from_numpy(pixels)).ndim == 2
""",
    "onnx": """
import json, onnxruntime
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
pad = json.load(open(folder + "/tokenizer_config.json"))["pad_token"]
tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
ids = np.array([e.ids for e in tokenizer.encode_batch(texts)])
image = onnxruntime.InferenceSession(folder + "/image.onnx").run(None, {"pixel_values": pixels})[0]
text = onnxruntime.InferenceSession(folder + "/text.onnx").run(None, {"input_ids": ids})[0]
assert "torch" not in sys.modules
""",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """A trained run with the tower of the quickstart: a timm backbone, which every target can express."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.toml").write_text(RUN.format(shards=shards))
    done = run_cli("train", str(folder / "recipe.toml"), "--run-dir", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    np.save(folder / "pixels.npy", np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32))
    (folder / "p.png").write_bytes(picture(1))
    return folder


RUN = """
name = "tiny"
[data]
batch_size = 8
workers = 0
[data.sources.s]
shards = "{shards}"
image = "png"
[image]
kind = "timm"
name = "test_resnet"
image_size = 32
[text]
width = 16
layers = 1
heads = 2
[model]
embed_dim = 8
[optimizer]
kind = "adamw"
lr = 1e-3
[training]
steps = 2
precision = "fp32"
[evaluation.tasks.seen]
kind = "retrieval"
shards = "{shards}"
image = "png"
"""
WORDS = ["a red square number 1", "two dogs", "a blue ring"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_is_exported_and_loaded_in_a_fresh_process_with_that_library_alone(target: str, run: Path) -> None:
    import clip_train

    loaded = clip_train.load(run / "run")
    pixels = np.load(run / "pixels.npy")
    expected = {"image": loaded.encode_image(torch.from_numpy(pixels)), "text": loaded.encode_text(WORDS)}
    folder = run / target
    assert main(["export", str(run / "run"), "--to", target, str(folder)]) == 0
    assert "r@10" in (folder / "README.md").read_text(), "the card holds the run's figures"
    script = f"""
import json, sys
import numpy as np
folder, texts = {str(folder)!r}, {json.dumps(WORDS)}
pixels = np.load({str(run / "pixels.npy")!r})
{FRESH[target]}
assert not any(name.split(".")[0] in ("clip_train", "tokenizer") for name in sys.modules)
np.savez({str(run / target)!r} + ".npz", image=image, text=np.zeros(0) if text is None else text)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=run)
    assert result.returncode == 0, result.stderr
    found = np.load(run / f"{target}.npz")
    assert np.abs(found["image"] - expected["image"].numpy()).max() <= 1e-5
    if found["text"].size:
        assert np.abs(found["text"] - expected["text"].numpy()).max() <= 1e-5
    else:
        assert target == "timm"


def test_the_onnx_example_ranks_captions(run: Path, tmp_path: Path) -> None:
    import clip_train

    loaded = clip_train.load(run / "run")
    export(loaded, "onnx", tmp_path / "onnx", source=run / "run")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "onnx" / "example.py"), str(run / "p.png"), *WORDS],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = {line.split("  ", 1)[1]: float(line.split("  ", 1)[0]) for line in done.stdout.splitlines()}
    from PIL import Image

    cosines = loaded.similarity(Image.open(run / "p.png"), WORDS)[0].tolist()
    assert [shown[text] for text in WORDS] == pytest.approx(cosines, abs=0.02)  # their picture resize is Pillow's
