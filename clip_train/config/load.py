"""From a TOML file, the file it extends, and `key=value` overrides to a checked Recipe, and back to TOML."""

from __future__ import annotations

import difflib
import tomllib
import types
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from clip_train.config.schema import Recipe
from clip_train.dataset_spec import is_spec, parse_spec
from clip_train.errors import ConfigError

Tree = dict[str, Any]


EITHER = (("training", "steps", "epochs"),)
"""A table, and keys of it that stand for each other: the one that is given last, counts."""

TEXT_SIZES = ("width", "layers", "heads")
"""What a text tower keeps when an override makes it one of another kind that has these, too: a swap at equal size."""


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a path, or the name of a shipped one (`quickstart`), with `key=value` overrides on top.

    Raises ConfigError for a missing file, broken TOML, an unknown or mistyped key (the nearest valid one is named).
    """
    path = find_recipe(name_or_path)
    tree = _read(path, seen=())
    _apply_overrides(tree, overrides)
    _anchor_paths(tree, Path.cwd())
    return parse_recipe(tree, where=str(path))


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = {recipe.stem: recipe for folder in _shipped_folders() for recipe in sorted(folder.glob("*.toml"))}
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    nearest = difflib.get_close_matches(path.stem, shipped, n=3)
    hint = f"Did you mean {' or '.join(nearest)}?" if nearest else f"Shipped recipes: {', '.join(sorted(shipped))}."
    raise ConfigError(f"no recipe {str(name_or_path)!r}: it is neither a file nor a shipped recipe. {hint}")


def parse_recipe(tree: Tree, where: str = "recipe") -> Recipe:
    """Check a tree of plain values and freeze it."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def set_values(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with `key=value` overrides on top."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    _apply_overrides(tree, overrides)
    return parse_recipe(tree, where="--set")


