"""In place of `clip-train train` and `probe`: writes what they write, from the recipe, in milliseconds.

Environment: STAND_IN_SECONDS (a stage's length), STAND_IN_FAILS (cells that fail), STAND_IN_LOG (a line a stage that
ran to its end), STAND_IN_EMPTY (files with nothing in them, for tests that do not look).
"""

from __future__ import annotations

import json
import os
import sys
import time
import tomllib
import zlib
from pathlib import Path

ITEMS, SEED_NOISE = 300, 0.01
if "STAND_IN_EMPTY" not in os.environ:  # importing it takes longer than all else
    import numpy as np


def main() -> int:
    command, target = sys.argv[1], Path(sys.argv[2])
    if any(f"/{name}-seed" in str(target) for name in os.environ.get("STAND_IN_FAILS", "").split(",") if name):
        print("it broke", file=sys.stderr)
        return 2
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
    if "STAND_IN_EMPTY" in os.environ:
        leave_files(command, target)
    elif command == "train":
        recipe = tomllib.loads(target.read_text())
        folder = Path(sys.argv[sys.argv.index("--run-dir") + 1])
        train(recipe, folder)
    else:
        probe(tomllib.loads((target / "cell.toml").read_text()), target / "probe")
    if "STAND_IN_LOG" in os.environ:
        with Path(os.environ["STAND_IN_LOG"]).open("a") as log:
            log.write(f"{command} {target if command == 'probe' else target.parent}\n")
    return 0


def leave_files(command: str, target: Path) -> None:
    """The outputs of a stage, with nothing in them."""
    if command == "train":
        (target.parent / "checkpoints" / "latest").mkdir(parents=True, exist_ok=True)
        (target.parent / "eval.json").write_text("{}")
    else:
        (target / "probe").mkdir(exist_ok=True)
        (target / "probe" / "text.json").write_text("{}")


def skill(recipe: dict) -> float:
    """Bidirectional towers are right more often by 0.15, nothing else matters."""
    return 0.35 + 0.15 * (recipe["text"]["attention"] == "bidirectional")


def right(recipe: dict, what: str) -> np.ndarray:
    """Items that are hard for all cells alike, and answered anew by each seed."""
    items = np.random.default_rng(zlib.crc32(what.encode())).uniform(size=ITEMS)
    seed = recipe["training"]["seed"]
    own = np.random.default_rng([seed, zlib.crc32(recipe["name"].encode())])
    level = skill(recipe) + SEED_NOISE * own.normal()
    return 0.5 * items + 0.5 * own.uniform(size=ITEMS) < level


def train(recipe: dict, folder: Path) -> None:
    steps = recipe["training"]["steps"]
    (folder / "checkpoints" / "latest").mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "loss": 5 / step, "samples_per_second": 100.0}) + "\n")
    tasks = recipe.get("evaluation", {}).get("tasks")
    if tasks and "held" in tasks:
        loss = 4 - skill(recipe) + 0.01 * np.random.default_rng(zlib.crc32(str(folder).encode())).normal()
        figures = {"loss": loss, "perplexity": np.exp(loss), "accuracy": 0.3, "targets": 1000.0, "texts": 60.0}
        (folder / "eval.json").write_text(json.dumps({f"language/held/{k}": v for k, v in figures.items()}))
    elif tasks:
        hits = right(recipe, "zeroshot")
        (folder / "eval").mkdir(exist_ok=True)
        np.savez(folder / "eval" / "style.npz", ranks=np.where(hits, 0, 7), keys=np.arange(ITEMS).astype(str))
        figures = {"top1": float(hits.mean()), "top5": float(hits.mean()), "chance": 0.01, "samples": float(ITEMS)}
        (folder / "eval.json").write_text(json.dumps({f"zeroshot/style/{k}": v for k, v in figures.items()}))


def probe(recipe: dict, out: Path) -> None:
    out.mkdir(exist_ok=True)
    hits = {name: right(recipe, name) for name in ("exp1/topic", "exp1/order")}
    labels = np.arange(ITEMS) % 2
    scores = labels * 3 * skill(recipe) + np.random.default_rng(recipe["training"]["seed"]).normal(size=ITEMS)
    above = scores[labels == 1][:, None] > scores[labels == 0][None]
    shared = {"pool": "mean", "n": ITEMS, "seconds": 0.1, "chance": 0.5}
    tasks = {name: {"metric": "accuracy", "value": float(one.mean()), **shared} for name, one in hits.items()}
    tasks["exp2/same/centred"] = {"metric": "auc", "value": float(above.mean()), **shared}
    tasks["exp2/same"] = {"metric": "auc", "value": 0.5, **shared}  # raw cosines say nothing
    arrays = {name: one.astype(np.float32) for name, one in hits.items()}
    arrays |= {"exp2/same:score": 0 * labels.astype(np.float32), "exp2/same:label": labels.astype(np.float32)}
    arrays |= {"exp2/same/centred:score": scores.astype(np.float32), "exp2/same/centred:label": labels}
    tuned = np.stack([right(recipe, "tuned"), right(recipe, "tuned again")]).astype(np.float32)  # two seeds of its own
    tasks["exp1/topic/finetuned"] = {"metric": "accuracy", "value": float(tuned.mean()), **shared}
    tasks["exp1/mood/finetuned"] = {"metric": "pearson", "value": 0.0, **shared}
    arrays |= {"exp1/topic/finetuned": tuned, "exp1/mood/finetuned:label": labels}
    arrays["exp1/mood/finetuned:score"] = np.stack([scores, scores + 3 * hits["exp1/topic"]])
    np.savez(out / "text.npz", **arrays)
    (out / "text.json").write_text(json.dumps({"encoder": recipe["name"], "tasks": tasks}))


if __name__ == "__main__":
    sys.exit(main())
