"""Passes by name; the module of a pass is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from ipu_pipeline.planner.passes.base import Pass

# name -> (module, class) of a frozen dataclass that is a Pass.
_PASSES: Mapping[str, tuple[str, str]] = {
    "serialize_embedding": (
        "ipu_pipeline.planner.passes.serialize_embedding",
        "SerializeEmbedding",
    ),
    "serialize_projection": (
        "ipu_pipeline.planner.passes.serialize_projection",
        "SerializeProjection",
    ),
    "recompute": ("ipu_pipeline.planner.passes.recompute", "Recompute"),
}


def available_passes() -> tuple[str, ...]:
    """Return the names of all passes."""
    return tuple(_PASSES)


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Return the pass called ``name`` with ``options``.

    Raises:
        ValueError: There is no such pass; an option is unknown, missing or out of range.
    """
    if name not in _PASSES:
        raise ValueError(f"unknown pass {name!r}; passes: {', '.join(available_passes())}")
    module, attribute = _PASSES[name]
    kind = getattr(import_module(module), attribute)
    known = [item.name for item in fields(kind)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(
            f"pass {name} has no option {', '.join(unknown)}; its options: {', '.join(known)}"
        )
    try:
        made: Pass = kind(**options)
    except TypeError as error:
        raise ValueError(f"pass {name} misses an option: {error}") from error
    return made
