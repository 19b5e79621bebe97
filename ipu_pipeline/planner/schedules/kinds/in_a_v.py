"""ZB-V and DualPipeV: two stages per device in a V, with split backward passes.

Device ``d`` of P holds stages ``d`` and ``2P - 1 - d``, so the device of the first stage has the
last one, too: backward passes begin where forward passes end, and all devices keep equally much.

**zbv**: no bubble once it is filled. Step time for equal stages whose forward pass and halves of
the backward pass take f seconds each: ``6 G f + max(P-1, 4 (P-1) - 2 (G-1)) f``. In inference
microbatches go down and up the V: ``2 G f + 2 (P-1) f``. Source: Qi et al., Pipeline Parallelism
with Controllable Memory, NeurIPS 2024, figure 1 (ZB-V in Zero Bubble Pipeline Parallelism, ICLR
2024, section 6); the order is that of
``torch.distributed.pipelining.ScheduleZBVZeroBubble``.

**dualpipev**: forward and backward passes of two microbatches in turn; whole backward passes in
the steady part, split ones where there would be a bubble. Where torch overlaps a forward with a
backward pass, they follow one another here, as they do on one stream. Step time
``6 G f + (P-1) f``. Source: DeepSeek-V3 technical report (DualPipe), arXiv 2412.19437, section
3.2.1, cut in half; the order is that of torch's ``ScheduleDualPipeV``.
"""

from __future__ import annotations

from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind, in_a_v
from ipu_pipeline.planner.schedules.objective import Objective
from ipu_pipeline.planner.schedules.rows import RowWriter


def zbv(shape: PipelineShape) -> Schedule:
    """Return one row per device, each with ``6 G`` actions.

    Rows are made for at least ``2P - 1`` microbatches, which fill the pipeline; passes of those
    that are not there are left out.
    """
    rows = tuple(_zbv_row(device, shape) for device in range(shape.num_devices))
    return Schedule("zbv", shape.num_stages, shape.num_microbatches, rows)


def _zbv_row(device: int, shape: PipelineShape) -> tuple[Action, ...]:
    writer = RowWriter()
    to_end = shape.num_devices - device
    going, coming = device, shape.num_stages - 1 - device
    count = max(2 * shape.num_devices - 1, shape.num_microbatches)

    def whole(stage: int) -> None:
        writer.add(stage, "I")
        writer.weights(stage)

    for _ in range(2 * to_end - 1):
        writer.add(going, "F")
    for _ in range(device):
        writer.add(coming, "F")
        writer.add(going, "F")
    for _ in range(to_end):
        writer.add(coming, "F")
        whole(coming)
    while writer.count(coming, "F") < count:
        if writer.count(going, "F") < count:
            writer.add(going, "F")
        whole(going)
        writer.add(coming, "F")
        whole(coming)
    _zbv_cool_down(writer, device, to_end, going, coming)
    return tuple(action for action in writer.row if action.microbatch < shape.num_microbatches)


def _zbv_cool_down(writer: RowWriter, device: int, to_end: int, going: int, coming: int) -> None:
    for _ in range(device):
        writer.add(going, "I")
        writer.add(coming, "I")
    for _ in range(to_end):
        writer.add(going, "I")
        writer.weights(going)
    for stage in (coming, going):
        while writer.weights(stage):
            pass


def v_weights(shape: PipelineShape) -> tuple[float, float]:
    """Return the weights of the busiest device and of the sum over all stages once it is full."""
    count = shape.num_microbatches
    return (count - 1 / 6, 1 / 6) if shape.training else (count - 1, 1)


def _zbv_objective(shape: PipelineShape) -> Objective:
    count = shape.num_microbatches
    weights = v_weights(shape)
    if shape.training and 3 * (shape.num_devices - 1) > 2 * (count - 1):
        weights = (2 * count - 1) / 3, 2 / 3
    return Objective.paced(*weights, shape.num_stages)


ZBV = ScheduleKind(
    name="zbv",
    summary="two stages per device in a V, split backward passes: hardly a bubble",
    make_rows=zbv,
    make_objective=_zbv_objective,
    place=in_a_v,
    stages_per_device=(2,),
    splits_backward=True,
    period=lambda _: 1,
    torch_class="ScheduleZBVZeroBubble",
)


def dualpipev(shape: PipelineShape) -> Schedule:
    """Return one row per device; needs at least as many microbatches as stages."""
    rows = tuple(_dualpipev_row(device, shape) for device in range(shape.num_devices))
    return Schedule("dualpipev", shape.num_stages, shape.num_microbatches, rows)


def _dualpipev_row(device: int, shape: PipelineShape) -> tuple[Action, ...]:
    writer = RowWriter()
    behind = shape.num_devices - device - 1
    going, coming = device, shape.num_stages - 1 - device
    for _ in range(2 * behind):
        writer.add(going, "F")
    for _ in range(device + 1):
        writer.add(going, "F")
        writer.add(coming, "F")
    for _ in range(behind):
        writer.add(coming, "I")
        writer.weights()
        writer.add(coming, "F")
    for _ in range(shape.num_microbatches - 2 * shape.num_devices + device + 1):
        writer.add(going, "F")
        writer.add(coming, "B")
        writer.add(coming, "F")
        writer.add(going, "B")
    for _ in range(behind):
        writer.add(coming, "B")
        writer.add(coming, "F")
        writer.add(going, "B")
    _dualpipev_cool_down(writer, device, behind, going, coming)
    return tuple(writer.row)


def _dualpipev_cool_down(
    writer: RowWriter, device: int, behind: int, going: int, coming: int
) -> None:
    """Finish the backward passes; the second half of them is split, which fills the flush."""
    half = 2 * ((device + 1) // 2) + (device % 2 == 0)  # of 2 (device + 1) passes so many are whole
    for number in range(2 * (device + 1)):
        writer.add((coming, going)[number % 2], "B" if number < half else "I")
    for _ in range(behind):
        writer.weights()
        writer.add(going, "I")
    while writer.weights():
        pass


def _too_few(shape: PipelineShape) -> str:
    if shape.num_microbatches >= shape.num_stages:
        return ""
    return (
        f"schedule dualpipev needs at least as many microbatches as stages, got "
        f"{count_of(shape.num_microbatches, 'microbatch')} and "
        f"{count_of(shape.num_stages, 'stage')}; use more microbatches, or zbv"
    )


DUALPIPEV = ScheduleKind(
    name="dualpipev",
    summary="two stages per device in a V, forward and backward passes in turn",
    make_rows=dualpipev,
    make_objective=lambda shape: Objective.paced(*v_weights(shape), shape.num_stages),
    why_not=_too_few,
    place=in_a_v,
    stages_per_device=(2,),
    splits_backward=True,
    period=lambda _: 1,
    torch_class="ScheduleDualPipeV",
)

SCHEDULES = (ZBV, DUALPIPEV)
