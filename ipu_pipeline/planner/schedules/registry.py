"""Finds schedules by name: files in ``kinds/``, then entry points of ``ipu_pipeline.schedules``.

Each gives one :class:`ScheduleKind`. An entry point that takes a name of ours is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from ipu_pipeline.planner.schedules.kind import ScheduleKind

GROUP = "ipu_pipeline.schedules"
_FIRST = ("1f1b", "gpipe")  # in messages


def schedule_kind(name: str) -> ScheduleKind:
    """Return the schedule called ``name``.

    Raises:
        ValueError: There is none.
    """
    kind = _built_in().get(name) or next((k for k in _installed() if k.name == name), None)
    if kind is None:
        raise ValueError(f"schedule {name!r} is unknown; use one of {', '.join(schedule_names())}")
    return kind


def schedule_names() -> tuple[str, ...]:
    """Return the names of all schedules."""
    return tuple(dict.fromkeys([*_built_in(), *(kind.name for kind in _installed())]))


@cache
def _built_in() -> dict[str, ScheduleKind]:
    from ipu_pipeline.planner.schedules import kinds

    found = [
        import_module(f"{kinds.__name__}.{module.name}").SCHEDULE
        for module in iter_modules(kinds.__path__)
    ]
    found.sort(key=lambda kind: (kind.name not in _FIRST, kind.name))
    return {kind.name: kind for kind in found}


def _installed() -> Iterator[ScheduleKind]:
    for point in entry_points(group=GROUP):
        kind = point.load()
        if not isinstance(kind, ScheduleKind):
            raise ValueError(
                f"entry point {point.name!r} of group {GROUP} gives {type(kind).__name__}; it "
                "must give a ScheduleKind object"
            )
        yield kind
