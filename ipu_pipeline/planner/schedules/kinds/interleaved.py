"""Interleaved 1F1B: several stages per device, visited in loops, to shorten fill and flush.

Device ``d`` of P holds the ``v`` stages ``d, d + P, ...``. Each microbatch crosses ``v`` times as
many boundaries. Microbatches go round in groups of P; where their number G is no multiple of P,
the groups are larger: ``G // max(1, G // P)`` microbatches, which must divide G.

Step time for equal stages of t seconds: ``G v t + (P-1) t``; with G below P, ``(G + P v - 1) t``.

Source: Narayanan et al., Megatron-LM, SC 2021, section 2.2.2. The larger groups are those of
``torch.distributed.pipelining.ScheduleInterleaved1F1B``, whose order this is.
"""

from __future__ import annotations

from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind, in_loops
from ipu_pipeline.planner.schedules.objective import Objective
from ipu_pipeline.planner.schedules.rows import RowWriter


def looped(shape: PipelineShape, *, hops: int, delayed: bool) -> Schedule:
    """Return the rows of a schedule that sends groups of microbatches round the devices.

    Forward number k of a device belongs to loop ``k // group``; backward passes visit the loops
    in the opposite direction. Forwards run ahead of the first backward pass, then both in turn.

    Args:
        shape: Stages in loops.
        hops: Forward passes ahead for every device between here and the last one.
        delayed: Backward passes are split; device ``d`` computes the gradients of its weights
            ``d`` backward passes later.
    """
    group, loops, num_devices = group_size(shape), shape.loops, shape.num_devices
    total = loops * shape.num_microbatches
    rows = []
    for device in range(num_devices):
        writer = RowWriter()
        warmup = min((loops - 1) * group + hops * (num_devices - 1 - device), total)
        for number in range(-warmup, total):
            if number + warmup < total:
                loop = (number + warmup) // group % loops
                writer.add(loop * num_devices + device, "F")
            if number >= 0:
                loop = loops - 1 - number // group % loops
                writer.add(loop * num_devices + device, "I" if delayed else "B")
                if delayed and number >= device:
                    writer.weights()
        while writer.weights():
            pass
        rows.append(tuple(writer.row))
    return Schedule("", shape.num_stages, shape.num_microbatches, tuple(rows))


def group_size(shape: PipelineShape) -> int:
    """Return the microbatches of a group; they may leave a rest, see :func:`uneven_groups`."""
    return shape.num_microbatches // max(1, shape.num_microbatches // shape.num_devices)


def uneven_groups(name: str, shape: PipelineShape) -> str:
    """Return why the microbatches cannot go round in groups; empty: they can."""
    groups = max(1, shape.num_microbatches // shape.num_devices)
    if shape.num_microbatches % groups == 0:
        return ""
    return (
        f"schedule {name} sends microbatches round in {groups} equal groups of at least "
        f"{shape.num_devices}: {count_of(shape.num_microbatches, 'microbatch')} do not divide; use "
        f"a multiple of {shape.num_devices}"
    )


def period_of_groups(shape: PipelineShape) -> int:
    """Return the microbatches of a group where every group is a full one of its kind."""
    return 0 if shape.num_microbatches % shape.num_devices else shape.num_devices


def interleaved(shape: PipelineShape) -> Schedule:
    """Return one row per device, each with ``2 v G`` actions."""
    made = looped(shape, hops=2, delayed=False)
    return Schedule("interleaved", made.num_stages, made.num_microbatches, made.rows)


def looped_weights(shape: PipelineShape) -> tuple[float, float]:
    """Return the weights of the busiest device and of the sum over all stages."""
    count, loops = shape.num_microbatches, shape.loops
    if count >= shape.num_devices:
        return count - 1 / loops, 1 / loops
    return (count - 1) / loops, 1


SCHEDULE = ScheduleKind(
    name="interleaved",
    summary="1f1b with several stages per device, in loops: shorter fill and flush",
    make_rows=interleaved,
    make_objective=lambda shape: Objective.paced(*looped_weights(shape), shape.num_stages),
    why_not=lambda shape: uneven_groups("interleaved", shape),
    place=in_loops,
    stages_per_device=(2, 3, 4),
    period=period_of_groups,
    torch_class="ScheduleInterleaved1F1B",
)
