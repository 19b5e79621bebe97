"""Schedules as the search knows them: those that run, and ``maxload``.

``maxload`` is no schedule but the objective of the public instances: seconds per microbatch of the
busiest device in steady state, with one microbatch held.
"""

from __future__ import annotations

from collections.abc import Sequence

from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.schedules import (
    PipelineShape,
    ScheduleKind,
    schedule_kind,
    schedule_names,
)
from ipu_pipeline.planner.schedules.objective import Objective, PacedTerm

__all__ = [
    "MAXLOAD",
    "Objective",
    "PacedTerm",
    "check_schedule_name",
    "in_flight",
    "least_microbatches",
    "make_objective",
    "search_kind",
    "stages_in_flight",
]


def _no_rows(shape: PipelineShape) -> Schedule:
    raise ValueError(f"maxload has no rows for {shape.num_stages} stages: it cannot run")


MAXLOAD = "maxload"
_MAXLOAD = ScheduleKind(
    MAXLOAD,
    make_rows=_no_rows,
    make_objective=lambda shape: Objective.paced(1, 0, shape.num_stages),
    make_in_flight=lambda shape: (1,) * shape.num_stages,
    any_devices=True,
    lock_stepped=True,
)


def search_kind(schedule: str) -> ScheduleKind:
    """Return the schedule that the search knows as ``schedule``.

    Raises:
        ValueError: There is none.
    """
    return _MAXLOAD if schedule == MAXLOAD else schedule_kind(schedule)


def check_schedule_name(schedule: str) -> None:
    """Refuse a name that no schedule has.

    Raises:
        ValueError: Lists the known ones.
    """
    known = (*schedule_names(), MAXLOAD)
    if schedule not in known:
        raise ValueError(f"schedule {schedule!r} is unknown; use one of {', '.join(known)}")


def make_objective(
    schedule: str,
    num_stages: int,
    num_microbatches: int,
    devices: Sequence[int] | None = None,
    *,
    training: bool = True,
) -> Objective:
    """Build the step time of ``schedule``; ``devices=None``: a device each.

    Raises:
        ValueError: The schedule cannot run so.
    """
    shape = PipelineShape.of(num_stages, num_microbatches, devices, training=training)
    return search_kind(schedule).objective(shape)


def least_microbatches(
    schedule: str, num_stages: int, devices: Sequence[int] | None = None, *, training: bool = True
) -> int:
    """Return the fewest microbatches per step that ``schedule`` accepts (PopART: its stages)."""
    shape = PipelineShape.of(num_stages, 1, devices, training=training)
    return search_kind(schedule).least_microbatches(shape)


def stages_in_flight(
    schedule: str, devices: Sequence[int], num_microbatches: int, *, training: bool = True
) -> tuple[int, ...]:
    """Return how many microbatches every stage keeps, stages being on ``devices``."""
    shape = PipelineShape.of(len(devices), num_microbatches, devices, training=training)
    return search_kind(schedule).in_flight(shape)


def in_flight(
    schedule: str, stages_to_end: int, num_microbatches: int, *, training: bool = True
) -> int:
    """Return how many microbatches a stage keeps; ``stages_to_end`` counts the stage itself.

    For schedules with several stages per device: the last stage on one device.
    """
    kind = search_kind(schedule)
    if kind.any_devices or not training:
        shape = PipelineShape.of(stages_to_end, num_microbatches, training=training)
        return kind.in_flight(shape)[0]
    depth = kind.stages_per_device[0]
    return kind.in_flight(PipelineShape.of(depth, num_microbatches, (0,) * depth))[-1]
