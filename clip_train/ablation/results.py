"""Finished cells in memory: figures by cell and seed, and the items behind each figure, for paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from clip_train.ablation.grid import EXPERIMENTS, Cell, Grid
from clip_train.ablation.grid_file import Comparison
from clip_train.ablation.table import Row, read_rows
from clip_train.data.hashing import text_hash
from clip_train.errors import DataError
from clip_train.evaluation.comparison import Difference, Groups, Spread, Task, paired_difference, pooled_spread
from clip_train.evaluation.statistics import Floats, Kind
from clip_train.evaluation.text.tasks import things_of

NAMES = {
    "exp1": "general text (exp. 1)",
    "exp2": "vision-centric text (exp. 2)",
    "exp3/caption": "bits saved by text (exp. 3)",
    "exp3/concept": "concept drawn (exp. 3)",
    "text_to_image": "caption → picture",
    "image_to_text": "picture → caption",
}
LESS_IS_BETTER = ("loss", "bits", "perplexity")
"""Measures of which a smaller value is the better one."""
UNIT_SCALE = ("accuracy", "recall")
"""Measures whose chance is known and whose best is 1: shown as shares."""


@dataclass(frozen=True)
class Items:
    """What a figure is made of: `scores (F, N)` whose mean it is, or with `labels (N,)` the mean over F of what `kind`
    makes of both. F are the seeds of what was fine-tuned, else 1."""

    kind: Kind
    scores: Floats
    labels: Floats | None
    groups: Groups | None = None
    """`(N, 1 or 2)`: what an item is about, as `comparison.Task` has it."""


class Results:
    """All finished cells of a grid."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.rows: list[Row] = list(read_rows(grid))

    @cached_property
    def by_cell(self) -> dict[tuple[str, int], dict[str, Row]]:
        found: dict[tuple[str, int], dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault((row.cell, row.seed), {})[row.metric] = row
        return found

    @property
    def cells(self) -> list[str]:
        """Names of finished cells, in the grid's order."""
        return list(dict.fromkeys(row.cell for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        return sorted({row.seed for row in self.rows})

    @cached_property
    def metrics(self) -> list[str]:
        """Every figure that occurs, evaluations first."""
        return sorted({row.metric for row in self.rows}, key=lambda name: (name.startswith(EXPERIMENTS), name))

    @property
    def headline(self) -> list[str]:
        """The grid's headline figures that were measured."""
        named = self.grid.file.headline or self.metrics
        return [name for name in named if self.tasks(name)]

    def label(self, headline: str) -> str:
        """A figure in words."""
        mean = self.grid.file.means.get(headline)
        if mean is not None:
            return mean.title
        if headline in NAMES:
            return NAMES[headline]
        kind, *rest = headline.split("/")
        if kind == "zeroshot":
            return f"zero-shot {rest[0].replace('_', ' ')}, {rest[1].replace('top', 'top-')}"
        if kind == "retrieval":
            return f"{NAMES.get(rest[1], rest[1])} {rest[2].upper()}, {rest[0].replace('_', ' ')}"
        if kind == "language":
            return f"held-out {rest[1]}, {rest[0].replace('_', ' ')}"
        return f"{' '.join(rest).replace('_', ' ')} ({kind.replace('exp', 'exp. ')})"

    def tasks(self, headline: str) -> list[str]:
        """The figures that a headline stands for: itself; those of a mean, none unless all were measured; or the tasks
        of an experiment: `exp1` without their variants (`exp1/TASK/VARIANT`), `exp2` by centred cosines."""
        mean = self.grid.file.means.get(headline)
        if mean is not None:
            return mean.of if set(mean.of) <= set(self.metrics) else []
        if headline not in EXPERIMENTS:
            return [name for name in self.metrics if name == headline]
        of_experiment = [name for name in self.metrics if name.startswith(f"{headline}/")]
        if headline == "exp2":  # raw cosines hold a direction that all texts share, more of it in some towers
            return [name for name in of_experiment if name.endswith("/centred")]
        return [name for name in of_experiment if name.count("/") == 1]

    def values(self, cell: str, headline: str) -> Floats:
        """`(S,)`: a headline figure of a cell by seed; of an experiment, the mean of its tasks as `unit` says."""
        tasks = self.tasks(headline)
        found: list[float] = []
        for seed in self.seeds:
            rows = self.by_cell.get((cell, seed), {})
            if tasks and all(task in rows for task in tasks):
                found.append(self._value(rows, headline))
        return np.array(found)

    def _value(self, rows: Mapping[str, Row], headline: str) -> float:
        """A headline figure of one run."""
        tasks = self.tasks(headline)
        plain = tasks == [headline]
        return float(np.mean([rows[task].value if plain else above_chance(rows[task]) for task in tasks]))

    def row(self, metric: str) -> Row:
        """Some row of a figure, for what is the same in all of them."""
        return next(row for row in self.rows if row.metric == metric)

    def mean(self, cell: str, metric: str) -> float:
        """Over seeds; NaN where it was not measured."""
        values = self._over_seeds(cell, metric)
        return float(np.mean(values)) if values else float("nan")

    def with_spread(self, cell: str, metric: str) -> str:
        """`12.3 ± 0.4`: mean and standard deviation over seeds."""
        values = self._over_seeds(cell, metric)
        spread = f" ± {self.written(metric, float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
        return self.written(metric, self.mean(cell, metric)) + spread

    def _over_seeds(self, cell: str, metric: str) -> list[float]:
        return [rows[metric].value for (one, _), rows in self.by_cell.items() if one == cell and metric in rows]

    def written(self, metric: str, value: float) -> str:
        """A value of this figure as reports write it."""
        if np.isnan(value):
            return "–"
        return f"{100 * value:.1f}" if self.is_percent(metric) else f"{value:.3f}"

    def is_percent(self, headline: str) -> bool:
        """Whether a figure is shown as a share of a hundred."""
        tasks = self.tasks(headline)
        return tasks != [headline] or self.row(headline).measure in UNIT_SCALE

    def chance(self, headline: str) -> float | None:
        """What guessing gives; of an experiment, whose figure counts from there, 0."""
        return 0.0 if self.tasks(headline) != [headline] else self.row(headline).chance

    def spread(self, headline: str) -> Spread | None:
        """How the figure moves from seed to seed, over all trained cells that have every seed."""
        trained = {cell.name for cell in self.grid.runs if cell.steps}
        values = [self.values(cell, headline) for cell in self.cells if cell in trained]
        whole = [one for one in values if len(one) == len(self.seeds)]
        return pooled_spread(np.array(whole)) if whole else None

    def difference(self, comparison: Comparison, headline: str) -> Difference | None:
        """First cells less second ones, more being better; None where cells are missing, or items where there is one
        seed. Figures whose items are not kept are compared over seeds alone."""
        names = {*comparison.first, *comparison.second}
        tasks = self.tasks(headline)
        seeds = [s for s in self.seeds if all(t in self.by_cell.get((n, s), {}) for n in names for t in tasks)]
        if not tasks or not seeds:
            return None
        parts = [self._task(comparison, task, seeds, plain=tasks == [headline]) for task in tasks]
        known = [one for one in parts if one is not None]
        if len(known) == len(parts):
            return paired_difference(known)
        return self._over_seeds_alone(comparison, headline, seeds) if len(seeds) > 1 else None

    def _over_seeds_alone(self, comparison: Comparison, headline: str, seeds: Sequence[int]) -> Difference:
        less = self.tasks(headline) == [headline] and less_is_better(self.row(headline))
        first, second = (
            np.mean([[self._value(self.by_cell[name, seed], headline) for name in side] for seed in seeds], axis=1)
            for side in (comparison.first, comparison.second)
        )
        return Difference(second - first if less else first - second, item_variance=0.0, counted_twice=0.0, items=0)

    def _task(self, comparison: Comparison, task: str, seeds: Sequence[int], *, plain: bool) -> Task | None:
        names = dict.fromkeys([*comparison.first, *comparison.second])
        found = {(name, seed): self._items(name, seed, task) for name in names for seed in seeds}
        known = {key: one for key, one in found.items() if one is not None}
        if len(known) < len(found):
            return None
        some = next(iter(known.values()))
        for (name, seed), one in known.items():
            if one.scores.shape != some.scores.shape or not _same(one.labels, some.labels):
                raise DataError(f"{name}-seed{seed} was asked other items of {task} than the rest: probe it again")
        first, second = (
            np.array([np.concatenate([known[name, seed].scores for name in side]) for seed in seeds])
            for side in (comparison.first, comparison.second)
        )
        row = self.row(task)
        factor = (-1.0 if less_is_better(row) else 1.0) if plain else _factor(row)
        return Task(first, second, some.labels, some.kind, some.groups, factor)

    def _items(self, name: str, seed: int, task: str) -> Items | None:
        cell = next((one for one in self.grid.cells if (one.name, one.seed) == (name, seed)), None)
        return None if cell is None else read_items(self.grid, cell, task, self.by_cell[name, seed][task].measure)


def read_items(grid: Grid, cell: Cell, task: str, measure: str) -> Items | None:
    """The items behind a figure of a cell; None where they were not kept."""
    folder = grid.folder(cell)
    if task.startswith(EXPERIMENTS):
        arrays = [_load(folder / "probe" / f"{suite}.npz") for suite in grid.file.probes]
        for probe in arrays:
            if task in probe:
                scores = np.atleast_2d(_floats(probe[task]))
                return Items("mean", scores, None, things_of(task, scores.shape[1]))
            if f"{task}:score" in probe:
                scores, labels = np.atleast_2d(_floats(probe[f"{task}:score"])), _floats(probe[f"{task}:label"])
                return Items(kind_of(measure), scores, labels, things_of(task, len(labels)))
        return None
    _, name, *way, short = task.split("/")
    arrays = _load(folder / "eval" / f"{name}.npz")
    ranks = arrays.get(f"{way[0]}_ranks" if way else "ranks")
    cutoff = {"top1": 1, "top5": 5}.get(short) or (int(short[2:]) if short.startswith("r@") else None)
    if ranks is None or cutoff is None:
        return None
    paired = (arrays["pair_image"], arrays["pair_caption"]) if way else None
    groups = np.arange(len(ranks)) if paired is None else groups_of_pairs(*paired, way[0])
    salt = text_hash(name) >> 1  # data sets have nothing to do with each other, figures of one have
    return Items("mean", (ranks < cutoff).astype(np.float64)[None], None, (salt + groups)[:, None])


def groups_of_pairs(images: Groups, captions: Groups, way: str) -> Groups:
    """Pictures and captions that pairs connect are one group: captions of one picture are no independent items."""
    count = int(images.max()) + 1
    nodes = count + int(captions.max()) + 1
    graph = coo_matrix((np.ones(len(images)), (images, count + captions)), shape=(nodes, nodes))
    groups = connected_components(graph, directed=False)[1].astype(np.int64)
    return groups[:count] if way.startswith("image") else groups[count:]


def _same(one: Floats | None, other: Floats | None) -> bool:
    return one is other is None or (one is not None and other is not None and np.array_equal(one, other))


def kind_of(measure: str) -> Kind:
    """How scores and labels make a figure of this measure."""
    lowered = measure.lower()
    return "auc" if "auc" in lowered else "spearman" if "spearman" in lowered else "pearson"


def less_is_better(row: Row) -> bool:
    return row.measure in LESS_IS_BETTER


def above_chance(row: Row) -> float:
    """A figure between 0 (chance) and 1 (perfect), so that tasks can be averaged; correlations are there already."""
    if less_is_better(row):
        return -row.value if row.chance is None else row.chance - row.value
    return row.value * _factor(row) - (row.chance or 0.0) * _factor(row)


def _factor(row: Row) -> float:
    if less_is_better(row):
        return -1.0
    return 1.0 / (1.0 - row.chance) if row.chance is not None and row.chance < 1 else 1.0


def _load(path: Path) -> dict[str, Any]:
    return _load_once(path, path.stat().st_mtime_ns) if path.exists() else {}


@lru_cache(maxsize=128)  # every comparison asks for the same few files
def _load_once(path: Path, changed: int) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if arrays[name].dtype.kind in "biuf"}


def _floats(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float64)
