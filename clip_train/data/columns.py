"""Columns: where in a sample its picture, its captions and its label are.

A column is a member's extension (`jpg`), alternatives of which the first present counts (`jpg;png`), or a
field of a JSON member (`json.captions`, `json.meta.title`). Of a list, `json.captions[:2]` takes the first two.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from clip_train.data.files import ShardFiles
from clip_train.data.shards import ShardIndex
from clip_train.errors import DataError

_PROBED = 16  # samples of a shard whose JSON is looked at before training starts
MOST_CHARACTERS = 100_000
"""Longest caption: the tokenizer's time grows with it (0.3 s for this), and what is longer is no caption."""
_MOST_BYTES = 1 << 29  # largest member: an uncompressed picture of MAX_PIXELS at 16 bits


class BadSampleError(Exception):
    """This sample cannot be used; its text is the cause. Never leaves `clip_train.data`."""


@dataclass(frozen=True)
class Column:
    """One alternative: a member's extension and, for JSON, the path to a field."""

    extension: str
    field: tuple[str, ...] = ()
    first: int | None = None
    """Of a list, so many from its beginning; None takes all."""


def parse(text: str) -> tuple[Column, ...]:
    """`jpg;png`, `txt`, `json.FIELD` or `json.FIELD[:N]` -> the alternatives.

    Raises:
        DataError: nothing is named, or brackets hold something else than `:N`.
    """
    found: list[Column] = []
    for part in text.split(";"):
        part, first = _cut(part.strip())
        head, _, rest = part.partition(".")
        if head.lower() == "json" and rest:
            found.append(Column("json", tuple(rest.split(".")), first))
        elif first is not None:
            raise DataError(f"column {text!r}: [:{first}] is for lists in a JSON member: write `json.FIELD[:{first}]`")
        elif part:
            found.append(Column(part.lower().lstrip(".")))
    if not found:
        raise DataError(f"column {text!r} names no member: write an extension as `jpg`, or `json.FIELD`")
    return tuple(found)


def _cut(part: str) -> tuple[str, int | None]:
    """`FIELD[:N]` -> `FIELD` and N."""
    if not part.endswith("]"):
        return part, None
    found = re.fullmatch(r"(.*)\[:([1-9]\d*)\]", part)
    if found is None:
        raise DataError(f"column {part!r}: brackets take the first entries of a list, as json.captions[:2]")
    return found[1], int(found[2])


def read(files: ShardFiles, index: ShardIndex, sample: int, columns: tuple[Column, ...]) -> tuple[Column, bytes]:
    """The bytes of the first alternative that the sample has.

    Raises:
        BadSampleError: it has none, or it is empty.
    """
    for column in columns:
        if place := index.member(sample, column.extension):
            if place[1] > _MOST_BYTES:
                raise BadSampleError(f"its {column.extension} member has {place[1]:,} bytes, above {_MOST_BYTES:,}")
            data = files.read(index, *place)
            if not data:
                raise BadSampleError(f"its {column.extension} member is empty")
            return column, data
    wanted = " or ".join(column.extension for column in columns)
    present = [name for name in index.extensions if index.member(sample, name)]
    raise BadSampleError(f"it has no {wanted} member, only {', '.join(present)}")


def value(column: Column, data: bytes) -> Any:
    """The text of a member, or what its JSON holds at the field.

    Raises:
        BadSampleError: not UTF-8, not JSON, or the field is not there.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"its {column.extension} member is not UTF-8 at byte {error.start}") from error
    if not column.field:
        return text
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"its {column.extension} member is not JSON: {error}") from error
    for name in column.field:
        if not isinstance(found, dict) or name not in found:
            raise BadSampleError(f"its {column.extension} member has no field {'.'.join(column.field)}")
        found = cast(dict[str, Any], found)[name]
    return cast(list[Any], found)[: column.first] if isinstance(found, list) else found


def read_captions(column: Column, data: bytes) -> list[str]:
    """The captions of a sample, at least one; empty ones are left out.

    Raises:
        BadSampleError: as `value`; or there is no caption with anything in it.
    """
    found = value(column, data)
    texts = cast(list[Any], found) if isinstance(found, list) else [found]
    for text in texts:
        if not isinstance(text, str):
            raise BadSampleError(f"its caption is {json.dumps(text)[:60]}: a text or a list of texts is wanted")
        if len(text) > MOST_CHARACTERS:
            raise BadSampleError(f"its caption has {len(text):,} characters, above {MOST_CHARACTERS:,}")
    texts = [text for text in cast(list[str], texts) if not is_blank(text)]
    if not texts:
        raise BadSampleError("its caption is empty")
    return texts


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen in a text: white space, control characters, `&nbsp;`."""
    if "&" in text and len(text) < 1000:
        text = html.unescape(html.unescape(text))  # as the tokenizer does
    return not any(letter.isprintable() and not letter.isspace() for letter in text)


def read_label(column: Column, data: bytes) -> int | str:
    """The class of a sample: a number where it is written as one, or a name.

    Raises:
        BadSampleError: as `value`; or it is neither.
    """
    found = value(column, data)
    if isinstance(found, str) and found.strip():
        found = found.strip()
        return int(found) if found.isascii() and found.isdecimal() else found
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    raise BadSampleError(f"its label is {json.dumps(found)[:60]}: a class number or name is wanted")


def check_columns(
    index: ShardIndex,
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    contents: bool = True,
) -> None:
    """Stop at once where a shard cannot have a column: `check_columns(index, image="jpg;png",
    caption="txt")`.

    Single samples without a member are met during training and counted; here every sample lacks it, or none
    of the first ones has the JSON field, so the name must be wrong.

    Args:
        contents: also look into the first samples, for which the shard must be read.

    Raises:
        DataError: with the shard, the key, and what the shard does contain.
    """
    readers = {"image": (image, None), "caption": (caption, read_captions), "label": (label, read_label)}
    for key, (name, reader) in readers.items():
        if name is None:
            continue
        alternatives = parse(name)
        if not any(column.extension in index.extensions for column in alternatives):
            raise DataError(
                f"{index.shard}: no sample has the member that `{key} = {name!r}` names. Its {len(index)} "
                f"samples hold: {index.contents()}.{_json_fields(index)} Set `{key}` to one of these."
            )
        if reader is not None and contents:
            _probe(index, key, name, alternatives, reader)


def _probe(
    index: ShardIndex, key: str, name: str, columns: tuple[Column, ...], text: Callable[[Column, bytes], Any]
) -> None:
    files, causes = ShardFiles(), Counter[str]()
    for sample in range(min(_PROBED, len(index))):
        try:
            text(*read(files, index, sample, columns))
            return
        except BadSampleError as error:
            causes[str(error)] += 1
    cause, _ = causes.most_common(1)[0]
    raise DataError(
        f"{index.shard}: `{key} = {name!r}` gives nothing for any of its first {causes.total()} samples "
        f"(for {index.key(0)!r}: {cause}). Members: {index.contents()}.{_json_fields(index)}"
    )


def _json_fields(index: ShardIndex) -> str:
    """What the first JSON member holds, for messages."""
    for sample in range(min(_PROBED, len(index))):
        if place := index.member(sample, "json"):
            try:
                content = json.loads(ShardFiles().read(index, *place))
            except ValueError:
                return " Its json members are not JSON."
            if isinstance(content, dict):
                fields = cast(dict[str, object], content)
                shown = ", ".join(f"json.{name} ({type(field).__name__})" for name, field in fields.items())
                return f" Fields: {shown or 'none'}."
            return " Its json members are not objects with fields."
    return ""
