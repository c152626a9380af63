"""From results to tested differences, and to sentences about what they show and what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clip_train.ablation.grid_file import Comparison
from clip_train.ablation.results import Results
from clip_train.evaluation.comparison import interval
from clip_train.evaluation.statistics import Interval, holm

ALPHA = 0.05
NAMES = {
    "exp1": "general text (exp. 1)",
    "exp2": "vision-centric text (exp. 2)",
    "exp3": "text to image (exp. 3)",
    "text_to_image": "caption → picture",
    "image_to_text": "picture → caption",
}


@dataclass(frozen=True)
class Finding:
    """One comparison on one headline figure, more being better."""

    comparison: Comparison
    headline: str
    interval: Interval
    p_holm: float
    """Corrected for all findings of the grid."""
    seeds: int

    @property
    def sure(self) -> bool:
        return self.p_holm < ALPHA

    @property
    def verdict(self) -> str:
        """Beside what was expected: reproduced, refuted, undecided; nothing where nothing was."""
        expected = self.comparison.expect.get(self.headline)
        if expected is None:
            return ""
        if not self.sure:
            return "undecided"
        return "reproduced" if (self.interval.estimate > 0) == (expected == "first") else "refuted"


def find(results: Results) -> list[Finding]:
    """Every comparison on every headline figure that has its cells, Holm-corrected as one family."""
    raw: list[tuple[Comparison, str, Interval, int]] = []
    by_headline = results.headline
    for headline in by_headline:  # outside: comparisons on the same items share their draws
        for comparison in results.grid.file.comparisons.values():
            difference = results.difference(comparison, headline)
            if difference is not None:
                raw.append((comparison, headline, interval(difference), len(difference.by_seed)))
    corrected = holm([one.p for _, _, one, _ in raw])
    found = [Finding(c, h, one, p, seeds) for (c, h, one, seeds), p in zip(raw, corrected, strict=True)]
    order = list(results.grid.file.comparisons.values())
    return sorted(found, key=lambda one: (order.index(one.comparison), by_headline.index(one.headline)))


def single(results: Results, comparison: Comparison) -> list[tuple[str, str, Interval]]:
    """Each pair of a comparison's cells on each headline figure, not corrected: (pair, headline, interval)."""
    found: list[tuple[str, str, Interval]] = []
    for first, second in zip(comparison.first, comparison.second, strict=True):
        pair = comparison.model_copy(update={"first": [first], "second": [second]})
        for headline in results.headline:
            difference = results.difference(pair, headline)
            if difference is not None:
                found.append((f"{first} − {second}", headline, interval(difference)))
    return found


def claims(findings: Sequence[Finding]) -> tuple[list[str], list[str]]:
    """Sentences: what was shown, and what was not."""
    shown: list[str] = []
    open_: dict[str, list[str]] = {}
    for one in findings:
        name = label(one.headline)
        if one.sure:
            tail = {
                "reproduced": ", as is known from elsewhere",
                "refuted": ", against what is known from elsewhere",
            }.get(one.verdict, "")
            shown.append(f"{_ahead(one)} ahead by {_size(one)} on {name} (Holm p {p_value(one.p_holm)}){tail}.")
        else:
            tail = " (neither reproduces nor refutes what is known)" if one.verdict else ""
            open_.setdefault(sides(one.comparison), []).append(f"{name} {difference(one.interval)}{tail}")
    return shown, [f"{which}: {'; '.join(found)}." for which, found in open_.items()]


def label(headline: str) -> str:
    """A figure in words."""
    if headline in NAMES:
        return NAMES[headline]
    kind, *rest = headline.split("/")
    if kind == "zeroshot":
        return f"zero-shot {rest[0].replace('_', ' ')}, {rest[1].replace('top', 'top-')}"
    if kind == "retrieval":
        return f"{NAMES.get(rest[1], rest[1])} {rest[2].upper()}, {rest[0].replace('_', ' ')}"
    return f"{' '.join(rest).replace('_', ' ')} ({kind.replace('exp', 'exp. ')})"


def short(headline: str) -> str:
    """A figure in few words, for charts."""
    return label(headline).replace(", openclipart", "").replace(" unseen style", "")


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
