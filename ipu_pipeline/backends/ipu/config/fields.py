"""What a configuration field may hold: one spec per field, for JSON data and for override text.

A spec names a *kind* of value. Lists become tuples, so that a config is immutable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ipu_pipeline.errors import ConfigError

OUTPUT_MODES = ("all", "sum", "final", "default")
METADATA_KEY = "spec"
# A comma separates two settings unless it stands inside brackets.
_SEPARATOR = re.compile(r",(?![^\[]*\])")
_BOOLS = {
    **dict.fromkeys(("true", "1", "yes", "y"), True),
    **dict.fromkeys(("false", "0", "no", "n"), False),
}
DESCRIPTIONS: Mapping[str, str] = {
    "bool": "true or false",
    "int": "a whole number",
    "str": "a string",
    "ints": "a list of at least one whole number",
    "proportion": "a number or a list of numbers",
    "replication": 'a whole number, or a map such as {"pod16": 4, "default": 1}',
    "mapping": "a map",
}


@dataclass(frozen=True)
class FieldSpec:
    """The values that one field accepts.

    Attributes:
        kind: ``bool``, ``int``, ``str``, ``ints``, ``proportion``, ``replication``, ``mapping``.
        minimum: Smallest number allowed, for the kinds that hold numbers.
        optional: Whether ``None`` is allowed; it then means "derive it from the other fields".
        choices: The only strings allowed; empty for any.
    """

    kind: str
    minimum: int | None = None
    optional: bool = False
    choices: tuple[str, ...] = ()


def config_field(kind: str, default: Any = None, **limits: Any) -> Any:
    """Declare a dataclass field with a :class:`FieldSpec`; mappings stay out of the hash."""
    return field(
        default=default,
        hash=False if kind in ("replication", "mapping") else None,
        metadata={METADATA_KEY: FieldSpec(kind, **limits)},
    )


def check_value(name: str, value: Any, spec: FieldSpec) -> Any:
    """Return ``value`` in the form to keep.

    Raises:
        ConfigError: Wrong type, too small, or not one of the choices.
    """
    if value is None:
        if spec.optional:
            return None
        raise ConfigError(f"{name} must be {DESCRIPTIONS[spec.kind]}, got null; leave the key out")
    if not _FITS[spec.kind](value):
        raise ConfigError(
            f"{name} must be {DESCRIPTIONS[spec.kind]}, got {type(value).__name__} {value!r}"
        )
    entries = value.values() if isinstance(value, Mapping) else _listed(value)
    shown = list(value) if isinstance(value, tuple) else value
    if spec.minimum is not None and min(entries) < spec.minimum:
        raise ConfigError(f"{name} must be at least {spec.minimum}, got {shown!r}")
    if spec.kind == "proportion" and not all(0 <= entry <= 1 for entry in entries):
        raise ConfigError(f"{name} is a share of an IPU's memory, from 0 to 1, got {shown!r}")
    if spec.choices and value not in spec.choices:
        raise ConfigError(f"{name} must be one of {', '.join(spec.choices)}, got {value!r}")
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, list) else value


def parse_overrides(text: str, specs: Mapping[str, FieldSpec]) -> dict[str, Any]:
    """Read ``name=value`` settings separated by commas.

    Lists are written ``[1 2 3]`` or ``[1,2,3]``, booleans ``true`` or ``false``, and ``none``
    puts an optional field back to its derived value.

    Args:
        text: The settings; an empty text has none.
        specs: What each known field accepts.

    Returns:
        Values by field name, of the types that the fields have.

    Raises:
        ConfigError: No ``=``, an unknown or repeated name, or a value of the wrong type.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in _SEPARATOR.split(text))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise ConfigError(f"override {part!r} is not name=value; separate settings by commas")
        if name not in specs:
            raise ConfigError(unknown_key(name, specs))
        if name in found:
            raise ConfigError(f"override {name} is given twice: {found[name]!r} and {value!r}")
        found[name] = _from_text(name, value, specs[name])
    return found


def unknown_key(name: str, known: Mapping[str, Any]) -> str:
    """Return the message for a key that no field has, with the closest known ones."""
    close = get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
    return f"unknown configuration key {name!r}; {hint}"


def _from_text(name: str, text: str, spec: FieldSpec) -> Any:
    if spec.optional and text.lower() in ("none", "null"):
        return None
    try:
        return _TEXT_READERS[spec.kind](text)
    except (KeyError, ValueError):
        raise ConfigError(
            f"override {name}={text}: expected {DESCRIPTIONS[spec.kind]}"
            f"{', written [1 2 3]' if spec.kind in ('ints', 'proportion') else ''}"
        ) from None


def _entries(text: str, kind: Callable[[str], Any]) -> list[Any]:
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(text)
    return [kind(entry) for entry in text[1:-1].replace(",", " ").split()]


def _listed(value: Any) -> Collection[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _are(values: Collection[Any], kind: Any) -> bool:
    """Whether there are values, all numbers of ``kind``."""
    return bool(values) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _is_replication(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return _are([value], int)
    return _are(value.values(), int) and all(isinstance(key, str) for key in value)


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: _are([value], int),
    "str": lambda value: isinstance(value, str),
    "ints": lambda value: isinstance(value, list | tuple) and _are(value, int),
    "proportion": lambda value: _are(_listed(value), int | float),
    "replication": _is_replication,
    "mapping": lambda value: isinstance(value, Mapping),
}
_TEXT_READERS: Mapping[str, Callable[[str], Any]] = {  # maps have no text form
    "bool": lambda text: _BOOLS[text.lower()],
    "int": int,
    "replication": int,
    "str": str,
    "ints": lambda text: _entries(text, int),
    "proportion": lambda text: _entries(text, float) if text.startswith("[") else float(text),
}
