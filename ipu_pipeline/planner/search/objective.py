"""Step times for the search: those of the schedules, and ``maxload``.

``maxload`` is no schedule but the objective of the public instances: seconds per microbatch of the
busiest device in steady state, with one microbatch held.
"""

from __future__ import annotations

from collections.abc import Sequence

from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind, schedule_names
from ipu_pipeline.planner.schedules.objective import Objective, PacedTerm

MAXLOAD = "maxload"

__all__ = [
    "MAXLOAD",
    "Objective",
    "PacedTerm",
    "check_schedule_name",
    "in_flight",
    "least_microbatches",
    "make_objective",
    "schedule_problem",
    "stages_in_flight",
]


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
    """Build the step time of ``schedule``.

    Args:
        schedule: Name of a schedule, or ``maxload``.
        num_stages: Stages of the forward pass, at least 1.
        num_microbatches: Microbatches per optimizer step and replica, at least 1.
        devices: Device of every stage; ``None``: a device each.
        training: Whether there is a backward pass.

    Raises:
        ValueError: The schedule cannot run so.
    """
    if schedule == MAXLOAD:
        return Objective.paced(1, 0, num_stages)
    shape = PipelineShape.of(num_stages, num_microbatches, devices, training=training)
    return schedule_kind(schedule).objective(shape)


def schedule_problem(
    schedule: str, devices: Sequence[int], num_microbatches: int, *, training: bool = True
) -> str:
    """Return why ``schedule`` cannot run stages on ``devices``; empty: it can."""
    if schedule == MAXLOAD:
        return ""
    shape = PipelineShape.of(len(devices), num_microbatches, devices, training=training)
    return schedule_kind(schedule).problem(shape)


def least_microbatches(
    schedule: str, num_stages: int, devices: Sequence[int] | None = None, *, training: bool = True
) -> int:
    """Return the fewest microbatches per step that ``schedule`` accepts (PopART: its stages)."""
    if schedule == MAXLOAD:
        return 1
    shape = PipelineShape.of(num_stages, 1, devices, training=training)
    return schedule_kind(schedule).least_microbatches(shape)


def stages_in_flight(
    schedule: str, devices: Sequence[int], num_microbatches: int, *, training: bool = True
) -> tuple[int, ...]:
    """Return how many microbatches every stage keeps, stages being on ``devices``."""
    if schedule == MAXLOAD:
        return (1,) * len(devices)
    shape = PipelineShape.of(len(devices), num_microbatches, devices, training=training)
    return schedule_kind(schedule).in_flight(shape)


def in_flight(
    schedule: str, stages_to_end: int, num_microbatches: int, *, training: bool = True
) -> int:
    """Return how many microbatches a stage keeps; ``stages_to_end`` counts the stage itself.

    For schedules with several stages per device: the last stage on one device.
    """
    if schedule == MAXLOAD or not training:
        return 1
    kind = schedule_kind(schedule)
    if kind.any_devices:
        return kind.in_flight(PipelineShape.of(stages_to_end, num_microbatches))[0]
    depth = kind.stages_per_device[0]
    return kind.in_flight(PipelineShape.of(depth, num_microbatches, (0,) * depth))[-1]
