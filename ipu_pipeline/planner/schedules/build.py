"""Rows by the name of a schedule, as they were asked for before there was a registry."""

from __future__ import annotations

from collections.abc import Sequence

from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape
from ipu_pipeline.planner.schedules.registry import schedule_kind


def build_schedule(
    name: str,
    num_stages: int,
    num_microbatches: int,
    stage_devices: Sequence[int] | None = None,
) -> Schedule:
    """Return the training rows of ``name``."""
    return schedule_kind(name).rows(PipelineShape.of(num_stages, num_microbatches, stage_devices))
