"""Figures in the form of CLIP_benchmark, for tables beside other models: `eval/clip_benchmark/TASK.json`, one CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_train.config.schema import Retrieval, Task

_CLASSIFICATION = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "per_class_mean"}
_TASKS = {
    "zeroshot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "linear_probe": "linear_probe",
    "knn": "knn",
}
_RETRIEVAL = {
    f"{theirs}_retrieval_recall@{k}": f"{ours}/r@{k}"
    for k in (1, 5, 10)
    for theirs, ours in (("image", "text_to_image"), ("text", "image_to_text"))
}


def benchmark_rows(figures: Mapping[str, float], tasks: Mapping[str, Task], model: str) -> list[dict[str, Any]]:
    """One entry a task, with the keys that `clip_benchmark build` reads.

    Each corruption at each severity is a data set of its own, `TASK/NAME/SEVERITY`, as ImageNet-C's folders are; each
    number of shots of a curve an entry with `fewshot_k`.
    """
    rows: list[dict[str, Any]] = []
    for name, task in tasks.items():
        names = _RETRIEVAL if isinstance(task, Retrieval) else _CLASSIFICATION
        rows.append(
            {
                "dataset": name,
                "model": model,
                "pretrained": "clip-train",
                "task": _TASKS[task.kind],
                "metrics": {theirs: figures[f"{task.kind}/{name}/{ours}"] for theirs, ours in names.items()},
                "language": "en",
            }
        )
        one, prefix = rows[-1], f"{task.kind}/{name}/"
        for figure, value in figures.items():
            kind, _, rest = figure.removeprefix(prefix).partition("/")
            if not figure.startswith(prefix) or kind not in ("corrupted", "shots") or rest.endswith("/sd"):
                continue
            own: dict[str, Any] = {"metrics": {"acc1": value}}
            own |= {"dataset": f"{name}/{rest}"} if kind == "corrupted" else {"fewshot_k": int(rest.partition("/")[0])}
            rows.append(one | own)
    return rows


def write_benchmark(run_dir: Path, figures: Mapping[str, float], tasks: Mapping[str, Task], model: str) -> None:
    """Write every task's JSON and `results.csv`, which holds what `clip_benchmark build` would make of them."""
    folder = run_dir / "eval" / "clip_benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    rows = benchmark_rows(figures, tasks, model)
    for row in rows:
        shots = f"-{row['fewshot_k']}shot" if "fewshot_k" in row else ""
        (folder / f"{row['dataset'].replace('/', '-')}{shots}.json").write_text(
            json.dumps(row, indent=2) + "\n", encoding="utf-8"
        )
    flat = [{**row["metrics"], **{k: v for k, v in row.items() if k != "metrics"},
             "model_fullname": f"{row['model']} {row['pretrained']}"} for row in rows]  # fmt: skip
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)
