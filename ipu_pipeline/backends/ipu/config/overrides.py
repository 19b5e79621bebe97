"""The text form of changes to a configuration: ``a=1,b=[0.2 0.3],c=true``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ipu_pipeline.backends.ipu.config.fields import DESCRIPTIONS, FieldSpec
from ipu_pipeline.errors import ConfigError

# A comma separates two settings unless it stands inside brackets.
_SEPARATOR = re.compile(r",(?![^\[]*\])")
_TRUE = frozenset({"true", "1", "yes", "y"})
_FALSE = frozenset({"false", "0", "no", "n"})
_NONE = frozenset({"none", "null"})


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
        found[name] = _convert(name, value, specs[name])
    return found


def unknown_key(name: str, known: Mapping[str, Any]) -> str:
    """Return the message for a key that no field has, with the closest known ones."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
    return f"unknown configuration key {name!r}; {hint}"


def _convert(name: str, text: str, spec: FieldSpec) -> Any:
    if spec.optional and text.lower() in _NONE:
        return None
    try:
        return _convert_kind(text, spec.kind)
    except ValueError:
        raise ConfigError(
            f"override {name}={text}: expected {DESCRIPTIONS[spec.kind]}"
            f"{', written [1 2 3]' if spec.kind in ('ints', 'proportion') else ''}"
        ) from None


def _convert_kind(text: str, kind: str) -> Any:
    if kind == "bool":
        return _to_bool(text)
    if kind in ("int", "replication"):
        return int(text)
    if kind == "str":
        return text
    if kind == "ints":
        return [int(entry) for entry in _entries(text)]
    if kind == "proportion":
        return [float(entry) for entry in _entries(text)] if text.startswith("[") else float(text)
    raise ValueError(kind)  # maps have no text form


def _to_bool(text: str) -> bool:
    lowered = text.lower()
    if lowered not in _TRUE | _FALSE:
        raise ValueError(text)
    return lowered in _TRUE


def _entries(text: str) -> list[str]:
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(text)
    return text[1:-1].replace(",", " ").split()
