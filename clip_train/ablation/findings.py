"""From results to tested differences, and to sentences about what they show and what they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from clip_train.ablation.grid_file import Comparison
from clip_train.ablation.results import Results
from clip_train.evaluation.comparison import interval
from clip_train.evaluation.statistics import Interval, holm

ALPHA = 0.05


@dataclass(frozen=True)
class Finding:
    """One comparison on one headline figure, more being better."""

    comparison: Comparison
    headline: str
    label: str
    """The headline in words."""
    interval: Interval
    p_holm: float
    """Corrected for all findings of the grid."""
    seeds: int
    """Both sides have; with one, the interval is over items alone."""
    items: int
    """Things that are drawn, of the task that has fewest; 0 where none are kept: the interval is over seeds alone."""
    control: Literal["passed", "failed", "not run"] = "passed"
    """Whether a comparison with untrained cells shows that something was learned, without which nothing can be
    expected; passed where none is asked for."""

    @property
    def sure(self) -> bool:
        return self.p_holm < ALPHA

    @property
    def verdict(self) -> str:
        """Beside what was expected (nothing where nothing was): reproduced, refuted, undecided, or why that cannot be
        told."""
        expected = self.comparison.expect.get(self.headline)
        if expected is None:
            return ""
        if self.control != "passed":
            return "not testable" if self.control == "failed" else "control not run"
        if not self.sure:
            return "undecided"
        return "reproduced" if (self.interval.estimate > 0) == (expected == "first") else "refuted"


def find(results: Results) -> list[Finding]:
    """Every comparison on every headline figure that has its cells, Holm-corrected as one family."""
    comparisons, by_headline = results.grid.file.comparisons, results.headline
    raw: list[Finding] = []
    for headline in by_headline:  # outside: comparisons on the same items share their draws
        spread = results.spread(headline)
        for comparison in comparisons.values():
            difference = results.difference(comparison, headline)
            if difference is not None:
                one = interval(difference, spread)
                seeds = len(difference.by_seed)
                label = results.label(headline)
                raw.append(Finding(comparison, headline, label, one, one.p, seeds, difference.items))
    corrected = holm([one.interval.p for one in raw])
    found = [replace(one, p_holm=p) for one, p in zip(raw, corrected, strict=True)]
    found = [replace(one, control=_control(one, comparisons, found)) for one in found]
    order = list(comparisons.values())
    return sorted(found, key=lambda one: (order.index(one.comparison), by_headline.index(one.headline)))


def _control(
    one: Finding, comparisons: Mapping[str, Comparison], found: Sequence[Finding]
) -> Literal["passed", "failed", "not run"]:
    wanted = [comparisons[name] for name in one.comparison.control]
    run = [other for other in found if other.comparison in wanted and other.headline == one.headline]
    if not wanted or any(other.sure and other.interval.estimate > 0 for other in run):
        return "passed"
    return "failed" if len(run) == len(wanted) else "not run"


def untested(results: Results, found: Sequence[Finding]) -> list[str]:
    """Comparisons on no figure of which there is a finding: cells of theirs are missing."""
    tested = [one.comparison for one in found]
    return [name for name, one in results.grid.file.comparisons.items() if one not in tested]


def claims(findings: Sequence[Finding]) -> tuple[list[str], list[str]]:
    """Sentences: what was shown, and what was not."""
    shown: list[str] = []
    open_: dict[str, list[str]] = {}
    for one in findings:
        name = f"{one.label}{' (one seed)' * (one.seeds == 1)}"
        if one.sure:
            tail = {
                "reproduced": ", as is known from elsewhere",
                "refuted": ", against what is known from elsewhere",
            }.get(one.verdict, "")
            shown.append(f"{_ahead(one)} ahead by {_size(one)} on {name} (Holm p {p_value(one.p_holm)}){tail}.")
        else:
            tail = {
                "undecided": " (neither reproduces nor refutes what is known)",
                "not testable": " (what is known cannot be tested: trained towers are not told from untrained)",
                "control not run": " (what is known cannot be tested: nothing says that anything was learned)",
            }.get(one.verdict, "")
            open_.setdefault(sides(one.comparison), []).append(f"{name} {difference(one.interval)}{tail}")
    return shown, [f"{which}: {'; '.join(found)}." for which, found in open_.items()]


def sides(comparison: Comparison) -> str:
    """`causal-eot and 3 more − bidirectional-eot and 3 more`."""
    return f"{side(comparison.first)} − {side(comparison.second)}"


def side(names: Sequence[str]) -> str:
    """The cells of one side; those of a product by what they have in common."""
    if len(names) == 1:
        return names[0]
    parts = [name.split("-") for name in names]
    if len({len(one) for one in parts}) == 1:
        pattern = [words[0] if len(set(words)) == 1 else "*" for words in zip(*parts, strict=True)]
        if set(pattern) != {"*"}:
            return f"{'-'.join(pattern)} (mean of {len(names)})"
    return f"mean of {', '.join(names)}"


def difference(one: Interval) -> str:
    """`+1.2 [0.3, 2.1]`, in hundredths."""
    return f"{100 * one.estimate:+.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def _ahead(one: Finding) -> str:
    first, second = side(one.comparison.first), side(one.comparison.second)
    if one.interval.estimate < 0:
        first, second = second, first
    return f"{first} against {second}:"


def _size(one: Finding) -> str:
    found = one.interval
    low, high = sorted(100 * abs(bound) for bound in (found.low, found.high))
    return f"{100 * abs(found.estimate):.1f} [{low:.1f}, {high:.1f}]"
