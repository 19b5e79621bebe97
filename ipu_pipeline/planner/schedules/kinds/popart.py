"""PopART's schedule: lock-stepped cycles in which every device works on its stages in turn.

Time is divided into cycles. In cycle ``c`` pipeline stage ``p`` works on microbatch ``c - p``;
all devices start a cycle together, and one exchange of all boundary tensors ends it. Training
has ``2F - 1`` pipeline stages for ``F`` forward stages: the last one holds its own backward
pass, the backward pass of stage ``i`` is pipeline stage ``2 (F - 1) - i``. Consecutive stages on
one device count as one. The schedule is flushed: weights never change between a microbatch's
forward and backward pass. Forward stage ``i`` keeps ``2 (F - 1 - i) + 1`` microbatches, where
1F1B would keep ``F - i``.

The step time is exact for any stages: the sum over all cycles of the busiest device's seconds.
There are ``S - 1`` cycles to fill, ``G - S + 1`` full ones and ``S - 1`` to flush. The one
exchange of a cycle is charged to the stages that send and receive.

Source: graphcore/popart d2f20d7, ``willow/src/transforms/pipeline.cpp`` (merging 537-579,
check 1384-1400, cycle counts 2278-2306) and ``willow/src/popx/popprograms.cpp`` (463-565).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind
from ipu_pipeline.planner.schedules.objective import Objective, PacedTerm


@dataclass(frozen=True)
class PipelineStages:
    """How the stages of a plan become PopART's pipeline stages.

    Attributes:
        forward: Pipeline stage of every stage's forward pass.
        num_forward: Forward stages left after merging (F).
        training: Whether there are backward passes.
    """

    forward: tuple[int, ...]
    num_forward: int
    training: bool

    @classmethod
    def of(cls, stage_devices: Sequence[int], *, training: bool) -> PipelineStages:
        """Merge consecutive stages on one device and number what is left."""
        numbers: list[int] = []
        for stage, device in enumerate(stage_devices):
            merged = stage > 0 and stage_devices[stage - 1] == device
            numbers.append((numbers[-1] + (not merged)) if numbers else 0)
        return cls(tuple(numbers), numbers[-1] + 1, training)

    @classmethod
    def of_schedule(cls, schedule: Schedule) -> PipelineStages:
        """Number the stages of a schedule with one row per device."""
        device_of = {a.stage: device for device, row in enumerate(schedule.rows) for a in row}
        training = any(action.kind == "B" for row in schedule.rows for action in row)
        devices = [device_of[stage] for stage in range(schedule.num_stages)]
        return cls.of(devices, training=training)

    @property
    def total(self) -> int:
        """Pipeline stages: 2F-1 in training, F in inference."""
        return 2 * self.num_forward - 1 if self.training else self.num_forward

    @property
    def backward(self) -> tuple[int, ...]:
        """Pipeline stage of every stage's backward pass."""
        return tuple(2 * (self.num_forward - 1) - number for number in self.forward)

    def cycle_of(self, action: Action) -> int:
        """Cycle in which ``action`` runs."""
        numbers = self.forward if action.kind == "F" else self.backward
        return action.microbatch + numbers[action.stage]


def popart(shape: PipelineShape) -> Schedule:
    """Return the order of every device; :func:`cycles` gives the cycles.

    A device may come back later (a tied head on the first device); its stages then run one after
    another. In inference there are no backward passes.
    """
    numbers = PipelineStages.of(shape.devices, training=shape.training)
    rows = tuple(
        _row([s for s, d in enumerate(shape.devices) if d == device], shape, numbers)
        for device in dict.fromkeys(shape.devices)
    )
    return Schedule("popart", shape.num_stages, shape.num_microbatches, rows)


def cycles(schedule: Schedule) -> tuple[tuple[tuple[Action, ...], ...], ...]:
    """Return what every device does in every cycle: ``cycles(schedule)[cycle][row]``.

    There are ``G + S - 1`` cycles for G microbatches and S pipeline stages: ``S - 1`` to fill,
    ``S - 1`` to flush, the others with every stage at work.

    Args:
        schedule: From :func:`popart`.
    """
    numbers = PipelineStages.of_schedule(schedule)
    total = schedule.num_microbatches + numbers.total - 1
    table: list[list[list[Action]]] = [[[] for _ in schedule.rows] for _ in range(total)]
    for device, row in enumerate(schedule.rows):
        for action in row:
            table[numbers.cycle_of(action)][device].append(action)
    return tuple(tuple(tuple(cell) for cell in cycle) for cycle in table)


def _row(
    stages: Sequence[int], shape: PipelineShape, numbers: PipelineStages
) -> tuple[Action, ...]:
    """Order of one device: cycle by cycle, its pipeline stages in ascending order."""
    passes = [Action(stage, "F", 0) for stage in stages]
    if numbers.training:
        passes += [Action(item.stage, "B", 0) for item in reversed(passes)]
    passes.sort(key=numbers.cycle_of)  # stable: forward passes ascend, backward passes descend
    first = [(numbers.cycle_of(item), item) for item in passes]
    return tuple(
        Action(item.stage, item.kind, cycle - offset)
        for cycle in range(shape.num_microbatches + numbers.total - 1)
        for offset, item in first
        if 0 <= cycle - offset < shape.num_microbatches
    )


def _too_few(shape: PipelineShape) -> str:
    numbers = PipelineStages.of(shape.devices, training=shape.training)
    if shape.num_microbatches >= numbers.total:
        return ""
    return (
        f"PopART runs {numbers.num_forward} stages as {numbers.total} pipeline stages and "
        f"needs at least {numbers.total} microbatches per step, got {shape.num_microbatches}; "
        f"raise {'gradient accumulation' if shape.training else 'device iterations'} to "
        f"{numbers.total}, or use fewer stages"
    )


def _objective(shape: PipelineShape) -> Objective:
    """Add up the cycles: those that fill and flush one by one, the full ones at once."""
    numbers = PipelineStages.of(shape.devices, training=shape.training)
    last = numbers.total - 1
    terms: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for cycle in range(last):
        terms[_at_work(numbers, 0, cycle)] += 1
        terms[_at_work(numbers, cycle + 1, last)] += 1
    terms[_at_work(numbers, 0, last)] += shape.num_microbatches - last
    rows = tuple(
        PacedTerm(weight, forward, backward) for (forward, backward), weight in terms.items()
    )
    return Objective(rows, 0, shape.num_stages)


def _at_work(
    numbers: PipelineStages, first: int, last: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Say which passes are busy when pipeline stages ``first`` to ``last`` are."""
    forward = tuple(int(first <= number <= last) for number in numbers.forward)
    backward = tuple(int(first <= number <= last) for number in numbers.backward)
    return forward, backward if numbers.training else forward


def _in_flight(shape: PipelineShape) -> list[int]:
    """PopART keeps ``2 (F - 1 - i) + 1`` microbatches (pipeline.cpp, getStashSize)."""
    numbers = PipelineStages.of(shape.devices, training=True)
    depths = (2 * (numbers.num_forward - 1 - number) + 1 for number in numbers.forward)
    return [min(depth, shape.num_microbatches) for depth in depths]


POPART = ScheduleKind(
    name="popart",
    summary="PopART's lock-stepped cycles, as IPUs run them",
    make_rows=popart,
    make_objective=_objective,
    make_in_flight=_in_flight,
    why_not=_too_few,
    any_devices=True,
    lock_stepped=True,
)

SCHEDULES = (POPART,)
