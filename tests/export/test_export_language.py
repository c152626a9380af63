"""Language models in transformers, compared there with the run's own numbers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer

from clip_train.config.load import parse_toml
from clip_train.errors import ExportError
from clip_train.export.parity import PROBES
from clip_train.export.run import export
from clip_train.from_recipe.model import build_language_model
from clip_train.loading import LoadedLanguageModel
from tokenizer import BPETokenizer
from tokenizer.training import train_bpe

RECIPE = """
name = "words"
[data]
batch_size = 8
[data.sources.s]
shards = "none.tar"
[text]
{text}
[loss]
kind = "{loss}"
[optimizer]
kind = "adamw"
lr = 1e-3
[training]
steps = 1
"""
SIZE = "width = 32\nlayers = 2\nheads = 2\n"
CAPTIONS = ["a red fox", "two dogs, one cat & 3 birds!", "a crème brûlée"]


@cache
def vocabulary() -> BPETokenizer:
    return train_bpe([*PROBES, *CAPTIONS] * 3, 700, context_length=40)


def small(text: str, loss: str) -> LoadedLanguageModel:
    """A model whose every parameter matters."""
    size = "" if "transformers" in text else SIZE
    recipe = parse_toml(RECIPE.format(text=size + text, loss=loss), where="test")
    torch.manual_seed(4)
    model = build_language_model(recipe, vocabulary()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return LoadedLanguageModel(model, vocabulary(), recipe, 1)


def test_bert_fills_masks_there(tmp_path: Path) -> None:
    loaded = small("kind = 'bert'", "mlm")
    parity = export(loaded, "transformers", tmp_path / "out", source=tmp_path)
    assert parity.captions == len(PROBES)
    assert "pipeline_tag: fill-mask" in (tmp_path / "out/README.md").read_text()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    lengths = inputs["attention_mask"].sum(dim=1)
    at = inputs["attention_mask"].flatten().nonzero()[:, 0]
    with torch.no_grad():
        theirs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.flatten(0, 1)[at]
        ours = loaded.model(inputs["input_ids"], lengths, at)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "loss", "kind"),
    [
        ("", "clm", "CLIPTextModel"),
        ("attention = 'bidirectional'\npool = 'mean'", "mlm", "MegatronBertModel"),
        ("kind = 'bert'\nactivation = 'gelu_tanh'", "mlm", "BertModel"),
        ("kind = 't5'\npool = 'mean'", "mlm", "T5EncoderModel"),
        ("kind = 'modern'", "clm", "LlamaModel"),
    ],
)
def test_other_towers_are_encoders_there(text: str, loss: str, kind: str, tmp_path: Path) -> None:
    loaded = small(text, loss)
    export(loaded, "transformers", tmp_path / "out", source=tmp_path)
    assert f"import AutoTokenizer, {kind}" in (tmp_path / "out/README.md").read_text()
    model = getattr(transformers, kind).from_pretrained(tmp_path / "out").eval()
    ids, lengths = vocabulary().encode_batch(CAPTIONS)
    grid, counts = torch.from_numpy(vocabulary().padded(ids, lengths)).long(), torch.from_numpy(lengths).long()
    mask = torch.arange(grid.shape[1]) < counts[:, None]
    with torch.no_grad():
        theirs = model(input_ids=grid, attention_mask=mask.long()).last_hidden_state
        ours = loaded.model.text(grid, counts).tokens
    torch.testing.assert_close(theirs[mask], ours[:, : grid.shape[1]][mask], atol=1e-4, rtol=1e-4)


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exported to transformers, not to onnx"):
        export(small("", "clm"), "onnx", tmp_path / "out", source=tmp_path)
    with pytest.raises(ExportError, match="not exported to transformers"):
        other = small("kind = 'transformers'\nname = 'roberta'\n[text.arguments]\nhidden_size = 32\n"
                      "num_attention_heads = 2\nnum_hidden_layers = 1\nintermediate_size = 32\n", "mlm")  # fmt: skip
        export(other, "transformers", tmp_path / "out", source=tmp_path)
    assert not list(tmp_path.iterdir())
