"""The model card of an export: what it is, how to load it, where it came from, what it scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from clip_train import __version__
from clip_train.config.load import dump_recipe
from clip_train.export.language import class_of, is_masked_lm
from clip_train.export.parity import Parity
from clip_train.loading import LoadedLanguageModel, LoadedModel

USAGE = {
    "open_clip": """import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIRECTORY")
tokenizer = open_clip.get_tokenizer("local-dir:DIRECTORY")
model.eval()""",
    "transformers": """from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
model = AutoModel.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
processor = AutoImageProcessor.from_pretrained("DIRECTORY")""",
    "sentence_transformers": """from sentence_transformers import SentenceTransformer
model = SentenceTransformer("DIRECTORY")
vectors = model.encode(["a red fox"])      # captions or PIL pictures, unit vectors""",
    "timm": """import timm
model = timm.create_model("local-dir:DIRECTORY", pretrained=True)                      # embeddings
backbone = timm.create_model("local-dir:DIRECTORY", pretrained=True, num_classes=0)    # pooled features""",
    "onnx": """import onnxruntime
image = onnxruntime.InferenceSession("DIRECTORY/image.onnx")   # pixel_values (B, 3, S, S), normalised
text = onnxruntime.InferenceSession("DIRECTORY/text.onnx")     # input_ids (B, L) int64; example.py shows both""",
}

LANGUAGE_USAGE = """from transformers import AutoTokenizer, CLASS
model = CLASS.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")"""


def model_card(loaded: LoadedModel | LoadedLanguageModel, target: str, source: Path, parity: Parity) -> str:
    """Markdown with the front matter that model hubs read."""
    recipe, tokenizer = loaded.recipe, loaded.tokenizer
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    kind = " ".join([f"`{recipe.text.kind}`", *filter(None, [getattr(recipe.text, "attention", None)])])
    lines = [
        "---",
        f"library_name: {target if target != 'onnx' else 'onnxruntime'}",
        *_tags(loaded),
        "---",
        f"# {recipe.name}",
        "",
        recipe.description or f"A {'language' if recipe.is_language else 'contrastive image-text'} model.",
        "",
        f"{_towers(loaded, kind)}, {parameters:,} parameters, step {loaded.step:,}. Vocabulary of "
        f"{tokenizer.vocab_size:,} ids, {tokenizer.context_length} tokens a caption, fingerprint "
        f"`{tokenizer.fingerprint[:16]}`.",
        "",
        f"Exported by clip-train {__version__} for {target}, where it was loaded and compared: {parity}.",
        "",
        "## Use",
        "```python",
        _usage(loaded, target),
        "```",
        *_figures(source),
        "## Recipe",
        *_data(source),
        "```toml",
        dump_recipe(recipe).strip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _usage(loaded: LoadedModel | LoadedLanguageModel, target: str) -> str:
    if isinstance(loaded, LoadedLanguageModel):
        return LANGUAGE_USAGE.replace("CLASS", class_of(loaded).__name__)
    return USAGE[target]


def _tags(loaded: LoadedModel | LoadedLanguageModel) -> list[str]:
    if isinstance(loaded, LoadedModel):
        return ["pipeline_tag: zero-shot-image-classification", "tags: [clip, clip-train]"]
    pipeline = "fill-mask" if is_masked_lm(loaded) else "feature-extraction"
    return [f"pipeline_tag: {pipeline}", "tags: [clip-train]"]


def _towers(loaded: LoadedModel | LoadedLanguageModel, text: str) -> str:
    recipe = loaded.recipe
    if isinstance(loaded, LoadedLanguageModel):
        return f"Text tower {text}, trained by `{recipe.loss.kind}`, {loaded.model.text.width} dimensions"
    return (
        f"Image tower `{recipe.vision.kind}` at {loaded.preprocess.size} px, text tower {text} with pool "
        f"`{recipe.text.pool}`, {recipe.joint.embed_dim} dimensions"
    )


def _figures(source: Path) -> list[str]:
    """The run's last evaluation, where there is one."""
    for folder in (source, source.parent.parent):
        path = folder / "eval.json"
        if path.is_file():
            figures = cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
            numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
            return ["", "## Figures", *(f"- {name}: {value:.6g}" for name, value in numbers.items()), ""]
    return [""]


def _data(source: Path) -> list[str]:
    states = [source / "state.json", source / "checkpoints" / "latest" / "state.json"]
    for path in states:
        if path.is_file():
            state = cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
            return [f"Data fingerprint `{state['data_fingerprint']}`, {state['samples']:,} samples seen."]
    return []
