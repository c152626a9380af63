"""The report's HTML: one document, style and pictures inside, no script, nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(identifier: str, title: str, note: str, *content: str) -> str:
    """A part of the page with a heading and a sentence under it (both plain text)."""
    lead = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<section id="{identifier}">\n<h2>{text(title)}</h2>\n{lead}\n' + "\n".join(content) + "\n</section>"


def text(value: object) -> str:
    """Escaped: captions are data, not markup."""
    return html.escape(str(value), quote=True)


def chart(light: bytes, dark: bytes, alt: str) -> str:
    """A chart in two colourings; the style sheet shows the one that fits the reader's screen, or paper."""
    return (
        f'<div class="card chart"><img class="light" alt="{text(alt)}" src="{_uri(light, "png")}">'
        f'<img class="dark" alt="{text(alt)}" src="{_uri(dark, "png")}"></div>'
    )


def picture(image: Image.Image | None, alt: str, longest: int = 160) -> str:
    """A picture no larger than it is shown."""
    if image is None:
        return '<span class="pic none">not found</span>'
    small = image.convert("RGB")
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=88, method=4)
    return f'<img class="pic" alt="{text(alt)}" src="{_uri(out.getvalue(), "webp")}">'


def stats(items: Sequence[tuple[str, str]]) -> str:
    """Figures in large type, the first in the model's colour."""
    cells = [
        f'<div class="stat{" first" if i == 0 else ""}"><b>{text(value)}</b><span>{text(label)}</span></div>'
        for i, (value, label) in enumerate(items)
    ]
    return f'<div class="stats">{"".join(cells)}</div>'


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    lines = [f'<tr><th scope="row">{text(name)}</th><td class="number">{text(value)}</td></tr>' for name, value in rows]
    return f'<div class="card"><table>{"".join(lines)}</table></div>'


def toml(source: str) -> str:
    """A recipe with its headings and keys set apart."""
    lines: list[str] = []
    for line in source.strip().splitlines():
        key, equals, value = line.partition(" = ")
        if line.startswith("["):
            lines.append(f'<span class="head">{text(line)}</span>')
        elif equals:
            lines.append(f'<span class="key">{text(key)} =</span> {text(value)}')
        else:
            lines.append(text(line))
    return f'<div class="card"><pre>{chr(10).join(lines)}</pre></div>'


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
