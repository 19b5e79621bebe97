"""Choosing blocks by name, prefix or pattern; every place where a user names blocks uses it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def select(pattern: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return those of ``names`` that ``pattern`` means, in their order.

    A block's own name means that block alone. Otherwise the pattern is a dotted prefix
    (``encoder.layer.3`` means ``encoder.layer.3.attention``, never ``encoder.layer.30``) or has
    wildcards (``encoder.layer.*``, ``*.[0-2]``).
    """
    known = tuple(names)
    if pattern in known:
        return (pattern,)
    return tuple(
        name
        for name in known
        if name.startswith((f"{pattern}.", f"{pattern}#")) or fnmatchcase(name, pattern)
    )


def select_all(patterns: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Return those of ``names`` that any of ``patterns`` means, in their order."""
    known = tuple(names)
    chosen = {name for pattern in patterns for name in select(pattern, known)}
    return tuple(name for name in known if name in chosen)


def unmatched(patterns: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns that mean none of ``names``."""
    known = tuple(names)
    return tuple(pattern for pattern in patterns if not select(pattern, known))
