"""Interleaved 1F1B whose backward passes are split, so that weights' gradients fill the bubbles.

Step time for equal stages whose forward pass and halves of the backward pass take f seconds each:
``3 G v f + (P-1) f`` from G = P on, ``2 G v f + P v f + (P-1) f`` from G = P/2 on, and with fewer
microbatches ``2 P v f + (2 G - 1) f``.

Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, ZB1P (figure 3), in loops as
``torch.distributed.pipelining.ScheduleInterleavedZeroBubble`` does, whose order this is.
"""

from __future__ import annotations

from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind, in_loops
from ipu_pipeline.planner.schedules.kinds.interleaved import (
    looped,
    looped_weights,
    period_of_groups,
    uneven_groups,
)
from ipu_pipeline.planner.schedules.objective import Objective

NAME = "interleaved_zero_bubble"


def interleaved_zero_bubble(shape: PipelineShape) -> Schedule:
    """Return one row per device, each with ``3 v G`` actions."""
    made = looped(shape, hops=1, delayed=True)
    return Schedule(NAME, made.num_stages, made.num_microbatches, made.rows)


def _objective(shape: PipelineShape) -> Objective:
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


SCHEDULE = ScheduleKind(
    name=NAME,
    summary="interleaved with split backward passes that fill the bubbles",
    make_rows=interleaved_zero_bubble,
    make_objective=_objective,
    why_not=lambda shape: uneven_groups(NAME, shape),
    place=in_loops,
    stages_per_device=(2, 3, 4),
    splits_backward=True,
    period=period_of_groups,
    torch_class="ScheduleInterleavedZeroBubble",
)
