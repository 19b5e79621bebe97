"""The one way from plain data to JSON and back: types and ranges are checked, places are named.

msgspec converts our frozen dataclasses as they are. A field that nobody reads is refused too,
so that a misspelled one is not ignored in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from ipu_pipeline.errors import PipelineError

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Return ``value`` as dictionaries, lists, texts and numbers; tuples become lists."""
    return msgspec.to_builtins(value, str_keys=True)


def from_json(
    kind: type[T],
    raw: Any,
    source: str,
    error: type[PipelineError],
    ready: Mapping[str, Any] | None = None,
) -> T:
    """Build a dataclass from parsed JSON.

    Args:
        kind: The dataclass.
        raw: What the JSON holds.
        source: Named at the start of every message: a path, or what the data is.
        error: Raised with a message that says which place has which fault.
        ready: Fields that were read already.
    """
    if not isinstance(raw, Mapping):
        raise error(f"{source}: expected an object with fields, got {type(raw).__name__}")
    given = dict(ready or {})
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    unknown = [name for name in raw if name not in known]
    if unknown:
        raise error(f"{source}: {unknown_field(unknown[0], known)}")
    for name in (name for name in known if name in raw and name not in given):
        given[name] = checked(raw[name], hints(kind)[name], f"{source}, {name}", error)  # type: ignore[arg-type]
    missing = [item.name for item in fields(kind) if _required(item) and item.name not in given]  # type: ignore[arg-type]
    if missing:
        raise error(f"{source}: missing field {', '.join(map(repr, missing))}")
    try:
        return kind(**given)
    except (TypeError, ValueError, error) as problem:
        raise error(f"{source}: {problem}") from problem


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Say that there is no field ``name``, with the closest ones that there are."""
    close = get_close_matches(name, known := list(known), n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"fields: {', '.join(known)}"
    return f"unknown field {name!r}; {hint}"


def read_json(path: str | Path, what: str, error: type[PipelineError]) -> Any:
    """Read a JSON file that is ``what`` (``the plan``); raise ``error`` if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise error(f"cannot read {what} {path}: {problem}") from problem


def write_json(path: str | Path, payload: Mapping[str, Any], in_one_line: str = "") -> None:
    """Write JSON, atomically: the file is whole at any time; nobody edits ``in_one_line``."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    texts = [
        f" {json.dumps(key)}: {json.dumps(value, indent=None if key == in_one_line else 1)}"
        for key, value in payload.items()
    ]
    partial.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


@cache
def hints(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass' fields, with their ranges."""
    return get_type_hints(kind, include_extras=True)


def checked(
    raw: Any, wanted: Any, place: str, error: type[PipelineError], *, strict: bool = True
) -> Any:
    """Return plain data as type ``wanted``, lists as the tuples that they are there.

    Args:
        raw: The data.
        wanted: Its type, with ranges as ``Annotated[int, msgspec.Meta(ge=1)]``.
        place: Named at the start of a message.
        error: Raised with a message that says which place has which fault.
        strict: Whether texts of numbers and truth values are refused.
    """
    try:
        found = msgspec.convert(raw, wanted, strict=strict)
    except msgspec.ValidationError as problem:
        text, _, where = str(problem).partition(" - at `$")
        if get_origin(wanted) is Literal:
            text = f"Expected one of {', '.join(map(str, get_args(wanted)))}"
        raise error(f"{place}{where.rstrip('`')}: {text}{_excerpt(raw, where)}") from problem
    strange = _unread(raw, msgspec.to_builtins(found, str_keys=True), "")
    if strange:
        raise error(f"{place}{strange[0]}: unknown field {strange[1]!r}")
    return found


def _excerpt(raw: Any, where: str) -> str:
    """Return the value at ``where`` (``[0].device``) for a message; nothing if it is long."""
    for part in where.rstrip("`").replace("]", "").replace("[", ".").split(".")[1:]:
        try:
            raw = raw[int(part)] if isinstance(raw, list | tuple) else raw[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return ""
    text = repr(raw)
    return f", the value is {text}" if len(text) <= 80 else ""


def _unread(raw: Any, read: Any, place: str) -> tuple[str, str] | None:
    """Return the first place and key in ``raw`` that no dataclass took."""
    if isinstance(raw, Mapping) and isinstance(read, Mapping):
        for key, value in raw.items():
            if str(key) not in read:
                return place, str(key)
            found = _unread(value, read[str(key)], f"{place}.{key}")
            if found:
                return found
    elif isinstance(raw, list | tuple) and isinstance(read, list | tuple):
        for index, (one, other) in enumerate(zip(raw, read, strict=False)):
            if isinstance(one, dict | list | tuple):
                found = _unread(one, other, f"{place}[{index}]")
                if found:
                    return found
    return None
