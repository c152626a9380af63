"""Builds `default-49152.json.gz` out of freely licensed English text; see README.md beside this file.

    npm pack cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0     # then tar xzf each
    apt-get download wordnet-base openclipart-svg                                  # then dpkg-deb -x each
    python -m tokenizer.vocabularies.build --wordnet usr/share/wordnet --openclipart usr/share/openclipart/svg \
        --cldr .../annotations/en/annotations.json .../annotationsDerived/en/annotations.json
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from rich.console import Console

from tokenizer.bpe import DEFAULT_PATH
from tokenizer.training import train_bpe

PROVENANCE = (
    "Learned from: WordNet 3.0 (Princeton University; lemmas, definitions, examples; Debian wordnet-base), Unicode CLDR"
    " 48.2 English annotations (Unicode-3.0), titles, keywords and descriptions of the Open Clip Art Library (public"
    " domain; Debian openclipart-svg 0.18). No caption of any image-text data set of the web."
)
_WORK = re.compile(r"<(?:cc:)?Work\b.*?</(?:cc:)?Work>", re.DOTALL)
_FIELD = re.compile(r"<(?:dc:title|dc:description|rdf:li)(?:\s[^>]*)?>([^<]+)<")
_AGENT = re.compile(r"<(?:cc:)?Agent\b.*?</(?:cc:)?Agent>", re.DOTALL)
_JUNK = re.compile(
    r"@|^hash$|part of the flat icon collection|etiquette icons|gramastar|^hash\(0x|^image/svg", re.IGNORECASE
)
_SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
_CLIPART_BY = re.compile(r"^clipart by .*? - ", re.IGNORECASE)


def wordnet(folder: Path) -> Iterator[str]:
    """Of every synset its lemmas ("dog, domestic dog, Canis familiaris") and its gloss with examples."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            data, gloss = line.split(" | ", 1)
            fields = data.split(" ")
            lemmas = (fields[4 + 2 * n] for n in range(int(fields[3], 16)))
            yield ", ".join(re.sub(r"\(\w+\)$", "", lemma).replace("_", " ") for lemma in lemmas)
            yield gloss.strip()


def cldr(path: Path) -> Iterator[str]:
    """Of every character and sequence its name and its keywords, as one caption."""
    content = json.loads(path.read_text(encoding="utf-8"))
    annotations = (content.get("annotations") or content["annotationsDerived"])["annotations"]
    for character, entry in annotations.items():
        if not _SKIN_TONE.search(character):  # thousands of sequences that repeat a name five times
            yield f"{character} {entry.get('tts', [''])[0]}: {', '.join(entry.get('default', []))}"


def openclipart(folder: Path) -> Iterator[str]:
    """Of every public-domain drawing its title, description and keywords, without the junk."""
    for path in sorted(folder.rglob("*.svg")):
        svg = path.read_text(encoding="utf-8", errors="replace")
        work = _WORK.search(svg)
        if work is None or "publicdomain" not in work[0].lower().replace(" ", ""):
            continue
        fields = (unescape(field).strip() for field in _FIELD.findall(_AGENT.sub("", work[0])))
        fields = (_CLIPART_BY.sub("", field) for field in fields if field and not _JUNK.search(field))
        if caption := ", ".join(dict.fromkeys(fields)):  # title and description are often the same
            yield caption


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, metavar="DIR")
    parser.add_argument("--openclipart", type=Path, required=True, metavar="DIR")
    parser.add_argument("--cldr", type=Path, required=True, nargs="+", metavar="JSON")
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH, metavar="PATH")
    args = parser.parse_args()
    console = Console()
    sources = {
        "WordNet": list(wordnet(args.wordnet)),
        "CLDR": [caption for path in args.cldr for caption in cldr(path)],
        "Open Clip Art": list(openclipart(args.openclipart)),
    }
    for name, captions in sources.items():
        if not captions:
            raise SystemExit(f"{name}: no text found; is the path right?")
        console.print(f"{name}: {len(captions):,} texts, {sum(map(len, captions)):,} characters")
    texts = [caption for captions in sources.values() for caption in captions]
    tokenizer = train_bpe(texts, provenance=PROVENANCE, console=console)
    tokenizer.save(args.out)
    console.print(tokenizer, args.out)


if __name__ == "__main__":
    main()
