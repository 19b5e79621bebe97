"""Run a plan's schedule on paper: every device, pass, copy and wait with its time.

Copies are those of the price: a copy occupies the sender and then the receiver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.price import (
    price,
    schedule_problem,
    shape_of,
    spread_stages,
    usable_bytes,
)
from ipu_pipeline.planner.schedules import PipelineShape, ScheduleKind, schedule_kind
from ipu_pipeline.planner.schedules.kinds.popart import cycles
from ipu_pipeline.planner.schedules.replay import (
    KINDS,
    ReplayProgram,
    program,
    replay,
    start_times,
)
from ipu_pipeline.planner.schedules.rows import forward_passes, one_row_per_device, with_vocabulary
from ipu_pipeline.planner.schedules.stage_loads import StageLoad
from ipu_pipeline.planner.schedules.timeline import Event, EventKind, SteadyState, Timeline

# Microbatches x stages of the largest lock-stepped step whose events are all listed.
_LISTED = 2**14
_make = Event._make
Rows = list[list[Event]]


def simulate(plan: Plan, schedule: Schedule | str | None = None) -> Timeline:
    """Simulate one optimizer step of one replica.

    Args:
        plan: The plan.
        schedule: A schedule or its name; ``None``: the plan's. Its number of microbatches may
            differ from the plan's.

    Raises:
        ValueError: The plan's machine runs no schedule of that name; the schedule is for another
            number of stages, or cannot run.
        VerifyError: The schedule deadlocks.
    """
    found = price(plan)
    loads, passes = found.stages, _passes(found.stages)
    common = (found.exchange_s, found.input_s) if found.exchange_s or found.input_s else None
    cycle = partial(_lock_stepped, passes=passes, common_s=common)
    steady: SteadyState | None = None
    if isinstance(schedule, Schedule):
        rows = plan_rows(plan, schedule)
        name, count = rows.name, rows.num_microbatches
        events, passes_s = cycle(rows) if name == "popart" else _asynchronous(rows, passes)
    else:
        kind, shape = plan_shape(plan, schedule)
        name, count = kind.name, shape.num_microbatches
        events, passes_s, steady = (
            _lock_stepped_shape(kind, shape, cycle)
            if kind.lock_stepped
            else _asynchronous_shape(kind, shape, passes)
        )
    devices = tuple(dict.fromkeys(load.device for load in loads))
    update_s = sum(found.once_s.values())
    step_s = passes_s + update_s
    own = (name, count) == (plan.schedule, plan.num_microbatches)
    if own and not isinstance(schedule, Schedule):
        step_s = found.step_s  # the same up to the order in which seconds are added
    by_device = {row[0].device: row for row in events if row}
    for device, row in by_device.items():
        if update_s > 0:
            row.append(Event(device, "update", None, None, passes_s, step_s))
    return Timeline(
        schedule=name,
        num_microbatches=count,
        devices=devices,
        events=tuple(chain.from_iterable(by_device[device] for device in devices)),
        step_s=step_s,
        update_s=update_s,
        loads=loads,
        limit_bytes=tuple(usable_bytes(plan.machine, device) for device in devices),
        shared_memory=plan.machine.shared_memory,
        steady=steady,
    )


def plan_rows(plan: Plan, schedule: Schedule | str | None = None) -> Schedule:
    """Return the rows of a plan's schedule, one per device, without backward passes in inference.

    Args:
        plan: The plan.
        schedule: Another schedule, or its name; ``None``: the plan's.

    Raises:
        ValueError: The plan's machine runs no schedule of that name; it is for another number of
            stages, or it cannot run the plan.
    """
    if not isinstance(schedule, Schedule):
        kind, shape = plan_shape(plan, schedule)
        return kind.rows(shape)
    devices, training = [stage.device for stage in plan.stages], plan.graph.training
    if schedule.num_stages != plan.num_stages:
        raise ValueError(
            f"the schedule is for {count_of(schedule.num_stages, 'stage')}, the plan has "
            f"{plan.num_stages}"
        )
    rows = one_row_per_device(schedule if training else forward_passes(schedule), devices)
    return rows if rows.spread else with_vocabulary(rows, spread_stages(plan))


def plan_shape(plan: Plan, schedule: str | None = None) -> tuple[ScheduleKind, PipelineShape]:
    """Return a plan's schedule, or another one by its name, and what it is asked to run.

    Raises:
        ValueError: The plan's machine runs no schedule of that name.
    """
    wrong = schedule_problem(plan.machine, schedule) if schedule else ""
    if wrong:
        raise ValueError(wrong)
    return schedule_kind(schedule or plan.schedule), shape_of(plan)


class _Pass(NamedTuple):
    """A kind of pass of one stage: seconds of its copy in, of computing, of its copy out."""

    device: int
    kind: EventKind
    before_s: float
    compute_s: float
    after_s: float


def _passes(loads: Sequence[StageLoad]) -> list[_Pass]:
    """Return the passes by number: stage x kinds, and the place of its kind in :data:`KINDS`."""
    found = []
    for load in loads:
        copies, later = load.copies, load.weights_s
        back_in, back_out = copies.gradient_in_s, copies.gradient_out_s
        kinds: tuple[tuple[EventKind, float, float, float], ...] = (
            ("forward", copies.activation_in_s, load.forward_s, copies.activation_out_s),
            ("backward", back_in, load.backward_s, back_out),
            ("backward", back_in, load.backward_s - later, back_out),
            ("backward", 0.0, later, 0.0),
            ("vocabulary", 0.0, load.softmax_s, 0.0),
            ("vocabulary", 0.0, load.rows_s, 0.0),
        )
        found += [_Pass(load.device, *kind) for kind in kinds]
    return found


def _seconds(passes: Sequence[_Pass]) -> list[float]:
    """Return the seconds of every pass with its copies."""
    return [one.before_s + one.compute_s + one.after_s for one in passes]


def _asynchronous(schedule: Schedule, passes: Sequence[_Pass]) -> tuple[Rows, float]:
    """Let every row run on until it misses an input; also return the end of the last pass."""
    made = program(schedule)
    starts, end_s = start_times(made, _seconds(passes))
    return _events(made, passes, starts), end_s


def _asynchronous_shape(
    kind: ScheduleKind, shape: PipelineShape, passes: Sequence[_Pass]
) -> tuple[Rows, float, SteadyState | None]:
    """As :func:`_asynchronous`; of very many microbatches the events of the first and last ones."""
    found = replay(kind, shape, _seconds(passes))
    rows = _events(found.made, passes, found.starts)
    if not found.left:
        return rows, found.end_s, None
    period = kind.period(shape) if kind.period is not None else 1
    middle = found.shape.num_microbatches // 2
    alike, repeats = range(middle, middle + period), found.left // period
    once = [event for event in chain.from_iterable(rows) if event.microbatch in alike]
    seconds: Counter[tuple[int, EventKind]] = Counter()
    for event in once:
        seconds[event.device, event.kind] += repeats * event.duration_s  # type: ignore[assignment]
    start_s, num_events = _middle(rows, found.shape), repeats * len(once)
    steady = SteadyState(found.left, start_s, found.left_s, seconds, num_events)
    return _continued(rows, steady), found.end_s + found.left_s, steady


def _lock_stepped_shape(
    kind: ScheduleKind,
    shape: PipelineShape,
    cycle: Callable[[Schedule], tuple[Rows, float]],
) -> tuple[Rows, float, SteadyState | None]:
    """As :func:`_lock_stepped`; a microbatch more is a full cycle more, all of which are alike."""
    least = max(128, 4 * kind.least_microbatches(shape) + 8)
    if shape.num_microbatches * shape.num_stages <= _LISTED or shape.num_microbatches <= least:
        return *cycle(kind.rows(shape)), None
    short = replace(shape, num_microbatches=least)
    rows, end_s = cycle(kind.rows(short))
    longer, longer_s = cycle(kind.rows(replace(shape, num_microbatches=least + 1)))
    left, more = shape.num_microbatches - least, Counter[tuple[int, EventKind]]()
    for sign, events in ((1, longer), (-1, rows)):
        for event in chain.from_iterable(events):
            more[event.device, event.kind] += sign * event.duration_s  # type: ignore[assignment]
    num_events = left * (sum(map(len, longer)) - sum(map(len, rows)))
    seconds = {key: left * value for key, value in more.items()}
    left_s = left * (longer_s - end_s)
    steady = SteadyState(left, _middle(rows, short), left_s, seconds, num_events)
    return _continued(rows, steady), end_s + left_s, steady


def _middle(rows: Sequence[Sequence[Event]], shape: PipelineShape) -> float:
    """Return when the middle microbatch enters the first stage."""
    wanted = ("forward", 0, shape.num_microbatches // 2)
    found = (e.start_s for row in rows for e in row if (e.kind, e.stage, e.microbatch) == wanted)
    return next(found)


def _continued(rows: Sequence[Sequence[Event]], steady: SteadyState) -> Rows:
    return [[steady.behind(event) for event in row] for row in rows]


def _events(made: ReplayProgram, passes: Sequence[_Pass], starts: Sequence[float]) -> Rows:
    """Return the events of every row."""
    found: Rows = [[] for _ in range(max(made.rows) + 1)]
    for action, row, number, start_s in zip(
        made.actions, made.rows, made.numbers, starts, strict=True
    ):
        device, kind, before_s, compute_s, after_s = passes[number]
        events, stage, microbatch = found[row], action.stage, action.microbatch
        begin_s = start_s + before_s
        end_s = begin_s + compute_s
        # _make builds the same tuple as Event(...) in half the time; this is the hot loop.
        if begin_s > start_s:
            events.append(_make((device, "copy", stage, microbatch, start_s, begin_s)))
        events.append(_make((device, kind, stage, microbatch, begin_s, end_s)))
        if after_s > 0:
            events.append(_make((device, "copy", stage, microbatch, end_s, end_s + after_s)))
    return found


def _lock_stepped(
    schedule: Schedule, passes: Sequence[_Pass], common_s: tuple[float, float] | None = None
) -> tuple[Rows, float]:
    """Run cycle by cycle: compute and copy, then wait until every device has done so.

    Args:
        schedule: PopART's, one row per device.
        passes: Seconds of its passes.
        common_s: Seconds of one exchange of all devices in every cycle, and of the input of every
            cycle that starts a microbatch; ``None``: every row makes the copies of its own passes,
            both ways, as the solver charges them.

    Returns:
        The events by row, and the end of the last cycle.
    """
    names = ((stage, kind) for stage in range(schedule.num_stages) for kind in KINDS)
    known = dict(zip(names, passes, strict=True))
    devices = [known[row[0].stage, row[0].kind].device for row in schedule.rows]
    found: Rows = [[] for _ in schedule.rows]
    cycle_s = 0.0
    for cycle in cycles(schedule):
        free, copies = [], []
        for events, cell in zip(found, cycle, strict=True):
            now, copy_s = cycle_s, 0.0
            for action in cell:
                stage, microbatch = action.stage, action.microbatch
                device, kind, before_s, compute_s, after_s = known[stage, action.kind]
                events.append(_make((device, kind, stage, microbatch, now, now + compute_s)))
                now, copy_s = now + compute_s, copy_s + (before_s + after_s)
            free.append(now)
            copies.append(copy_s)
        met = max(free) if common_s else cycle_s
        if common_s is not None:
            starts = any(action.kind == "F" and action.stage == 0 for c in cycle for action in c)
            copies = [common_s[0] + common_s[1] * starts] * len(cycle)
        cycle_s = max(max(now, met) + copy_s for now, copy_s in zip(free, copies, strict=True))
        for events, device, now, copy_s in zip(found, devices, free, copies, strict=True):
            start_s = max(now, met)
            _wait(events, device, now, start_s)
            if copy_s > 0:
                events.append(Event(device, "copy", None, None, start_s, start_s + copy_s))
            _wait(events, device, start_s + copy_s, cycle_s)
    return found, cycle_s


def _wait(events: list[Event], device: int, start_s: float, end_s: float) -> None:
    if end_s > start_s:
        events.append(Event(device, "sync", None, None, start_s, end_s))
