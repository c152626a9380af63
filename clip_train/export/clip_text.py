"""The text tower that CLIP has, which targets with one text tower express."""

from __future__ import annotations

from clip_train.config.schema import Recipe, TextTransformer
from clip_train.errors import ExportError


def clips_text(recipe: Recipe, target: str) -> TextTransformer:
    """The recipe's text tower, where it is CLIP's own.

    Raises:
        ExportError: it is of another kind, or differs in what `target` cannot express.
    """
    text = recipe.text
    if not isinstance(text, TextTransformer):
        raise ExportError(
            f"{target}'s CLIP has CLIP's own text tower; this one is of kind {text.kind!r}. Export it to onnx"
        )
    if text.attention != "causal" or text.pool != "eot":
        raise ExportError(
            f"{target}'s CLIP text tower is causal and pools at EOT; this one is {text.attention} with pool "
            f"{text.pool!r}. Export it to onnx"
        )
    if text.norm_eps != 1e-5 or text.projection_bias or text.activation == "gelu_tanh":
        raise ExportError(
            f"{target}'s CLIP text tower has norm_eps = 1e-5, no projection_bias, and activation gelu or quick_gelu; "
            f"this one {text.norm_eps}, {text.projection_bias} and {text.activation}. Export it to onnx"
        )
    return text
