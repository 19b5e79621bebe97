"""The one way from plain data to JSON and back: types and ranges are checked, places are named.

msgspec converts our frozen dataclasses as they are. A field that nobody reads is refused too,
so that a misspelled one is not ignored in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from ipu_pipeline.errors import PipelineError, shown
from ipu_pipeline.ir.files import first_twice, named, read_text, write_text

T = TypeVar("T")
# Fields of the dataclasses that this module reads: a size or count, and seconds or a rate.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
# Characters of the longest whole number, and levels of lists and objects.
MAX_DIGITS = 20
MAX_DEPTH = 100
MOST_NAMES = 5  # of unknown fields in a message
_TOO_DEEP = f"it has more than {MAX_DEPTH} levels of lists and objects; make it flatter"
_HALF = re.compile(r"\\u[dD]")  # the beginning of a half of a character that is escaped


def to_json(value: Any) -> Any:
    """Return ``value`` as dictionaries, lists, texts and numbers; tuples become lists."""
    return msgspec.to_builtins(value, str_keys=True)


def from_json(
    kind: type[T], raw: Any, source: str, error: type[PipelineError], *, strict: bool = True
) -> T:
    """Build a dataclass, or another type of fields, from parsed JSON.

    Args:
        kind: The type.
        raw: What the JSON holds; what is already of its type is taken as it is.
        source: Named at the start of every message: a path, or what the data is.
        error: Raised with a message that says which place has which fault.
        strict: Whether texts of numbers and truth values are refused.
    """
    known = {item.name: item for item in fields(kind)} if is_dataclass(kind) else {}
    if known and not isinstance(raw, Mapping):
        raise error(f"{source}: expected an object with fields, got {type(raw).__name__}")
    # All fields that are unknown or missing are named; msgspec would name the first.
    unknown = [name for name in raw if name not in known] if known else []
    if unknown:
        raise error(f"{source}: {unknown_field(unknown, known)}")
    try:
        found = msgspec.convert(raw, kind, strict=strict)
    except (error, UnicodeEncodeError) as problem:  # half of a character, of a command line
        raise error(f"{source}: {problem}") from problem
    except msgspec.ValidationError as problem:
        text, _, where = str(problem).partition(" - at `$")
        where = where.rstrip("`")
        missing = [n for n, item in known.items() if n not in raw and _is_required(item)]
        if missing and not where:
            text = f"missing field {', '.join(map(repr, missing))}"
        wanted = get_type_hints(kind).get(where[1:]) if known else kind
        if get_origin(wanted) is Literal:
            text = f"Expected one of {', '.join(map(str, get_args(wanted)))}"
        excerpt = _excerpt(raw, where) if where or not known else ""
        raise error(f"{_place(source, where)}: {text}{excerpt}") from problem
    strange = _unread(raw, found, "")
    if strange:
        raise error(f"{_place(source, strange[0])}: unknown field {strange[1]!r}")
    return found


def unknown_field(names: Iterable[str], known: Iterable[str]) -> str:
    """Say that there are no fields ``names``, with the closest ones that there are."""
    names, known = list(names)[:MOST_NAMES], list(known)
    close = [match for name in names for match in get_close_matches(str(name), known, n=2)]
    fields_known = shorten(", ".join(known), 300, placeholder=" ...")
    hint = f"did you mean {' or '.join(close)}?" if close else f"fields: {fields_known}"
    return f"unknown field {', '.join(map(shown, names))}; {hint}"


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _place(source: str, where: str) -> str:
    return f"{source}, {where[1:]}" if where.startswith(".") else f"{source}{where}"


def read_json(
    path: str | Path,
    what: str,
    error: type[PipelineError],
    *,
    shown_texts: bool = False,
    last_counts: bool = False,
) -> Any:
    """Read a JSON file that is ``what`` (``the plan``); raise ``error`` if it cannot be read.

    With ``shown_texts`` all its texts are for terminals and pages: each must be printable. With
    ``last_counts`` a key may be there twice.
    """
    text = read_text(path, what, error)
    try:
        found = parse_json(text, last_counts=last_counts)
        if shown_texts:
            _refuse_what_does_not_print(found)
        return found
    except ValueError as problem:
        raise error(f"cannot read {what} {named(path)}: {problem}") from problem


def _refuse_what_does_not_print(found: Any) -> None:
    left = [found]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and not value.isprintable():
            raise ValueError(
                f"it holds the text {shown(value)}, which is not of printable characters; rename "
                "what it stands for"
            )


def parse_json(text: str, *, last_counts: bool = False, any_number: bool = False) -> Any:
    """Return what a JSON text holds.

    Args:
        text: The JSON.
        last_counts: Of a key that is there twice, the last value counts; else it is refused.
        any_number: Whether it may hold every number that ``json.dumps`` writes: a history of
            losses has NaN, the state of a random generator 128 bits.

    Raises:
        ValueError: It is no JSON, or holds what has no one meaning: numbers that JSON does not
            have (NaN, infinity) or beyond 64 bits, a key twice, half of a character, or more than
            ``MAX_DEPTH`` levels.
    """
    numbers: dict[str, Any] = {
        "parse_int": _whole, "parse_float": _finite, "parse_constant": _refuse_number
    }  # fmt: skip
    pairs = dict if last_counts else _object
    try:
        found = json.loads(text, object_pairs_hook=pairs, **({} if any_number else numbers))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError as problem:
        raise ValueError(f"it is no JSON: {problem}") from problem
    level: list[Any] = [[found]]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise ValueError(_TOO_DEEP)
    if _HALF.search(text):
        _refuse_half_characters(found)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = shown(first_twice(name for name, _ in pairs))
        raise ValueError(f"it has the key {twice} twice in one object; remove one of them")
    return found


def _refuse_half_characters(found: Any) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        raise ValueError(
            f"it holds {shown(problem.object[problem.start])}, half of a character; write it whole"
        ) from problem


def _whole(text: str) -> int:
    found = int(text) if len(text) <= MAX_DIGITS else 2**63
    return found if -(2**63) <= found < 2**63 else _refuse_number(text)


def _finite(text: str) -> float:
    return found if isfinite(found := float(text)) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"it holds the number {text[:40]}, which is not finite or beyond 64 bits")


def write_json(path: str | Path, payload: Mapping[str, Any], in_one_line: str = "") -> None:
    """Write JSON, whole or not at all; nobody edits ``in_one_line``."""
    texts = [
        f" {json.dumps(key)}: {json.dumps(value, indent=None if key == in_one_line else 1)}"
        for key, value in payload.items()
    ]
    write_text(path, "{\n" + ",\n".join(texts) + "\n}\n")


def _excerpt(raw: Any, where: str) -> str:
    """Return the value at ``where`` (``[0].device``) for a message; nothing if it is long."""
    for part in where.replace("]", "").replace("[", ".").split(".")[1:]:
        try:
            raw = raw[int(part)] if isinstance(raw, list | tuple) else raw[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return ""
    text = repr(raw)
    return f", the value is {text}" if len(text) <= 80 else ""


def _unread(raw: Any, read: Any, place: str) -> tuple[str, str] | None:
    """Return the first place and key in ``raw`` that no dataclass took."""
    children: list[tuple[Any, Any, str]] = []
    if isinstance(raw, Mapping):
        known = read if isinstance(read, Mapping) else vars(read)
        for key, value in raw.items():
            if key not in known:
                return place, str(key)
            children.append((value, known[key], f"{place}.{key}"))
    elif isinstance(raw, list | tuple):
        pairs = enumerate(zip(raw, read, strict=False))
        children = [(one, other, f"{place}[{index}]") for index, (one, other) in pairs]
    for value, taken, where in children:
        found = _unread(value, taken, where) if isinstance(value, dict | list | tuple) else None
        if found:
            return found
    return None
