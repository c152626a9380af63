"""`GRID.toml`: what is varied, how often and on what budget.

    name = "text-tower"
    description = "Why a causal text tower?"    # the report's first lines
    recipe = "base.toml"                        # what all cells share; beside the grid, or the name of a shipped one
    seeds = [0, 1, 2]
    generator = "small"                         # size of the picture generator of experiment 3, trained once
    probes = ["text"]                           # suites of `clip-train probe` that every cell goes through
    headline = ["zeroshot/unseen_style/top1", "exp1", "held-out"]     # figures that are tested
    exclude = [{ mask = "causal", pool = "cls" }]

    [means.held-out]                            # a figure of its own: the mean over tasks, 0 chance and 100 perfect
    title = "same picture, captions held out"   # (`exp1` is that over all its tasks, `exp2` over all /centred ones)
    of = ["exp2/same_picture_clipart/centred"]

    [probe]                                     # options of `clip-train probe`, the same for all cells
    tasks = ["exp1", "exp2/keywords"]           # of experiments 1 and 2; all without it
    device = "cuda"
    finetune = true                             # … with epochs, lr and seeds
    sentiment = "vader"
    glue = "dir/glue:cola,stsb"                 # … with glue_limit

    [vocabulary]                                # learned once, before the first cell; without it the recipe's holds
    captions = "embedded:pictograms/train-*.tar"
    size = 8192

    [axes.mask]                                 # every axis: named levels, each a list of overrides
    causal = ["text.attention=causal"]
    bidirectional = ["text.attention=bidirectional"]

    [axes.pool]
    eot = ["text.pool=eot"]
    cls = ["text.pool=cls"]

    [arms.mlm]                                  # beside the product
    levels = { mask = "bidirectional", pool = "cls" }     # overrides of axes that it shares
    set = ["loss.kind=mlm", "image=none", "model=none", "evaluation.tasks=none"]

    [arms.mlm-init]
    levels = { mask = "bidirectional", pool = "cls" }
    after = "mlm"                               # runs behind the arm `mlm` of its seed, whose folder is {previous}
    set = ["training.init_text={previous}"]

    [comparisons.mask]                          # differences that are tested: cells first - cells second
    question = "Does a token gain from what follows it?"
    first = ["bidirectional-eot"]
    second = ["causal-eot"]
    expect = { exp1 = "first" }                 # what is known from elsewhere, to be reproduced or refuted
    control = ["learned"]                       # … where one of these comparisons shows that anything was learned

    [budgets.small]
    set = ["training.steps=60"]                 # over the axes, below what an arm sets
    seeds = [0]
    generator = "small"                         # in place of the grid's
    cells = ["causal-*", "mlm"]                 # of all cells; what they come after is added

A cell of the product is called by its levels, `causal-eot`; an arm by its own name.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from clip_train.config.section import Section
from clip_train.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
PREVIOUS = "{previous}"


class Probe(Section):
    """Options of `clip-train probe`, with its defaults. Paths are as on its command line."""

    tasks: list[str] = []
    """Of experiments 1 and 2, all where none is named; experiment 3 is what `generator` says."""
    device: Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$")] = "cpu"
    finetune: bool = False
    epochs: PositiveInt = 3
    lr: PositiveFloat = 2e-5
    seeds: PositiveInt = 3
    sentiment: str | None = None
    glue: str | None = None
    glue_limit: PositiveInt = 10_000

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        for key, of in (("epochs", "finetune"), ("lr", "finetune"), ("seeds", "finetune"), ("glue_limit", "glue")):
            if key in self.model_fields_set and not getattr(self, of):
                raise ValueError(f"{key} does nothing without {of}: give both or none")
        if "exp3" in self.tasks:
            raise ValueError("tasks: experiment 3 runs where the grid has a `generator`: leave it out here")
        return self


class Vocabulary(Section):
    """Learned from captions before the first cell, the same for all."""

    captions: str | list[str]
    """Shards or caption files."""
    size: PositiveInt
    """Ids in all."""


class Arm(Section):
    """A cell outside the product of the axes."""

    levels: dict[str, str] = {}
    """Levels of axes whose overrides it takes."""
    set: list[str] = []
    """Overrides of its own, over everything else."""
    after: str | None = None
    """The cell that runs before it; `{previous}` in `set` is the folder of its run of the same seed."""


class Mean(Section):
    """A headline figure that is a mean over tasks, each from 0 (chance) to 1 (perfect)."""

    title: str
    of: Annotated[list[str], Field(min_length=1)]
    """Figures as in the table."""


class Comparison(Section):
    """A difference that is tested: the mean over the cells `first` less that over `second`, in pairs."""

    question: str
    first: Annotated[list[str], Field(min_length=1)]
    second: Annotated[list[str], Field(min_length=1)]
    expect: dict[str, Literal["first", "second"]] = {}
    """For headline figures: which side is ahead as far as is known."""
    control: list[str] = []
    """Comparisons of trained cells with untrained ones. Where none of them is told from zero on a figure, what is
    expected of it cannot be tested."""


class Budget(Section):
    """How much of the grid is run, and how long."""

    set: list[str] = []
    """Overrides for every cell, below an arm's own."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    generator: Literal["full", "small"] | None = None
    """In place of the grid's."""
    cells: Annotated[list[str], Field(min_length=1)] | None = None
    """Names or patterns (`causal-*`); all where it is not given."""


