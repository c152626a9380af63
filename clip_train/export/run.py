"""`clip-train export`: checkpoint in, directory out, proved before it is there.

A directory is written aside, loaded by the target library, compared with the model it came from, and only then renamed.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from clip_train.errors import ExportError
from clip_train.export.card import model_card
from clip_train.export.language import prove_language, refuse_target, write_language
from clip_train.export.parity import Parity, Peer, compare
from clip_train.loading import LoadedLanguageModel, LoadedModel


@dataclass(frozen=True)
class Target:
    """One library that a checkpoint can be brought to."""

    module: str
    """Of this package, with `write_NAME(loaded, folder)` and `load_NAME(folder)`; `settle_NAME(folder, place)` where a
    folder must know its place."""
    needs: tuple[str, ...]
    """Packages that must be installed."""


TARGETS = {
    "open_clip": Target("open_clip", ("open_clip", "transformers")),
    "transformers": Target("transformers", ("transformers",)),
    "sentence_transformers": Target("sentence_transformers", ("sentence_transformers", "transformers")),
    "timm": Target("timm", ("timm",)),
    "onnx": Target("onnx", ("onnx", "onnxscript", "onnxruntime", "tokenizers")),
}


def export(loaded: LoadedModel | LoadedLanguageModel, target: str, out: Path, *, source: Path) -> Parity:
    """Write the model for a target library into the new folder `out`; returns what was compared.

    Args:
        source: where the checkpoint lies, for the model card.

    Raises:
        ExportError: the folder exists, a package is missing, the target cannot express a tower, or it came out
            different there; `out` is then not there.
    """
    if isinstance(loaded, LoadedLanguageModel):
        refuse_target(target)
    missing = [name for name in TARGETS[target].needs if find_spec(name) is None]
    if missing:
        raise ExportError(f"--to {target} needs {', '.join(missing)}: pip install 'clip-train[export]'")
    with written_aside(out) as folder:
        if isinstance(loaded, LoadedLanguageModel):
            write_language(loaded, folder)
            parity = prove_language(loaded, folder)
        else:
            parity = _write_and_compare(loaded, target, folder, out)
        (folder / "README.md").write_text(model_card(loaded, target, source, parity), encoding="utf-8")
    return parity


def _write_and_compare(loaded: LoadedModel, target: str, folder: Path, out: Path) -> Parity:
    module = importlib.import_module(f"clip_train.export.{TARGETS[target].module}")
    write: Callable[[LoadedModel, Path], None] = getattr(module, f"write_{target}")
    load: Callable[[Path], Peer] = getattr(module, f"load_{target}")
    settle: Callable[[Path, Path], None] | None = getattr(module, f"settle_{target}", None)
    write(loaded, folder)
    parity = compare(loaded, load(folder))
    if settle is not None:
        settle(folder, out)
    return parity


@contextmanager
def written_aside(out: Path) -> Generator[Path]:
    """A folder that becomes `out` when all has gone well, and is gone otherwise. Raises ExportError where `out` is."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists: choose a new folder, or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
