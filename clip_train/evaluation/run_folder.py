"""What a run left behind, read for its report. Parts that are missing or damaged become notes, not errors."""

from __future__ import annotations

import json
import math
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from clip_train.data.cache import Cache, make_cache
from clip_train.errors import UserError

Floats = npt.NDArray[np.float64]
Rows = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Run:
    """A run folder in memory."""

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    curves: dict[str, tuple[Floats, Floats]]
    """Steps and values of every number in `metrics.jsonl`."""
    figures: dict[str, float]
    """`eval.json`."""
    history: dict[str, tuple[Floats, Floats]]
    """Steps and values of every figure in `evals.jsonl`."""
    rows: dict[str, Rows]
    """`eval/TASK.npz` by task."""
    environment: dict[str, str]
    notes: list[str] = field(default_factory=list[str])

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", self.folder.name))

    @property
    def cache(self) -> Cache:
        """Where the run kept shards from elsewhere."""
        data = self.recipe.get("data", {})
        folder, gib = (data.get(name) if isinstance(data, dict) else None for name in ("cache_dir", "cache_gib"))
        return make_cache(folder if isinstance(folder, str) else None, gib if _is_number(gib) else None)

    def tasks(self, kind: str) -> dict[str, dict[str, float]]:
        """Figures of each task of a kind, by short name: `{"unseen_style": {"top1": 0.53, …}}`."""
        found: dict[str, dict[str, float]] = {}
        for name, value in self.figures.items():
            head, _, rest = name.partition("/")
            task, _, short = rest.partition("/")
            if head == kind and short:
                found.setdefault(task, {})[short] = value
        return found


def read_run(run_dir: Path) -> Run:
    """Read a run folder, or the one that a checkpoint (`RUN/checkpoints/step_N`) belongs to.

    Raises UserError for a folder that is no run.
    """
    folder = run_dir
    if not folder.is_dir():
        raise UserError(f"{run_dir}: there is no such folder; give the folder of a run, as runs/quickstart")
    if (folder / "state.json").is_file() and folder.resolve().parent.name == "checkpoints":
        folder = folder.resolve().parents[1]
    if not any((folder / name).exists() for name in ("recipe.toml", "metrics.jsonl", "eval.json")):
        raise UserError(
            f"{run_dir}: is not the folder of a run: it holds none of recipe.toml, metrics.jsonl, eval.json. "
            "`clip-train train RECIPE` makes one under runs/"
        )
    notes: list[str] = []
    text, recipe = _read_recipe(folder / "recipe.toml", notes)
    curves = _series(_read_lines(folder / "metrics.jsonl", notes))
    history_file = folder / "evals.jsonl"
    history = _series(_read_lines(history_file, notes)) if history_file.exists() else {}
    figures = _read_figures(folder / "eval.json", notes)
    rows: dict[str, Rows] = {}
    for path in sorted((folder / "eval").glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                rows[path.stem] = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            notes.append(f"eval/{path.name} cannot be read ({error}); its pictures are left out.")
    return Run(folder, text, recipe, curves, figures, history, rows, _read_environment(folder), notes)


def _read_recipe(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except FileNotFoundError:
        notes.append("There is no recipe.toml, so what was trained on is not shown.")
    except (OSError, ValueError) as error:
        notes.append(f"recipe.toml cannot be read ({error}).")
    return "", {}


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    broken = 0
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                broken += bool(line.strip())
                continue
            if isinstance(value, dict):
                lines.append(cast("dict[str, Any]", value))
    except FileNotFoundError:
        notes.append(f"There is no {path.name}, so there are no curves.")
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error}).")
    if broken:
        notes.append(f"{broken} line(s) of {path.name} are not JSON and were left out (a run that was killed?).")
    return lines


def _series(lines: list[dict[str, Any]]) -> dict[str, tuple[Floats, Floats]]:
    by_step: dict[float, dict[str, Any]] = {}
    for line in lines:
        if _is_number(line.get("step")):
            # A resumed run repeats the steps after its checkpoint: the last line of a step is what counts.
            by_step.setdefault(float(line["step"]), {}).update(line)
    found: dict[str, tuple[list[float], list[float]]] = {}
    for step in sorted(by_step):
        for name, value in _flat(by_step[step]):
            if name != "step" and _is_number(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in found.items()}


def _flat(line: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A line of metrics, its figures by source as `sources/NAME/loss`."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", below) for inner, below in _flat(cast("dict[str, Any]", value)))
        else:
            yield name, value


def _read_figures(path: Path, notes: list[str]) -> dict[str, float]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in values.items() if _is_number(value)}
    except FileNotFoundError:
        notes.append("There is no eval.json: the run was not evaluated. `clip-train eval RUN` does it.")
    except (OSError, ValueError, AttributeError) as error:
        notes.append(f"eval.json cannot be read ({error}).")
    return {}


def _read_environment(folder: Path) -> dict[str, str]:
    try:
        values = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in values.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def where(task: str) -> str:
    """A task in a sentence: on what the model was right."""
    # The embedded data's held-out style has a name of its own; any other task is called what it is called.
    return "in a hand it never saw" if task == "unseen_style" else f"of {words(task)}"


def words(name: str) -> str:
    """A task's name as words."""
    return name.replace("_", " ").replace("-", " ")
