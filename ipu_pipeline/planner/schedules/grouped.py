"""PopART's schedule under its former name."""

from __future__ import annotations

from collections.abc import Sequence

from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape
from ipu_pipeline.planner.schedules.kinds.popart import SCHEDULE, PipelineStages, cycles

__all__ = ["PipelineStages", "cycles", "grouped"]


def grouped(
    num_stages: int,
    num_microbatches: int,
    stage_devices: Sequence[int] | None = None,
    *,
    training: bool = True,
) -> Schedule:
    """Return its rows."""
    shape = PipelineShape.of(num_stages, num_microbatches, stage_devices, training=training)
    return SCHEDULE.rows(shape)