class GridFile(Section):
    """A grid as it is written."""

    name: Name
    description: str = ""
    recipe: str
    """A file beside the grid, or the name of a shipped recipe."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    probes: list[Literal["text"]] = []
    """Suites of `clip-train probe` for every cell."""
    probe: Probe = Probe()
    generator: Literal["full", "small"] | None = None
    """Size of the picture generator for experiment 3, trained once before the first cell; none leaves it out."""
    headline: list[str] = []
    """Figures that are tested, best few: names as in the table, of a mean, or that over an experiment: `exp1` of all
    its tasks, `exp2` of all its centred cosines."""
    means: dict[Name, Mean] = {}
    vocabulary: Vocabulary | None = None
    axes: dict[Name, dict[Name, list[str]]] = {}
    exclude: list[dict[str, str]] = []
    """Combinations of levels that are left out."""
    arms: dict[Name, Arm] = {}
    comparisons: dict[Name, Comparison] = {}
    budgets: dict[Name, Budget] = {}


def read_grid_file(path: Path) -> GridFile:
    """A grid as it is written. Raises ConfigError for no such file, broken TOML, and unknown or missing keys."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no grid {path}: give a TOML file, as configs/ablations/text-tower.toml") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        return GridFile.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_explain(problem) for problem in error.errors())) from None


def nearest(name: str, valid: Iterable[str], what: str = "") -> str:
    """For messages: the names nearest to one that is unknown, else all."""
    names = list(valid)
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if found:
        return f" Did you mean {' or '.join(found)}?"
    return f" {what or 'There are'}: {', '.join(names) or 'none'}."


def _explain(problem: object) -> str:
    assert isinstance(problem, dict)
    loc = [str(part) for part in problem["loc"]]
    key = ".".join(loc)
    if problem["type"] != "extra_forbidden":
        return f"missing key {key!r}" if problem["type"] == "missing" else f"{key!r}: {problem['msg']}"
    tables: dict[str, type[BaseModel]] = {
        "arms": Arm, "budgets": Budget, "comparisons": Comparison, "means": Mean, "probe": Probe,
        "vocabulary": Vocabulary,
    }  # fmt: skip
    fields = (tables[loc[0]] if len(loc) > 1 and loc[0] in tables else GridFile).model_fields
    return f"unknown key {key!r}.{nearest(loc[-1], fields, 'Keys')}"
