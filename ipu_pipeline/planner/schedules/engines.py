"""The two engines of the simulation: rows that run on by themselves, and lock-stepped cycles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.grouped import cycles
from ipu_pipeline.planner.schedules.load import StageLoad
from ipu_pipeline.planner.schedules.timeline import Event

_make = Event._make


@dataclass(frozen=True)
class Passes:
    """Seconds of the passes by number: stage ``s`` forward is ``2 s``, backward ``2 s + 1``.

    Attributes:
        device: Device.
        before_s: Copy into the device.
        compute_s: Computing.
        after_s: Copy out of the device.
        source: The pass whose result it needs; -1 for none.
        overlap_s: How long before the end of its source it may start.
    """

    device: tuple[int, ...]
    before_s: tuple[float, ...]
    compute_s: tuple[float, ...]
    after_s: tuple[float, ...]
    source: tuple[int, ...]
    overlap_s: tuple[float, ...]

    @classmethod
    def of(cls, loads: Sequence[StageLoad], *, exchanged: bool) -> Passes:
        """Number the passes of ``loads``."""
        last = len(loads) - 1
        before, compute, after, source = [], [], [], []
        for stage, load in enumerate(loads):
            copies = load.copies
            before += [copies.activation_in_s, copies.gradient_in_s]
            compute += [load.forward_s, load.backward_s]
            after += [copies.activation_out_s, copies.gradient_out_s]
            source += [2 * (stage - 1) if stage else -1, 2 * stage + (3 if stage < last else 0)]
        overlap = [
            min(after[origin], before[number]) if exchanged and origin >= 0 else 0.0
            for number, origin in enumerate(source)
        ]
        overlap[2 * last + 1] = 0.0  # the last stage's backward pass follows its own forward pass
        return cls(
            tuple(load.device for load in loads for _ in "FB"),
            tuple(before),
            tuple(compute),
            tuple(after),
            tuple(source),
            tuple(overlap),
        )


def _number(action: Action) -> int:
    return 2 * action.stage + (action.kind == "B")


def asynchronous(schedule: Schedule, passes: Passes) -> tuple[list[list[Event]], float]:
    """Let every row run on until it misses an input; who provides that input wakes it.

    Returns:
        The events by row, and the end of the last pass.

    Raises:
        VerifyError: Some row never gets its input.
    """
    count = schedule.num_microbatches
    ends: dict[int, float] = {}
    asleep: dict[int, int] = {}
    position, free = [0] * len(schedule.rows), [0.0] * len(schedule.rows)
    found: list[list[Event]] = [[] for _ in schedule.rows]
    awake = list(range(len(schedule.rows)))
    while awake:
        index = awake.pop()
        row, now, events = schedule.rows[index], free[index], found[index]
        while position[index] < len(row):
            action = row[position[index]]
            number = _number(action)
            origin = passes.source[number]
            if origin >= 0:
                needed = origin * count + action.microbatch
                if needed not in ends:
                    asleep[needed] = index
                    break
                now = max(now, ends[needed] - passes.overlap_s[number])
            now = _append(events, passes, number, action, now)
            position[index] += 1
            key = number * count + action.microbatch
            ends[key] = now
            if key in asleep:
                awake.append(asleep.pop(key))
        free[index] = now
    if asleep:
        schedule.total_order()  # raises, and names the devices that wait
    assert not asleep
    return found, max(free)


def _append(
    events: list[Event], passes: Passes, number: int, action: Action, start_s: float
) -> float:
    """Add one pass with its copies; return when its device is free again."""
    device, stage, microbatch = passes.device[number], action.stage, action.microbatch
    begin_s = start_s + passes.before_s[number]
    end_s = begin_s + passes.compute_s[number]
    free_s = end_s + passes.after_s[number]
    # _make builds the same tuple as Event(...) in half the time; this is the hot loop.
    if begin_s > start_s:
        events.append(_make((device, "copy", stage, microbatch, start_s, begin_s)))
    kind = "backward" if number & 1 else "forward"
    events.append(_make((device, kind, stage, microbatch, begin_s, end_s)))
    if free_s > end_s:
        events.append(_make((device, "copy", stage, microbatch, end_s, free_s)))
    return free_s


def lock_stepped(
    schedule: Schedule,
    passes: Passes,
    *,
    exchanged: bool,
    common_s: tuple[float, float] | None = None,
) -> tuple[list[list[Event]], float]:
    """Run cycle by cycle: compute and copy, then wait until every device has done so.

    Args:
        schedule: From ``grouped``, one row per device.
        passes: Seconds of its passes.
        exchanged: All devices wait for the slowest pass before one common exchange of what the
            cycle made; otherwise each device copies for its own passes.
        common_s: Seconds of one exchange of all devices in every cycle, and of the input of every
            cycle that starts a microbatch, instead of the copies of ``passes``.

    Returns:
        The events by row, and the end of the last cycle.
    """
    found: list[list[Event]] = [[] for _ in schedule.rows]
    row_of = {action.stage: index for index, row in enumerate(schedule.rows) for action in row}
    devices = [passes.device[2 * row[0].stage] for row in schedule.rows]
    cycle_s = 0.0
    for cycle in cycles(schedule):
        free = []
        for index, cell in enumerate(cycle):
            now = cycle_s
            for action in cell:
                now = _compute(found[index], passes, action, now)
            free.append(now)
        met = max(free) if exchanged or common_s else cycle_s
        if common_s is not None:
            starts = any(action.kind == "F" and action.stage == 0 for c in cycle for action in c)
            copies = [common_s[0] + common_s[1] * starts] * len(cycle)
        else:
            copies = _exchange(cycle, passes, row_of) if exchanged else _charge(cycle, passes)
        cycle_s = max(max(now, met) + copy for now, copy in zip(free, copies, strict=True))
        for index, (now, copy) in enumerate(zip(free, copies, strict=True)):
            start_s = max(now, met)
            _wait(found[index], devices[index], now, start_s)
            if copy > 0:
                found[index].append(
                    Event(devices[index], "copy", None, None, start_s, start_s + copy)
                )
            _wait(found[index], devices[index], start_s + copy, cycle_s)
    return found, cycle_s


def _compute(events: list[Event], passes: Passes, action: Action, start_s: float) -> float:
    number = _number(action)
    end_s = start_s + passes.compute_s[number]
    kind: Literal["forward", "backward"] = "backward" if number & 1 else "forward"
    device = passes.device[number]
    events.append(Event(device, kind, action.stage, action.microbatch, start_s, end_s))
    return end_s


def _wait(events: list[Event], device: int, start_s: float, end_s: float) -> None:
    if end_s > start_s:
        events.append(Event(device, "sync", None, None, start_s, end_s))


def _charge(cycle: Sequence[Sequence[Action]], passes: Passes) -> list[float]:
    """Copies of each row's own passes, both ways, as the solver charges them."""
    return [
        sum(passes.before_s[number] + passes.after_s[number] for number in map(_number, cell))
        for cell in cycle
    ]


def _exchange(
    cycle: Sequence[Sequence[Action]], passes: Passes, row_of: dict[int, int]
) -> list[float]:
    """Copies of what this cycle made, on the rows that send and on those that receive."""
    seconds = [0.0] * len(cycle)
    last = max(row_of)
    for index, cell in enumerate(cycle):
        for action in cell:
            number = _number(action)
            seconds[index] += passes.after_s[number]
            target = action.stage + (1 if action.kind == "F" else -1)
            if 0 <= target <= last:
                receiver = 2 * target + (action.kind == "B")
                seconds[row_of[target]] += passes.before_s[receiver]
    return seconds
