"""GPipe: all forward passes, then all backward passes; every microbatch is kept.

Step time ``(G-1) (max_s f_s + max_s b_s) + sum_s (f_s+b_s)``, exact for any stages that have a
device each.

Source: Huang et al., GPipe, NeurIPS 2019, section 2.3 and figure 2.
"""

from __future__ import annotations

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind
from ipu_pipeline.planner.schedules.objective import Objective, Path


def gpipe(shape: PipelineShape) -> Schedule:
    """Return one row per stage, each with ``2 * num_microbatches`` actions."""
    microbatches = range(shape.num_microbatches)
    rows = tuple(
        (
            *(Action(stage, "F", microbatch) for microbatch in microbatches),
            *(Action(stage, "B", microbatch) for microbatch in microbatches),
        )
        for stage in range(shape.num_stages)
    )
    return Schedule("gpipe", shape.num_stages, shape.num_microbatches, rows)


def _paths(shape: PipelineShape) -> list[Path]:
    """All forward passes of one stage, all backward passes of one, and the way there and back."""
    stages, more = range(shape.num_stages), shape.num_microbatches - 1
    return [
        Path(
            tuple(1.0 + more * (stage == slow) for stage in stages),
            tuple(1.0 + more * (stage == slowest) for stage in stages),
        )
        for slow in stages
        for slowest in stages
    ]


SCHEDULE = ScheduleKind(
    name="gpipe",
    summary="all forward passes, then all backward passes; one stage per device",
    make_rows=gpipe,
    make_objective=lambda shape: Objective.paced_apart(
        shape.num_microbatches - 1, 1, shape.num_stages
    ),
    make_in_flight=lambda shape: [shape.num_microbatches] * shape.num_stages,
    make_paths=_paths,
    any_devices=True,
    exact_apart=True,
    torch_class="ScheduleGPipe",
)
