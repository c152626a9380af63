"""The report's pictures: what the model calls them, what it finds, what it confuses, what it was trained on.

Each section comes as HTML and, for talks, as a PNG put into `images`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from clip_train.evaluation import gallery, page, plots
from clip_train.evaluation.gallery import Album, Rows
from clip_train.evaluation.page import text
from clip_train.evaluation.plots import LIGHT, Tile, percent
from clip_train.evaluation.run_folder import Run, where, words

Item = TypeVar("Item")

SHOWN_NAMED = 12
SHOWN_SEARCHES = 8
SHOWN_CONFUSIONS = 12
SHOWN_EXAMPLES = 18


def names(run: Run, album: Album, images: dict[str, bytes]) -> list[str]:
    parts: list[str] = []
    for task, rows in run.rows.items():
        if "predictions" not in rows:
            continue
        right = gallery.named(rows, album, right=True, count=SHOWN_NAMED)
        wrong = gallery.named(rows, album, right=False, count=SHOWN_NAMED)
        content: list[str] = []
        share = _share(rows)
        for title, items in (
            (f"Right at first guess, as {percent(share)} are", right),
            (f"Wrong at first guess, as {percent(1 - share)} are", wrong),
        ):
            if items:
                tiles = "".join(_named_tile(item) for item in items)
                content.append(f'<h3>{title}</h3><div class="tiles">{tiles}</div>')
        note = (
            f"Pictures of “{words(task)}” drawn at random, each with the model's three best names out of "
            f"{len(rows['classes']):,} and the probability it gives them."
        )
        parts.append(page.section(f"names-{task}", "What it calls them", note, *content))
        sheet_rows = [
            ("", [_sheet_tile(item) for item in group]) for items in (right, wrong) for group in _groups(items, 6)
        ]
        if sheet_rows:
            images[f"names_{task}"] = _sheet(
                sheet_rows,
                _title(rows, task),
                "Drawn at random, half from those named right. In bold the true name, under it the first guess.",
            )
    return parts


def _title(rows: Rows, task: str) -> str:
    share, pictures, classes = percent(_share(rows)), len(rows["ranks"]), len(rows["classes"])
    if pictures == classes:
        return f"Names {share} of {classes:,} concepts {where(task)}"
    return f"Names {share} of {pictures:,} pictures {where(task)}, out of {classes:,} concepts"


def _share(rows: Rows) -> float:
    return float((rows["ranks"] == 0).mean())


def _sheet_tile(item: gallery.Named) -> Tile:
    name, probability, _ = item.guesses[0]
    return Tile(item.picture, [item.truth, f"{plots.shortened(name, 16)} {probability:.0%}"], item.right)


def _named_tile(item: gallery.Named) -> str:
    guesses: list[str] = []
    for i, (name, probability, true) in enumerate(item.guesses):
        kind = "right" if true else "wrong" if i == 0 else ""
        guesses.append(
            f'<div class="guess {kind}"><span>{text(name)}</span>{probability:.0%}'
            f'<i style="width:{max(1.0, 100 * probability):.0f}%"></i></div>'
        )
    return (
        f'<div class="tile">{page.picture(item.picture, item.truth)}<div class="truth">{text(item.truth)}</div>'
        f"{''.join(guesses)}</div>"
    )


def searches(run: Run, album: Album, images: dict[str, bytes]) -> list[str]:
    parts: list[str] = []
    for task, rows in run.rows.items():
        if "text_to_image_top" not in rows:
            continue
        by_words = gallery.searches(rows, album, "text_to_image", SHOWN_SEARCHES)
        by_picture = gallery.searches(rows, album, "image_to_text", SHOWN_SEARCHES)
        asks = "".join(
            f'<div class="ask"><div><q>{text(plots.shortened(s.query, 140))}</q>'
            f'<small>{_rank(s)}</small></div><div class="five">'
            + "".join(
                f'<div class="frame{" right" if right else ""}">{page.picture(picture, key)}</div>'
                for key, picture, right in s.answers
            )
            + "</div></div>"
            for s in by_words
        )
        found = "".join(
            f'<div class="tile">{page.picture(s.picture, s.query)}<div>'
            f'<div class="truth">{text(plots.shortened(s.query, 60))}</div><ol class="words">'
            + "".join(
                f"<li{' class=right' if right else ''}>{text(plots.shortened(caption, 56))}</li>"
                for caption, _, right in s.answers
            )
            + "</ol></div></div>"
            for s in by_picture
        )
        note = (
            f"Captions of pictures of “{words(task)}” drawn at random, and the five pictures nearest to each. "
            "Framed: right."
        )
        parts.append(
            page.section(
                f"pictures-for-words-{task}",
                "Pictures for a caption",
                note,
                f'<div class="card asks">{asks}</div>',
            )
        )
        note = (
            "Pictures drawn at random with a caption of theirs, and the five captions nearest to each. Ticked: its own."
        )
        parts.append(
            page.section(
                f"words-for-pictures-{task}",
                "Captions for a picture",
                note,
                f'<div class="found">{found}</div>',
            )
        )
        images[f"retrieval_{task}"] = _sheet(
            [(s.query, [Tile(p, [], True if right else None) for _, p, right in s.answers]) for s in by_words],
            f"Pictures for a caption: {words(task)}",
            f"the five nearest of {len(rows['keys']):,}; framed: right; captions drawn at random",
        )
    return parts


def _rank(search: gallery.Search) -> str:
    if search.rank == 1:
        return f"right one first of {search.candidates:,}"
    return f"right one is no. {search.rank:,} of {search.candidates:,}"


def confusions(run: Run, album: Album, images: dict[str, bytes]) -> list[str]:
    parts: list[str] = []
    for task, rows in run.rows.items():
        if "predictions" not in rows:
            continue
        pairs = gallery.confusions(rows, album, SHOWN_CONFUSIONS)
        if not pairs:
            continue
        cards = "".join(
            f'<div class="tile pair">{page.picture(pair.of_truth, pair.truth, 96)}'
            f'<span class="arrow">{"⇄" if pair.both_ways else "→"}</span>{page.picture(pair.of_guess, pair.guess, 96)}'
            f'<span class="much"><b>{pair.count}×</b>{pair.probability:.0%} sure</span>'
            f'<span class="from">{text(pair.truth)}</span><span class="to">{text(pair.guess)}</span></div>'
            for pair in pairs
        )
        note = (
            f"Concepts of “{words(task)}” taken for each other: the truth, what the model said, how many pictures, and "
            "the mean probability of the wrong name. Sorted by both."
        )
        parts.append(page.section(f"confusions-{task}", "What it confuses", note, f'<div class="pairs">{cards}</div>'))
        tiles = [
            [
                Tile(p.of_truth, [p.truth, "is taken for"]),
                Tile(p.of_guess, [p.guess, f"{p.count}×, {p.probability:.0%}"]),
            ]
            for p in pairs
        ]
        images[f"confusions_{task}"] = _sheet(
            [("", [tile for pair in group for tile in pair]) for group in _groups(tiles, 3)],
            f"Most confused: {words(task)}",
            "pairs: the truth, and what the model said",
        )
    return parts


def examples(run: Run, album: Album, images: dict[str, bytes]) -> str:
    drawn = gallery.training_examples(run.recipe, run.folder, album, run.notes, SHOWN_EXAMPLES)
    if not drawn:
        return ""
    tiles = "".join(
        f'<div class="tile sample">{page.picture(e.picture, e.captions[0])}<p class="caption">'
        f"{text(plots.shortened(e.captions[0], 110))}<small>{_more(e)}{text(e.source)}</small></p></div>"
        for e in drawn
    )
    images["data"] = _sheet(
        [("", [Tile(e.picture, [e.captions[0], e.source]) for e in group]) for group in _groups(drawn, 6)],
        "Training pairs",
        "drawn at random; the first caption of each, and its source",
    )
    note = "Pairs drawn at random from the training data, before augmentation."
    return page.section("data", "What it was trained on", note, f'<div class="tiles">{tiles}</div>')


def _more(example: gallery.Example) -> str:
    return f"+ {len(example.captions) - 1} more · " if len(example.captions) > 1 else ""


def _sheet(rows: Sequence[tuple[str, Sequence[Tile]]], title: str, note: str) -> bytes:
    return plots.png(plots.sheet(rows, LIGHT, title, note), LIGHT, colours=None)


def _groups(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
