"""Several stages per device, visited in loops, to shorten fill and flush.

Device ``d`` of P holds the ``v`` stages ``d, d + P, ...``. Each microbatch crosses ``v`` times as
many boundaries. Source: Narayanan et al., Megatron-LM, SC 2021, section 2.2.2.

**interleaved**: 1F1B in loops. Microbatches go round in groups of P; where their number G is no
multiple of P, the groups are larger: ``G // max(1, G // P)`` microbatches, which must divide G.
Step time for equal stages of t seconds: ``G v t + (P-1) t``; with G below P, ``(G + P v - 1) t``.
The order, with its larger groups, is that of
``torch.distributed.pipelining.ScheduleInterleaved1F1B``.

**interleaved_zero_bubble**: its backward passes are split, so that weights' gradients fill the
bubbles. Step time for equal stages whose forward pass and halves of the backward pass take f
seconds each: ``3 G v f + (P-1) f`` from G = P on, ``2 G v f + P v f + (P-1) f`` from G = P/2 on,
and with fewer microbatches ``2 P v f + (2 G - 1) f``. Source: Qi et al., Zero Bubble Pipeline
Parallelism, ICLR 2024, ZB1P (figure 3); the order is that of torch's
``ScheduleInterleavedZeroBubble``.

**looped_bfs**: a device runs all microbatches of its stage before its next stage, forward passes
first, then backward passes from the last microbatch to the first; every microbatch is kept. The
step time is that of ``interleaved``: each loop takes ``max(G, P)`` passes. Source: Lamy-Poirier,
Breadth-First Pipeline Parallelism, MLSys 2023; the order is that of torch's ``ScheduleLoopedBFS``.
"""

from __future__ import annotations

from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind, in_loops
from ipu_pipeline.planner.schedules.objective import Objective
from ipu_pipeline.planner.schedules.rows import RowWriter

_ZERO_BUBBLE = "interleaved_zero_bubble"


def looped(name: str, shape: PipelineShape, *, hops: int, delayed: bool) -> Schedule:
    """Return the rows of a schedule that sends groups of microbatches round the devices.

    Forward number k of a device belongs to loop ``k // group``; backward passes visit the loops
    in the opposite direction. Forwards run ahead of the first backward pass, then both in turn.

    Args:
        name: Of the schedule.
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
    return Schedule(name, shape.num_stages, shape.num_microbatches, tuple(rows))


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


def looped_weights(shape: PipelineShape) -> tuple[float, float]:
    """Return the weights of the busiest device and of the sum over all stages."""
    count, loops = shape.num_microbatches, shape.loops
    if count >= shape.num_devices:
        return count - 1 / loops, 1 / loops
    return (count - 1) / loops, 1


INTERLEAVED = ScheduleKind(
    name="interleaved",
    summary="1f1b with several stages per device, in loops: shorter fill and flush",
    make_rows=lambda shape: looped("interleaved", shape, hops=2, delayed=False),
    make_objective=lambda shape: Objective.paced(*looped_weights(shape), shape.num_stages),
    why_not=lambda shape: uneven_groups("interleaved", shape),
    place=in_loops,
    stages_per_device=(2, 3, 4),
    period=period_of_groups,
    torch_class="ScheduleInterleaved1F1B",
)


def _zero_bubble_objective(shape: PipelineShape) -> Objective:
    """Write the formulas with the busiest device's ``3 v f`` and the sum ``3 P v f``."""
    count, third = shape.num_microbatches, 1 / (3 * shape.loops)
    if not shape.training:
        weights = looped_weights(shape)
    elif count >= shape.num_devices:
        weights = count - third, third
    elif 2 * count >= shape.num_devices:
        weights = 2 * count / 3 - third, 1 / 3 + third
    else:
        weights = (2 * count - 1) * third, 2 / 3
    return Objective.paced(*weights, shape.num_stages)


INTERLEAVED_ZERO_BUBBLE = ScheduleKind(
    name=_ZERO_BUBBLE,
    summary="interleaved with split backward passes that fill the bubbles",
    make_rows=lambda shape: looped(_ZERO_BUBBLE, shape, hops=1, delayed=True),
    make_objective=_zero_bubble_objective,
    why_not=lambda shape: uneven_groups(_ZERO_BUBBLE, shape),
    place=in_loops,
    stages_per_device=(2, 3, 4),
    splits_backward=True,
    period=period_of_groups,
    torch_class="ScheduleInterleavedZeroBubble",
)


def looped_bfs(shape: PipelineShape) -> Schedule:
    """Return one row per device, each with ``2 v G`` actions."""
    rows = []
    for device in range(shape.num_devices):
        stages = range(device, shape.num_stages, shape.num_devices)
        order = [(stage, m) for stage in stages for m in range(shape.num_microbatches)]
        rows.append(
            (
                *(Action(stage, "F", microbatch) for stage, microbatch in order),
                *(Action(stage, "B", microbatch) for stage, microbatch in reversed(order)),
            )
        )
    return Schedule("looped_bfs", shape.num_stages, shape.num_microbatches, tuple(rows))


LOOPED_BFS = ScheduleKind(
    name="looped_bfs",
    summary="gpipe with several stages per device, in loops",
    make_rows=looped_bfs,
    make_objective=lambda shape: Objective.paced_apart(*looped_weights(shape), shape.num_stages),
    make_in_flight=lambda shape: [shape.num_microbatches] * shape.num_stages,
    place=in_loops,
    stages_per_device=(2, 3, 4),
    torch_class="ScheduleLoopedBFS",
)

SCHEDULES = (INTERLEAVED, INTERLEAVED_ZERO_BUBBLE, LOOPED_BFS)
