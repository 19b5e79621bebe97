"""Find a schedule by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.schedule.gpipe import gpipe
from ipu_pipeline.schedule.one_f_one_b import one_f_one_b

SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = {"1f1b": one_f_one_b, "gpipe": gpipe}


def build_schedule(name: str, num_stages: int, num_microbatches: int) -> Schedule:
    """Build the schedule called ``name``.

    Raises:
        ValueError: The name is unknown, or a count is below 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; use one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](num_stages, num_microbatches)
