"""The blocks of docs/downstream.md on the quickstart's model: export it to every target, then each block as it stands
there, in a fresh process in which the other libraries, clip_train among them, cannot be imported.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_train
from clip_train.cli import main
from clip_train.export.timm import load_timm

pytestmark = pytest.mark.timeout(600)  # processes that import whole libraries, on machines that are busy

TEXT = (Path(__file__).parents[2] / "docs" / "downstream.md").read_text(encoding="utf-8")
SHORT = (
    "training.steps=2",
    "training.precision=fp32",
    "data.batch_size=32",
    "data.workers=0",
    'optimizer={kind="adamw", lr=1e-3}',
    "training.ema={decay=0.5}",
    'evaluation.tasks={clipart={kind="retrieval", shards="embedded:pictograms/openclipart_test-*.tar", '
    'image="webp", caption="json.captions"}}',
)
HEADINGS = {"open_clip": "open_clip", "transformers": "transformers", "sentence_transformers": "sentence-transformers",
            "timm": "timm", "onnx": "ONNX Runtime"}  # fmt: skip
TEXTS = ["a red fox", "a blue car"]

NEEDS = {
    "open_clip": {"open_clip", "timm", "torch", "transformers"},  # transformers reads the vocabulary
    "transformers": {"timm", "torch", "transformers"},  # timm builds this image tower
    "sentence_transformers": {"sentence_transformers", "timm", "torch", "transformers"},
    "timm": {"timm", "torch"},
    "onnx": {"onnxruntime"},
}
LIBRARIES = {"clip_train", "tokenizer", "onnx", "onnxscript"}.union(*NEEDS.values())

# What follows a block, with its names: the embeddings of the picture and of the texts.
THEN = {
    "open_clip": "image, text = image, texts",
    "transformers": """
scores = {one["label"]: one["score"] for one in
          classify("picture.png", candidate_labels=texts, hypothesis_template="{}")}
for label, share in zip(texts, (model.logit_scale.exp() * cosines).softmax(-1)[0].tolist(), strict=True):
    assert abs(scores[label] - share) < 1e-4
text = words
""",
    "sentence_transformers": "image, text = pictures, words",
    "timm": """
image, text = torch.nn.functional.normalize(vectors), None
assert features.shape[1] == backbone.num_features
with torch.no_grad():
    assert torch.equal(maps(pixels)[-1], backbone.forward_features(pixels))
""",
    "onnx": "text, sys.argv[1] = texts, 'large.png'\nresized = runpy.run_path(sys.argv[0])['image']",
}


def blocks(heading: str, language: str) -> list[str]:
    """Code under a heading of the document."""
    section = re.split(r"^## ", TEXT, flags=re.M)
    (found,) = [part for part in section if part.splitlines()[0] == heading]
    return re.findall(rf"^```{language}\n(.*?)^```$", found, flags=re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `runs/quickstart` and `picture.png`, of the tower's size: nothing is resampled."""
    folder = tmp_path_factory.mktemp("downstream")
    arguments = [part for override in SHORT for part in ("--set", override)]
    assert main(["quickstart", "--run-dir", str(folder / "runs" / "quickstart"), *arguments]) == 0
    pixels = np.random.default_rng(5).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    Image.fromarray(pixels).resize((70, 60)).save(folder / "large.png")
    return folder


@pytest.mark.parametrize("target", HEADINGS)
def test_the_quickstart_in_every_target(target: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (exports,) = (block for block in re.findall(r"^```\n(.*?)^```$", TEXT, flags=re.M | re.S) if " --to timm" in block)
    (line,) = (line for line in exports.splitlines() if f" --to {target} " in line)
    _, *arguments = shlex.split(line)
    assert main(arguments) == 0
    card = (Path(arguments[-1]) / "README.md").read_text()
    assert "r@10" in card, "the card holds the run's figures"
    assert 'name = "resnet10t"' in card
    assert "Data fingerprint `" in card

    if target == "onnx":
        (line,) = (line for block in blocks(HEADINGS[target], "") for line in block.splitlines())
        program, *arguments = shlex.split(line)[1:]
        assert arguments[1:] == TEXTS
        block = f"import runpy\nsys.argv = {[program, *arguments]!r}\nglobals().update(runpy.run_path({program!r}))"
    else:
        (block,) = blocks(HEADINGS[target], "python")
    script = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(LIBRARIES - NEEDS[target])!r}))  # None: cannot be imported
{block}
{THEN[target]}
import numpy as np
text = np.zeros(0) if text is None else np.asarray(text)
np.savez("{target}.npz", resized=globals().get("resized", 0), image=np.asarray(image), text=text)
"""
    command = [sys.executable, "-I", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found, loaded = np.load(f"{target}.npz"), clip_train.load("runs/quickstart")
    assert np.abs(found["image"] - loaded.encode_image(Image.open("picture.png")).numpy()).max() <= 1e-5
    if target == "onnx":  # its resizing is Pillow's
        assert (found["resized"] @ loaded.encode_image(Image.open("large.png")).numpy().T).item() > 0.999
    if target == "timm":
        assert not found["text"].size
    else:
        assert np.abs(found["text"] - loaded.encode_text(TEXTS).numpy()).max() <= 1e-5


def test_averaged_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main(["export", "runs/quickstart", "--to", "timm", "--weights", "ema", "averaged"]) == 0
    there = load_timm(Path("averaged")).encode_image
    assert there is not None
    pixels = torch.randn(2, 3, 48, 48)
    raw, averaged = (clip_train.load("runs/quickstart", weights=one).encode_image(pixels) for one in ("raw", "ema"))
    with torch.no_grad():
        found = there(pixels)
    assert (found - averaged).abs().max() <= 1e-5
    assert (found - raw).abs().max() > 1e-4


def test_import_of_the_exports(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    commands = [shlex.split(line, comments=True)[1:] for line in blocks("The other way: import", "")[0].splitlines()]
    tried = [command for command in commands if command[0] == "import"]
    assert len(tried) == 2
    ours = clip_train.load("runs/quickstart")
    for _, source, run in tried:
        if not Path(source).is_dir():
            assert main(["export", "runs/quickstart", "--to", Path(source).name, source]) == 0
        assert main(["import", source, run]) == 0
        back = clip_train.load(run)
        assert back.tokenizer.fingerprint == ours.tokenizer.fingerprint
        state = back.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in ours.model.state_dict().items())
        assert json.loads((Path(run) / "vocabulary.json").read_text())
