"""A contact sheet: some samples as one picture, each with its key and its captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from clip_train.data import columns
from clip_train.data.decode import decode
from clip_train.data.files import ShardFiles
from clip_train.data.hashing import permutation
from clip_train.data.inspect_shard import Measured, Scan

_CELL, _TEXT, _GAP, _COLUMNS = 168, 62, 12, 8
_LINES = 3


def contact_sheet(path: Path, scans: Sequence[Scan], good: Sequence[Measured], image: str, most: int = 48) -> None:
    """Draw up to `most` samples, evenly drawn from all, as a PNG of 8 columns."""
    chosen = [good[place] for place in sorted(permutation(len(good), 0)[:most].tolist())]
    rows = max(1, -(-len(chosen) // _COLUMNS))
    across, down = min(_COLUMNS, max(1, len(chosen))), _CELL + _TEXT + _GAP
    sheet = Image.new("RGB", (across * (_CELL + _GAP) + _GAP, rows * down + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    small, plain = _font(10), _font(12)
    files, wanted = ShardFiles(), columns.parse(image)
    for number, one in enumerate(chosen):
        index = scans[one.shard].index
        assert index is not None
        picture = Image.fromarray(decode(columns.read(files, index, one.row, wanted)[1]))
        scale = min(_CELL / picture.width, _CELL / picture.height, 3.0)  # tiny ones are enlarged, but not to mush
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        shown = picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
        left = _GAP + number % _COLUMNS * (_CELL + _GAP)
        top = _GAP + number // _COLUMNS * down
        draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), fill="#f2f2f2")
        sheet.paste(shown, (left + (_CELL - size[0]) // 2, top + (_CELL - size[1]) // 2))
        caption = one.captions[0] + (f"  (+{len(one.captions) - 1})" if len(one.captions) > 1 else "")
        for line, text in enumerate(_wrapped(caption, plain, _CELL, _LINES)):
            draw.text((left, top + _CELL + 2 + 15 * line), text, fill="black", font=plain)
        label = _wrapped(f"{one.width}x{one.height} {one.key}", small, _CELL, 1)[0]
        draw.text((left, top + _CELL + 3 + 15 * _LINES), label, fill="#777777", font=small)
    sheet.save(path)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic; not Chinese."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines that fit; what does not is cut with an ellipsis."""
    lines, line = list[str](), ""
    text = " ".join(text.split())[:400]
    for letter in text:
        if font.getlength(line + letter) > width:
            head, space, tail = line.rpartition(" ")
            if space and letter != " ":
                lines.append(head)
                line = tail + letter
            else:
                lines.append(line)
                line = letter.strip()
            if len(lines) == most:
                last = lines[-1]
                while last and font.getlength(last + "…") > width:
                    last = last[:-1]
                return [*lines[:-1], last + "…"]
        else:
            line += letter
    return [*lines, line]
