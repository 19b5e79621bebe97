"""PopART's schedule: lock-stepped cycles in which every device works on its stages in turn.

Time is divided into cycles. In cycle ``c`` pipeline stage ``p`` works on microbatch ``c - p``;
all devices start a cycle together, and one exchange of all boundary tensors ends it. Training
has ``2F - 1`` pipeline stages for ``F`` forward stages: the last one holds its own backward
pass, the backward pass of stage ``i`` is pipeline stage ``2 (F - 1) - i``. Consecutive stages on
one device count as one. The schedule is flushed: weights never change between a microbatch's
forward and backward pass.

Source: graphcore/popart d2f20d7, ``willow/src/transforms/pipeline.cpp`` (merging 537-579,
check 1384-1400, cycle counts 2278-2306) and ``willow/src/popx/popprograms.cpp`` (463-565).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.arguments import check_counts


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


def grouped(
    num_stages: int,
    num_microbatches: int,
    stage_devices: Sequence[int] | None = None,
    *,
    training: bool = True,
) -> Schedule:
    """Build PopART's cycle-synchronous schedule.

    Forward stage ``i`` keeps ``2 (F - 1 - i) + 1`` microbatches in flight, where 1F1B would keep
    ``F - i``. The rows hold the order of every device; :func:`cycles` gives the cycles.

    Args:
        num_stages: Stages of the forward pass, at least 1.
        num_microbatches: Gradient accumulation in training, device iterations in inference.
        stage_devices: Device of every stage; ``None``: one device each. A device may come back
            later (a tied head on the first device); its stages then run one after another.
        training: Whether there is a backward pass.

    Returns:
        One row per device, in the order of their first stage.

    Raises:
        ValueError: A count is below 1, ``stage_devices`` has another length, or there are fewer
            microbatches than pipeline stages.
    """
    check_counts(num_stages, num_microbatches)
    devices = tuple(range(num_stages)) if stage_devices is None else tuple(stage_devices)
    if len(devices) != num_stages:
        raise ValueError(
            f"stage_devices has {len(devices)} entries for {num_stages} stages; give one each"
        )
    numbers = PipelineStages.of(devices, training=training)
    if num_microbatches < numbers.total:
        raise ValueError(
            f"PopART runs {numbers.num_forward} stages as {numbers.total} pipeline stages and "
            f"needs at least {numbers.total} microbatches per step, got {num_microbatches}; raise "
            f"{'gradient accumulation' if training else 'device iterations'} to {numbers.total}, "
            "or use fewer stages"
        )
    rows = tuple(
        _row([s for s, other in enumerate(devices) if other == device], num_microbatches, numbers)
        for device in dict.fromkeys(devices)
    )
    return Schedule("popart", num_stages, num_microbatches, rows)


def cycles(schedule: Schedule) -> tuple[tuple[tuple[Action, ...], ...], ...]:
    """Return what every device does in every cycle: ``cycles(schedule)[cycle][row]``.

    There are ``G + S - 1`` cycles for G microbatches and S pipeline stages: ``S - 1`` to fill,
    ``S - 1`` to flush, the others with every stage at work.

    Args:
        schedule: From :func:`grouped`.
    """
    numbers = PipelineStages.of_schedule(schedule)
    total = schedule.num_microbatches + numbers.total - 1
    table: list[list[list[Action]]] = [[[] for _ in schedule.rows] for _ in range(total)]
    for device, row in enumerate(schedule.rows):
        for action in row:
            table[numbers.cycle_of(action)][device].append(action)
    return tuple(tuple(tuple(cell) for cell in cycle) for cycle in table)


def _row(
    stages: Iterable[int], num_microbatches: int, numbers: PipelineStages
) -> tuple[Action, ...]:
    """Order of one device: cycle by cycle, its pipeline stages in ascending order."""
    passes = [Action(stage, "F", 0) for stage in stages]
    if numbers.training:
        passes += [Action(item.stage, "B", 0) for item in reversed(passes)]
    passes.sort(key=numbers.cycle_of)  # stable: forward passes ascend, backward passes descend
    first = [(numbers.cycle_of(item), item) for item in passes]
    return tuple(
        Action(item.stage, item.kind, cycle - offset)
        for cycle in range(num_microbatches + numbers.total - 1)
        for offset, item in first
        if 0 <= cycle - offset < num_microbatches
    )
