"""Find a schedule by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.schedules.gpipe import gpipe
from ipu_pipeline.planner.schedules.grouped import grouped
from ipu_pipeline.planner.schedules.interleaved import interleaved
from ipu_pipeline.planner.schedules.one_f_one_b import one_f_one_b


def build_schedule(
    name: str,
    num_stages: int,
    num_microbatches: int,
    stage_devices: Sequence[int] | None = None,
) -> Schedule:
    """Build the training schedule called ``name``.

    ``1f1b`` and ``gpipe`` give one row per stage, ``interleaved`` and ``popart`` one per device.

    Args:
        name: ``1f1b``, ``gpipe``, ``interleaved`` or ``popart``.
        num_stages: Pipeline depth, at least 1.
        num_microbatches: Microbatches per optimizer step, at least 1.
        stage_devices: Device of every stage; ``None``: one device each.

    Raises:
        ValueError: The name is unknown, a count is out of range, or the schedule cannot run
            with these devices.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; use one of {', '.join(SCHEDULES)}")
    devices = tuple(range(num_stages)) if stage_devices is None else tuple(stage_devices)
    return SCHEDULES[name](num_stages, num_microbatches, devices)


def _in_loops(num_stages: int, num_microbatches: int, devices: tuple[int, ...]) -> Schedule:
    """Build the interleaved schedule, whose stages visit the devices in loops."""
    loop = tuple(dict.fromkeys(devices))
    expected = tuple(loop[stage % len(loop)] for stage in range(len(devices)))
    if devices != expected:
        raise ValueError(
            f"interleaved 1F1B visits the devices in loops: stages on devices {list(devices)} "
            f"must be on {list(expected)}"
        )
    return interleaved(num_stages, num_microbatches, max(1, len(loop)))


SCHEDULES: Mapping[str, Callable[[int, int, tuple[int, ...]], Schedule]] = {
    "1f1b": lambda stages, microbatches, _: one_f_one_b(stages, microbatches),
    "gpipe": lambda stages, microbatches, _: gpipe(stages, microbatches),
    "interleaved": _in_loops,
    "popart": grouped,
}
