"""The one way from plain data to JSON and back: types and ranges are checked, places are named.

msgspec converts our frozen dataclasses as they are. A field that nobody reads is refused too,
so that a misspelled one is not ignored in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import msgspec

from ipu_pipeline.errors import PipelineError

T = TypeVar("T")
# Fields of the dataclasses that this module reads: a size or count, and seconds or a rate.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
# Bytes of the largest file, and digits of the longest whole number.
MAX_BYTES = 2**30
MAX_DIGITS = 19


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
        raise error(
            f"{source}: unknown field {', '.join(map(repr, unknown))}; fields: {', '.join(known)}"
        )
    for name in (name for name in known if name in raw and name not in given):
        wanted = _hints(kind)[name]  # type: ignore[arg-type]
        given[name] = _convert(raw[name], wanted, f"{source}, {name}", error)
    missing = [item.name for item in fields(kind) if _required(item) and item.name not in given]  # type: ignore[arg-type]
    if missing:
        raise error(f"{source}: missing field {', '.join(map(repr, missing))}")
    try:
        return kind(**given)
    except (TypeError, ValueError) as problem:
        raise error(f"{source}: {problem}") from problem


def read_json(path: str | Path, what: str, error: type[PipelineError]) -> Any:
    """Read a JSON file that is ``what`` (``the plan``); raise ``error`` if it cannot be read.

    Numbers that JSON does not have (NaN, infinity), numbers beyond 64 bits, and files above
    ``MAX_BYTES`` or nested too deeply are refused.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"it has {size} bytes, at most {MAX_BYTES} are read")
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(
            text, parse_int=_whole, parse_float=_finite, parse_constant=_refuse_number
        )
    except RecursionError as problem:
        raise error(f"cannot read {what} {path}: it is nested too deeply") from problem
    except (OSError, ValueError) as problem:  # of the encoding and of JSON, too
        raise error(f"cannot read {what} {path}: {problem}") from problem


def _whole(text: str) -> int:
    return int(text) if len(text) <= MAX_DIGITS else _refuse_number(text)


def _finite(text: str) -> float:
    return found if isfinite(found := float(text)) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    raise ValueError(f"it holds the number {shown}, which is not finite or beyond 64 bits")


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
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _convert(raw: Any, wanted: Any, place: str, error: type[PipelineError]) -> Any:
    try:
        found = msgspec.convert(raw, wanted)
    except msgspec.ValidationError as problem:
        text, _, where = str(problem).partition(" - at `$")
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
