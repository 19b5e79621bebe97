"""Schedules: which stage does what when. One object per schedule, in ``kinds/``.

    shape = PipelineShape.of(num_stages, num_microbatches, stage_devices, training=True)
    kind = schedule_kind("1f1b")          # ValueError lists schedule_names()
    kind.problem(shape)                   # why it cannot run so, with the remedy; "" if it can
    kind.rows(shape)                      # ir.Schedule, one row of actions per device
    kind.in_flight(shape)                 # microbatches that every stage keeps
    kind.objective(shape)                 # step time as rows and a sum, for the search
    kind.least_microbatches(shape)
    kind.place(num_stages, num_devices)   # device of every stage, None where it does not fit
    step_seconds(kind, shape, prices)     # THE step price: the exact replay, one StagePrice each
    critical_paths(kind, shape)           # linear forms that no replay can be below

A schedule from outside is one :class:`ScheduleKind` object, named by an entry point of group
``ipu_pipeline.schedules``; a name of ours is not looked for there. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from ipu_pipeline.ir.entry_points import installed
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind
from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.schedules.replay import critical_paths, step_seconds

__all__ = [
    "PipelineShape",
    "ScheduleKind",
    "StagePrice",
    "critical_paths",
    "schedule_kind",
    "schedule_names",
    "step_seconds",
]

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
        kind
        for module in iter_modules(kinds.__path__)
        for kind in import_module(f"{kinds.__name__}.{module.name}").SCHEDULES
    ]
    found.sort(key=lambda kind: (kind.name not in _FIRST, kind.name))
    return {kind.name: kind for kind in found}


def _installed() -> Iterator[ScheduleKind]:
    for point in installed(GROUP):
        kind = point.load()
        if not isinstance(kind, ScheduleKind):
            raise ValueError(
                f"entry point {point.name!r} of group {GROUP} gives {type(kind).__name__}; it "
                "must give a ScheduleKind object"
            )
        yield kind
