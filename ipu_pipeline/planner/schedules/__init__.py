"""Schedules: which stage does what when. One file of ``kinds/`` and one object per schedule.

    shape = PipelineShape.of(num_stages, num_microbatches, stage_devices, training=True)
    kind = schedule_kind("1f1b")          # ValueError lists schedule_names()
    kind.problem(shape)                   # why it cannot run so, with the remedy; "" if it can
    kind.rows(shape)                      # ir.Schedule, one row of actions per device
    kind.in_flight(shape)                 # microbatches that every stage keeps
    kind.objective(shape)                 # step time as rows and a sum, for the search
    kind.least_microbatches(shape)
    kind.place(num_stages, num_devices)   # device of every stage, None where it does not fit
    step_seconds(kind, shape, times)      # THE step price: the exact replay, one StageTimes each
    critical_paths(kind, shape)           # linear forms that no replay can be below
    bound_seconds(kind, shape, times)     # the longest of them

A schedule from outside is one :class:`ScheduleKind` object, named by an entry point of group
``ipu_pipeline.schedules``. No torch here.
"""

from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind
from ipu_pipeline.planner.schedules.registry import schedule_kind, schedule_names
from ipu_pipeline.planner.schedules.replay import (
    StageTimes,
    bound_seconds,
    critical_paths,
    step_seconds,
)

__all__ = [
    "PipelineShape",
    "ScheduleKind",
    "StageTimes",
    "bound_seconds",
    "critical_paths",
    "schedule_kind",
    "schedule_names",
    "step_seconds",
]
