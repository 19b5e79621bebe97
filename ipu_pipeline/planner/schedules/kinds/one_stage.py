"""1F1B and GPipe: a device has one stage, and the pipeline is filled and emptied once per step.

**1F1B**: a warm-up, then one forward and one backward in turn, then a cool-down. Stage ``s`` keeps
at most ``num_stages - s`` microbatches in flight, so its peak activation memory does not grow with
the number of microbatches. Fewer microbatches than stages are fine. Step time
``(G-1) max_s (f_s+b_s) + sum_s (f_s+b_s)``: the busiest stage paces G-1 microbatches, one
microbatch runs through all stages to fill and flush. Exact for equal stages; otherwise the pace is
exact and fill and flush are those of one microbatch that meets nobody.

Source: Narayanan et al., PipeDream, SOSP 2019, section 3.2; Megatron-LM, SC 2021, section 2.2.

**GPipe**: all forward passes, then all backward passes; every microbatch is kept. Step time
``(G-1) (max_s f_s + max_s b_s) + sum_s (f_s+b_s)``, exact for any stages that have a device each.

Source: Huang et al., GPipe, NeurIPS 2019, section 2.3 and figure 2.
"""

from __future__ import annotations

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind
from ipu_pipeline.planner.schedules.objective import Objective, Path


def one_f_one_b(shape: PipelineShape) -> Schedule:
    """Return one row per stage, each with ``2 * num_microbatches`` actions."""
    depth, count = shape.num_stages, shape.num_microbatches
    return Schedule("1f1b", depth, count, tuple(_row(s, depth, count) for s in range(depth)))


def _row(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    warmup = min(num_stages - 1 - stage, num_microbatches)
    row = [Action(stage, "F", microbatch) for microbatch in range(warmup)]
    for microbatch in range(num_microbatches - warmup):
        row.append(Action(stage, "F", warmup + microbatch))
        row.append(Action(stage, "B", microbatch))
    row.extend(
        Action(stage, "B", microbatch)
        for microbatch in range(num_microbatches - warmup, num_microbatches)
    )
    return tuple(row)


def _one_f_one_b_paths(shape: PipelineShape) -> list[Path]:
    """Dependency paths through the steady part of every stage s, w stages before the last.

    The first microbatch runs to the end and back to s, which computes ``G-w-1`` pairs; the last
    one goes on to the end and back to the first stage. Or: all of the stage's passes, with the
    forward passes before it and the backward passes behind. Where the vocabulary is spread, a stage
    has run one microbatch more forward before the first one comes back.
    """
    depth, count = shape.num_stages, shape.num_microbatches
    found, ahead = [], min(1, len(shape.spread))
    for stage in range(depth):
        behind = depth - 1 - stage
        found.append(Path.of([1] * stage + [count] + [0] * behind))
        if count > behind + ahead:
            found.append(Path.of([1] * stage + [count - behind - ahead] + [2] * behind))
    return found


ONE_F_ONE_B = ScheduleKind(
    name="1f1b",
    summary="one forward, one backward in turn; one stage per device, least memory",
    make_rows=one_f_one_b,
    make_objective=lambda shape: Objective.paced(shape.num_microbatches - 1, 1, shape.num_stages),
    make_in_flight=lambda shape: [
        min(shape.num_stages - stage, shape.num_microbatches) for stage in range(shape.num_stages)
    ],
    make_paths=_one_f_one_b_paths,
    any_devices=True,
    period=lambda _: 1,
    torch_class="Schedule1F1B",
    torch_needs_depth=True,
)


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


def _gpipe_paths(shape: PipelineShape) -> list[Path]:
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


GPIPE = ScheduleKind(
    name="gpipe",
    summary="all forward passes, then all backward passes; one stage per device",
    make_rows=gpipe,
    make_objective=lambda shape: Objective.paced_apart(
        shape.num_microbatches - 1, 1, shape.num_stages
    ),
    make_in_flight=lambda shape: [shape.num_microbatches] * shape.num_stages,
    make_paths=_gpipe_paths,
    any_devices=True,
    exact_apart=True,
    torch_class="ScheduleGPipe",
)

SCHEDULES = (ONE_F_ONE_B, GPIPE)