def parse_toml(text: str, where: str) -> Recipe:
    """Check a resolved recipe, as a run folder or a checkpoint carries it."""
    try:
        return parse_recipe(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `load_recipe` of it gives an equal recipe."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def differences(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    flat_a, flat_b = dict(_flatten(a.model_dump(mode="json"))), dict(_flatten(b.model_dump(mode="json")))
    keys = sorted(flat_a.keys() | flat_b.keys())
    return {key: (flat_a.get(key), flat_b.get(key)) for key in keys if flat_a.get(key) != flat_b.get(key)}


def _flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(cast(Tree, value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shipped_folders() -> list[Path]:
    package = Path(__file__).resolve().parent.parent
    # An installed wheel carries the recipes inside the package, a checkout beside it.
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def _read(path: Path, seen: tuple[Path, ...]) -> Tree:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `extends` goes in a circle through {', '.join(map(str, seen))}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    parent = tree.pop("extends", None)
    _anchor_paths(tree, path.parent)
    if parent is None:
        text = tree.setdefault("text", {})
        if isinstance(text, dict):  # named, so that the same kind given above it is no change
            cast(Tree, text).setdefault("kind", "transformer")
        return tree
    base = path.parent / str(parent)
    if not base.is_file():
        raise ConfigError(f"{path}: extends {parent!r}, but there is no file {base}")
    below = _read(base, (*seen, path))
    for table, *keys in EITHER:
        _drop_others(below.get(table), tree.get(table), keys)
    return _merge(below, tree)


def _drop_others(below: Any, top: Any, keys: list[str]) -> None:
    """Where `top` gives one of the alternatives, take them all out of what lies below it."""
    if isinstance(below, dict) and isinstance(top, dict) and any(key in top for key in keys):
        for key in keys:
            cast(Tree, below).pop(key, None)


def _merge(base: Tree, top: Tree) -> Tree:
    """`top` over `base`, table by table; a table that changes its `kind` replaces the whole of the old one."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            old, new = cast(Tree, old), cast(Tree, value)
            changes_kind = "kind" in new and new["kind"] != old.get("kind")
            merged[key] = new if changes_kind else _merge(old, new)
        else:
            merged[key] = value
    return merged


def _apply_overrides(tree: Tree, overrides: Sequence[str]) -> None:
    """In order, but a table's kind before what was given of it: another kind takes away keys of the recipe alone."""
    ordered: list[tuple[str, str]] = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        table, place = key.removesuffix("kind"), len(ordered)
        if key.endswith(".kind"):
            for number, (before, _) in reversed(list(enumerate(ordered))):
                if before == key or table.startswith(f"{before}."):  # an earlier kind, or the whole table
                    break
                if before.startswith(table):
                    place = number
        ordered.insert(place, (key, override))
    for _, override in ordered:
        _apply_override(tree, override)


def _apply_override(tree: Tree, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form key=value, for example training.steps=1000")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a table")
        node = cast(Tree, child)
    value = _parse_value(text)
    for table, *keys in EITHER:
        if parts[:-1] == [table] and parts[-1] in keys and value is not None:
            _drop_others(node, {parts[-1]: value}, keys)
    if parts[-1] == "kind" and node.get("kind") != value:
        sized = parts == ["text", "kind"] and "transformers" not in (value, node.get("kind"))
        kept = {key: node[key] for key in TEXT_SIZES if sized and key in node}
        node.clear()  # another kind has other keys
        node.update(kept)
    if value is None:
        node.pop(parts[-1], None)
    else:
        node[parts[-1]] = value


def _parse_value(text: str) -> Any:
    """A TOML value; `none` takes the key away (its default holds); anything else is a plain string."""
    if text.strip().lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _anchor_paths(tree: Tree, folder: Path) -> None:
    """Make relative paths of a recipe absolute, so that the resolved recipe means the same from anywhere.

    A path is taken from the recipe's own folder where its first part exists there, else from the working directory.
    """

    def anchor(value: Any) -> Any:
        if isinstance(value, list):
            return [anchor(item) for item in cast(list[Any], value)]
        if not isinstance(value, str) or ":" in value or value.startswith(("/", "~")) or value == "default":
            return value
        first = Path(value).parts[:1]
        beside = value.startswith(("./", "../")) or (bool(first) and (folder / first[0]).exists())
        return str((folder if beside else Path.cwd()) / value)

    def anchor_in(table: Any, *keys: str) -> None:
        for key in keys:
            if isinstance(table, dict) and key in table:
                table[key] = anchor(table[key])

    anchor_in(tree.get("data"), "cache_dir")
    for source in _tables(tree, "data", "sources"):
        anchor_in(source, "shards")
    for task in _tables(tree, "evaluation", "tasks"):
        anchor_in(task, "shards", "train_shards", "classes")
        for key in ("data", "train_data"):
            if isinstance(task.get(key), str) and is_spec(task[key]):
                with suppress(ConfigError):  # what is wrong with it is said with its key
                    task[key] = str(parse_spec(task[key]).anchored(anchor))
        if isinstance(task.get("templates"), str):
            anchor_in(task, "templates")
    anchor_in(tree.get("tokenizer"), "path")
    anchor_in(tree.get("text"), "path")
    anchor_in(tree.get("training"), "init", "init_text", "init_image")


def _tables(tree: Tree, *path: str) -> list[Tree]:
    """The tables in a table. What is none is passed over: it has no paths, and `parse_recipe` says what is wrong."""
    node: Any = tree
    for part in path:
        node = cast(Tree, node).get(part) if isinstance(node, dict) else None
    tables = list(cast(Tree, node).values()) if isinstance(node, dict) else []
    return [cast(Tree, table) for table in tables if isinstance(table, dict)]


def _explain(problem: dict[str, Any]) -> str:
    key = _key_of([str(part) for part in problem["loc"]])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{_suggest(key)}"
    if problem["type"] == "union_tag_not_found":
        return f"missing key '{key}.kind', which says what the other keys of this table mean"
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    return f"{key!r}: {problem['msg']} (got {problem['input']!r})" if key else str(problem["msg"])


def _key_of(location: Sequence[str]) -> str:
    """The user's key: pydantic's location of a problem, without the kind that it puts behind the key of a union."""
    unions = [key.split(".")[:-1] for key in set(_keys(Recipe)) if key.endswith(".kind")]
    parts: list[str] = []
    is_kind = False
    for part in location:
        is_kind = not is_kind and any(_names(union, parts) for union in unions)
        if not is_kind:
            parts.append(part)
    return ".".join(parts)


def _names(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    return len(pattern) == len(parts) and all(one in ("NAME", part) for one, part in zip(pattern, parts, strict=True))


def _suggest(key: str) -> str:
    valid = sorted(set(_keys(Recipe)))
    leaf = key.rsplit(".", 1)[-1]
    same_table = [name for name in valid if name.rpartition(".")[0] == key.rpartition(".")[0]]
    nearest = (
        difflib.get_close_matches(key, same_table, n=1, cutoff=0.75)
        or [name for name in valid if name.rsplit(".", 1)[-1] == leaf][:3]
        or difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
    )
    return f" Did you mean {' or '.join(nearest)}?" if nearest else " See `clip-train recipe --schema` for every key."


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a model; tables with free names appear as NAME."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for child, path in _models_in(field.annotation):
            yield from _keys(child, f"{prefix}{name}.{path}")


def _models_in(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
    elif origin is Annotated:
        yield from _models_in(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _models_in(option)
    elif origin is dict:
        for child, path in _models_in(get_args(annotation)[1]):
            yield child, f"NAME.{path}"
