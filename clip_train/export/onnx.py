"""Export to ONNX: `image.onnx`, `text.onnx`, the tokenizer, and an example that needs neither torch nor this project.

Every tower of ours can be exported: it is traced, so nothing need exist in another library. Both graphs take any batch,
the text graph any length up to the cap; outputs are unit vectors, fp32.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_train.export.parity import Peer
from clip_train.loading import LoadedModel
from clip_train.models.text_tower import TextTower
from clip_train.models.two_tower import TwoTower

EXAMPLE = Path(__file__).with_name("onnx_example.py")


class _Image(nn.Module):
    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)


class _Text(nn.Module):
    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)


def write_onnx(loaded: LoadedModel, out: Path) -> None:
    """Write both graphs, `preprocess.json`, `tokenizer.json` and `example.py` into an existing folder."""
    model = copy.deepcopy(loaded.model).cpu().float().eval()
    assert isinstance(model.text, TextTower)
    model.text.packed = False  # a graph's shapes cannot follow lengths
    size, tokenizer = loaded.preprocess.size, loaded.tokenizer
    _trace(_Image(model), torch.zeros(2, 3, size, size), "pixel_values", {0: "batch"}, out / "image.onnx")
    ids = torch.full((2, 8), tokenizer.pad)
    ids[:, 0], ids[:, 5] = tokenizer.sot, tokenizer.eot
    _trace(_Text(model), ids, "input_ids", {0: "batch", 1: "length"}, out / "text.onnx")
    look = loaded.preprocess
    view = asdict(look)
    (out / "preprocess.json").write_text(json.dumps(view, indent=2) + "\n", encoding="utf-8")
    (out / "example.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer.to_transformers(out)


def _trace(module: nn.Module, example: Tensor, name: str, dynamic: dict[int, str], path: Path) -> None:
    shapes = {name: dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            module.eval(),
            (example,),
            path,
            input_names=[name],
            output_names=["embeddings"],
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def load_onnx(out: Path) -> Peer:
    """The graphs in ONNX Runtime and the tokenizer in `tokenizers`, as the example uses them."""
    import onnxruntime
    from tokenizers import Tokenizer

    from tokenizer.cleaning import clean

    image: Any = onnxruntime.InferenceSession(out / "image.onnx", providers=["CPUExecutionProvider"])
    text: Any = onnxruntime.InferenceSession(out / "text.onnx", providers=["CPUExecutionProvider"])
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    encoder: Any = Tokenizer.from_file(str(out / "tokenizer.json"))
    encoder.enable_truncation(config["model_max_length"])
    pad = encoder.token_to_id(config["pad_token"])

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        return [encoder.encode(clean(caption)).ids for caption in captions]

    def encode_image(images: Tensor) -> Tensor:
        return torch.from_numpy(image.run(None, {"pixel_values": images.numpy()})[0])

    def encode_text(captions: Sequence[str]) -> Tensor:
        rows, found = tokenize(captions), list[Tensor]()
        for first in range(0, len(rows), 4):  # batches of several lengths, the last one smaller
            part = rows[first : first + 4]
            ids = np.full((len(part), max(map(len, part))), pad, dtype=np.int64)
            for row, own in zip(ids, part, strict=True):
                row[: len(own)] = own
            found.append(torch.from_numpy(text.run(None, {"input_ids": ids})[0]))
        return torch.cat(found)

    return Peer(encode_image, encode_text, tokenize)
