"""What the documentation says that can be checked without running it: links, and values of `--set`."""

from __future__ import annotations

import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```\w*\n(.*?)^```$", flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_and_lists_given_to_set_are_toml(page: Path) -> None:
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        if "--set" not in block:
            continue
        words = [word for word in shlex.split(block, comments=True) if word != "\n"]  # a line that goes on
        for option, override in pairwise(words):
            if option == "--set":
                key, equals, value = override.partition("=")
                assert key and equals, override
                if value.startswith(("{", "[")):
                    tomllib.loads(f"value = {value}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_grids_and_their_budgets_are_there(page: Path) -> None:
    for grid, options in re.findall(r"clip-train ablate (configs/\S+)([^\n#`]*)", page.read_text(encoding="utf-8")):
        tree = tomllib.loads((ROOT / grid).read_text(encoding="utf-8"))
        for budget in re.findall(r"--budget (\w+)", options):
            assert budget in tree["budgets"], f"{grid} has no budget {budget}"
