"""Breadth-first schedule: a device runs all microbatches of its stage before its next stage.

Stages visit P devices in ``v`` loops, forward passes first, then backward passes from the last
microbatch to the first; every microbatch is kept. The step time is that of
``interleaved``: each loop takes ``max(G, P)`` passes.

Source: Lamy-Poirier, Breadth-First Pipeline Parallelism, MLSys 2023; the order is that of
``torch.distributed.pipelining.ScheduleLoopedBFS``.
"""

from __future__ import annotations

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind, in_loops
from ipu_pipeline.planner.schedules.kinds.interleaved import looped_weights
from ipu_pipeline.planner.schedules.objective import Objective


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


SCHEDULE = ScheduleKind(
    name="looped_bfs",
    summary="gpipe with several stages per device, in loops",
    make_rows=looped_bfs,
    make_objective=lambda shape: Objective.paced_apart(*looped_weights(shape), shape.num_stages),
    make_in_flight=lambda shape: [shape.num_microbatches] * shape.num_stages,
    place=in_loops,
    stages_per_device=(2, 3, 4),
    torch_class="ScheduleLoopedBFS",
)
