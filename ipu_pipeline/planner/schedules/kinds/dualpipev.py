"""DualPipeV: two stages per device in a V; forward and backward passes of two microbatches in turn.

Device ``d`` of P holds stages ``d`` and ``2P - 1 - d``. Whole backward passes in the steady part,
split ones where there would be a bubble. Where torch overlaps a forward with a backward pass, they
follow one another here, as they do on one stream.

The step time is that of ``zbv``: ``6 G f + (P-1) f`` for equal stages and halves.

Source: DeepSeek-V3 technical report (DualPipe), arXiv 2412.19437, section 3.2.1, cut in half; the
order is that of ``torch.distributed.pipelining.ScheduleDualPipeV``.
"""

from __future__ import annotations

from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind, in_a_v
from ipu_pipeline.planner.schedules.kinds.zbv import v_weights
from ipu_pipeline.planner.schedules.objective import Objective
from ipu_pipeline.planner.schedules.rows import RowWriter


def dualpipev(shape: PipelineShape) -> Schedule:
    """Return one row per device; needs at least as many microbatches as stages."""
    rows = tuple(_row(device, shape) for device in range(shape.num_devices))
    return Schedule("dualpipev", shape.num_stages, shape.num_microbatches, rows)


def _row(device: int, shape: PipelineShape) -> tuple[Action, ...]:
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
    _cool_down(writer, device, behind, going, coming)
    return tuple(writer.row)


def _cool_down(writer: RowWriter, device: int, behind: int, going: int, coming: int) -> None:
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


SCHEDULE = ScheduleKind(
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
