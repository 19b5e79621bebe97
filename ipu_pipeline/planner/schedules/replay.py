"""The exact time of a step: every pass as soon as its device is free and its input is there.

A plan's price and its simulation are both this number. Lock-stepped schedules take their
objective's form; the others are replayed action by action. Of very many microbatches fewer are
replayed, and the steady state is continued once it is seen to repeat.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import PipelineShape, ScheduleKind
from ipu_pipeline.planner.schedules.objective import Path, StagePrice

# Passes by number: len(KINDS) x stage + position here.
KINDS = "FBIWST"
_MOST_ACTIONS = 60_000
_SAME = 1e-12


@dataclass(frozen=True)
class ReplayProgram:
    """A schedule in one order that respects all dependencies.

    Attributes:
        actions: In that order.
        rows: Row of every action.
        numbers: Pass number of every action.
        microbatches: Microbatch of every action.
        sources: Position of the action whose result it waits for on another device, or -1.
        others: Positions of further ones, by its own.
    """

    actions: tuple[Action, ...]
    rows: array[int]
    numbers: array[int]
    microbatches: array[int]
    sources: array[int]
    others: Mapping[int, Sequence[int]] = field(default_factory=dict)


@lru_cache(maxsize=8)
def program(schedule: Schedule) -> ReplayProgram:
    """Order the actions of ``schedule``.

    Raises:
        VerifyError: It deadlocks, or an action is missing.
    """
    order = schedule.total_order()
    row_of = {stage: n for n, row in enumerate(schedule.rows) for stage in {a.stage for a in row}}
    at: dict[Action, int] = {}
    more: dict[int, Sequence[int]] = {}
    sources = array("l")
    for position, action in enumerate(order):
        needed = schedule.requirements(action)
        others = [at[result] for result in needed if result.stage != action.stage]
        own = [at[result] for result in needed if result.stage == action.stage]
        sources.append(others[0] if others else (own[0] if own else -1))
        if len(others) > 1:
            more[position] = others[1:]
        at[action.result] = position
    return ReplayProgram(
        order,
        array("l", (row_of[action.stage] for action in order)),
        array("l", (len(KINDS) * action.stage + KINDS.index(action.kind) for action in order)),
        array("l", (action.microbatch for action in order)),
        sources,
        more,
    )


def start_times(made: ReplayProgram, seconds: Sequence[float]) -> tuple[list[float], float]:
    """Return when every action starts, and when the last one ends.

    Args:
        made: The schedule.
        seconds: Of every pass by number.
    """
    free = [0.0] * (max(made.rows) + 1)
    ends: list[float] = []
    starts: list[float] = []
    others = made.others
    for row, number, source in zip(made.rows, made.numbers, made.sources, strict=True):
        start = free[row]
        if source >= 0 and ends[source] > start:
            start = ends[source]
        if others and len(starts) in others:
            start = max(start, *(ends[other] for other in others[len(starts)]))
        end = start + seconds[number]
        free[row] = end
        starts.append(start)
        ends.append(end)
    return starts, max(free)


class StepReplay(NamedTuple):
    """A step, action by action, without the microbatches in its middle that only repeat.

    Attributes:
        shape: What was replayed.
        made: Its actions.
        starts: When each of them starts.
        end_s: When the last one ends.
        left: Microbatches that are left out.
        left_s: Seconds that they add.
    """

    shape: PipelineShape
    made: ReplayProgram
    starts: list[float]
    end_s: float
    left: int = 0
    left_s: float = 0.0


def step_seconds(kind: ScheduleKind, shape: PipelineShape, prices: Sequence[StagePrice]) -> float:
    """Return the seconds of all passes of one optimizer step.

    Raises:
        ValueError: The schedule cannot run so.
    """
    if kind.lock_stepped:
        return kind.objective(shape).seconds(shape.devices, prices)
    found = replay(kind, shape, [value for stage in prices for value in stage.by_kind])
    return found.end_s + found.left_s


def replay(kind: ScheduleKind, shape: PipelineShape, seconds: Sequence[float]) -> StepReplay:
    """Replay a step; of very many microbatches only as many as show how the others repeat.

    Args:
        kind: The schedule, not a lock-stepped one.
        shape: What runs.
        seconds: As for :func:`start_times`.

    Raises:
        ValueError: The schedule cannot run so, or nothing repeats in more actions than the limit.
    """
    least = replayed_microbatches(shape)
    while True:
        short = kind.shortened(shape, least)
        made = _program_of(kind, short)
        starts, end_s = start_times(made, seconds)
        left = shape.num_microbatches - short.num_microbatches
        if left == 0:
            return StepReplay(short, made, starts, end_s)
        period = kind.period(short) if kind.period is not None else 0
        table = _by_microbatch(made, starts, short)
        # Waits that go around through several stages repeat after as many microbatches as those
        # stages hold.
        for span in range(period, (shape.num_stages + 1) * period, period):
            pace_s = _steady_pace(table, span, end_s)
            if pace_s is not None and (rest := left % span):
                short = replace(short, num_microbatches=short.num_microbatches + rest)
                made = _program_of(kind, short)
                starts, end_s = start_times(made, seconds)
            if pace_s is not None:
                repeats = left // span
                return StepReplay(short, made, starts, end_s, repeats * span, repeats * pace_s)
        least *= 4


def replayed_microbatches(shape: PipelineShape) -> int:
    """Return how many microbatches a replay has at least, where the step has so many."""
    return max(4 * shape.num_stages + 8, _MOST_ACTIONS // (3 * shape.num_stages))


@lru_cache(maxsize=64)
def _program_of(kind: ScheduleKind, shape: PipelineShape) -> ReplayProgram:
    """Find the program again without a look at every action of the rows."""
    return program(kind.rows(shape))


@lru_cache(maxsize=64)
def critical_paths(kind: ScheduleKind, shape: PipelineShape) -> tuple[Path, ...]:
    """Return dependency paths of the replay; the longest is a proven lower bound of the step.

    For every device: the forward passes before its first action, all of its own, and the
    gradients of inputs behind its last one (at least half of a split backward pass); and the
    schedule's own. None for lock-stepped schedules, whose objective is exact.
    """
    if kind.lock_stepped:
        return ()
    back, count = (0.5 if kind.splits_backward else 1.0), shape.num_microbatches
    found = []
    for row in kind.rows(kind.shortened(shape, 4 * shape.num_stages)).rows:
        own = {action.stage for action in row}
        head, tail = row[0].stage, row[-1].stage if row[-1].kind in "BI" else 0
        stages = range(shape.num_stages)
        forward = tuple(float(s < head) + count * (s in own) for s in stages)
        backward = tuple(back * (s < tail) + count * (s in own) for s in stages)
        found.append(Path(forward, backward))
    if kind.make_paths is not None and shape.training:
        found.extend(kind.make_paths(shape))
    return tuple(found)


def _by_microbatch(
    made: ReplayProgram, starts: Sequence[float], shape: PipelineShape
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return when every pass (rows, by number) of every microbatch (columns) starts; NaN: never."""
    table = np.full((len(KINDS) * shape.num_stages, shape.num_microbatches), np.nan)
    table[made.numbers, made.microbatches] = starts
    return table


def _steady_pace(
    table: np.ndarray[Any, np.dtype[np.float64]], period: int, end_s: float
) -> float | None:
    """Seconds of one period where the middle of the step repeats exactly, else ``None``.

    It repeats when all passes of as many microbatches as are ever in flight start so much later
    than those of the period before; then the next period does, too.
    """
    num_stages, middle = len(table) // len(KINDS), table.shape[1] // 2
    first = max(period, middle - 2 * num_stages - period)
    if first > middle:
        return None
    paces = table[:, first : middle + 1] - table[:, first - period : middle + 1 - period]
    paces = paces[~np.isnan(paces)]
    if not paces.size or paces.max() - paces.min() > _SAME * end_s:
        return None
    return float(paces.mean())
