"""What is installed beside the package: schedules, passes, machines and backends."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points


def installed(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group; the packages on a path are looked through once."""
    return _on_path(group, tuple(sys.path))


@lru_cache(maxsize=64)
def _on_path(group: str, _path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))
