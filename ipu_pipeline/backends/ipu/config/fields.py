"""What a configuration field may hold: one small spec per field, checked by :func:`check_value`.

A spec names a *kind* of value. Every kind has one reader, which takes what JSON or a keyword
argument gave and returns the value to keep (lists become tuples, so that a config is immutable).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ipu_pipeline.errors import ConfigError

OUTPUT_MODES = ("all", "sum", "final", "default")
METADATA_KEY = "spec"


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


def config_field(
    kind: str,
    default: Any = None,
    *,
    minimum: int | None = None,
    optional: bool = False,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a dataclass field with a :class:`FieldSpec`; mappings stay out of the hash."""
    spec = FieldSpec(kind, minimum, optional, choices)
    return field(
        default=default,
        hash=False if kind in ("replication", "mapping") else None,
        metadata={METADATA_KEY: spec},
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
    return READERS[spec.kind](name, value, spec)


def _wrong_type(name: str, value: Any, spec: FieldSpec) -> ConfigError:
    return ConfigError(
        f"{name} must be {DESCRIPTIONS[spec.kind]}, got {type(value).__name__} {value!r}"
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_minimum(name: str, value: Any, shown: Any, spec: FieldSpec) -> None:
    if spec.minimum is not None and value < spec.minimum:
        raise ConfigError(f"{name} must be at least {spec.minimum}, got {shown!r}")


def _read_bool(name: str, value: Any, spec: FieldSpec) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, spec)
    return value


def _read_int(name: str, value: Any, spec: FieldSpec) -> int:
    if not _is_int(value):
        raise _wrong_type(name, value, spec)
    _check_minimum(name, value, value, spec)
    return int(value)


def _read_str(name: str, value: Any, spec: FieldSpec) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, spec)
    if spec.choices and value not in spec.choices:
        raise ConfigError(f"{name} must be one of {', '.join(spec.choices)}, got {value!r}")
    return value


def _read_ints(name: str, value: Any, spec: FieldSpec) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value or not all(map(_is_int, value)):
        raise _wrong_type(name, value, spec)
    for entry in value:
        _check_minimum(name, entry, list(value), spec)
    return tuple(value)


def _read_proportion(name: str, value: Any, spec: FieldSpec) -> float | tuple[float, ...]:
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries or not all(map(_is_number, entries)):
        raise _wrong_type(name, value, spec)
    if not all(0 <= entry <= 1 for entry in entries):
        raise ConfigError(
            f"{name} is a share of an IPU's memory, from 0 to 1, got {_listed(value)!r}"
        )
    return tuple(entries) if isinstance(value, list | tuple) else value


def _read_replication(name: str, value: Any, spec: FieldSpec) -> int | dict[str, int]:
    if _is_int(value):
        return _read_int(name, value, spec)
    if not isinstance(value, Mapping) or not value or not all(isinstance(k, str) for k in value):
        raise _wrong_type(name, value, spec)
    if not all(map(_is_int, value.values())):
        raise _wrong_type(name, value, spec)
    for entry in value.values():
        _check_minimum(name, entry, dict(value), spec)
    return dict(value)


def _read_mapping(name: str, value: Any, spec: FieldSpec) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong_type(name, value, spec)
    return dict(value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


DESCRIPTIONS: Mapping[str, str] = {
    "bool": "true or false",
    "int": "a whole number",
    "str": "a string",
    "ints": "a list of at least one whole number",
    "proportion": "a number or a list of numbers",
    "replication": 'a whole number, or a map such as {"pod16": 4, "default": 1}',
    "mapping": "a map",
}

READERS: Mapping[str, Callable[[str, Any, FieldSpec], Any]] = {
    "bool": _read_bool,
    "int": _read_int,
    "str": _read_str,
    "ints": _read_ints,
    "proportion": _read_proportion,
    "replication": _read_replication,
    "mapping": _read_mapping,
}
