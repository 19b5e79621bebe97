"""Rows of actions: written pass by pass, limited to forward passes, merged to one per device.

And with the passes of a vocabulary that is spread over stages put into them. Every stage with rows
computes its part of the softmax (S) as soon as the last stage has the hidden states of a
microbatch, before anything else: the last stage's backward pass waits for it. The gradients of the
rows (T), which nobody waits for, fill the gaps of a row. A stage keeps the softmax of two
microbatches at most, in the order of the last stage's backward passes. All other actions keep their
order.

Source of these passes: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism,
MLSys 2025 (arXiv 2411.05288), algorithm 2.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from math import inf

from ipu_pipeline.errors import VerifyError
from ipu_pipeline.ir.schedule import Action, ActionKind, Schedule, requirements

# How long passes take while they are put in order, in units of a forward pass. Those of the
# vocabulary are taken as short: rows made so lose next to nothing where they are long, but rows
# made for long ones let all devices wait for each other where they are short.
_LENGTHS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "S": 0.1, "T": 0.05}
MOST_KEPT = 2


class RowWriter:
    """Writes the row of one device; every pass of a stage takes its next microbatch."""

    def __init__(self) -> None:
        self.row: list[Action] = []
        self._next: Counter[tuple[int, str]] = Counter()
        self._pending: deque[Action] = deque()

    def add(self, stage: int, kind: ActionKind) -> Action:
        """Add a pass: I leaves a W pending, B is both."""
        counter = (stage, "B" if kind == "I" else kind)
        action = Action(stage, kind, self._next[counter])
        self._next[counter] += 1
        self.row.append(action)
        if kind == "I":
            self._pending.append(Action(stage, "W", action.microbatch))
        return action

    def weights(self, stage: int | None = None) -> bool:
        """Add the oldest pending W (of ``stage``); return whether there was one."""
        for action in self._pending:
            if stage in (None, action.stage):
                self._pending.remove(action)
                self.row.append(action)
                return True
        return False

    def count(self, stage: int, kind: ActionKind) -> int:
        """Return how many such passes the row has."""
        return self._next[stage, kind]


def forward_passes(schedule: Schedule) -> Schedule:
    """Return the rows of inference: the same order without backward passes."""
    rows = tuple(tuple(a for a in row if a.kind == "F") for row in schedule.rows)
    return Schedule(schedule.name, schedule.num_stages, schedule.num_microbatches, rows)


def forward_only(num_stages: int, num_microbatches: int) -> Schedule:
    """Return the rows of an evaluation step, one per stage: forward passes in order."""
    rows = tuple(
        tuple(Action(stage, "F", microbatch) for microbatch in range(num_microbatches))
        for stage in range(num_stages)
    )
    return Schedule("forward", num_stages, num_microbatches, rows)


def side_by_side(schedules: Sequence[Schedule]) -> Schedule:
    """Return the rows of replicas: each has rows of its own, for microbatches behind those before.

    Args:
        schedules: Of the same stages, at least one.
    """
    rows: list[tuple[Action, ...]] = []
    first = 0
    for schedule in schedules:
        rows += (
            tuple(replace(action, microbatch=first + action.microbatch) for action in row)
            for row in schedule.rows
        )
        first += schedule.num_microbatches
    return replace(schedules[0], num_microbatches=first, rows=tuple(rows))


def one_row_per_device(schedule: Schedule, stage_devices: Sequence[int]) -> Schedule:
    """Merge the rows whose stages are on one device; other rows stay as they are.

    The order inside a merged row is found by running all devices in equal steps: a device takes
    the backward pass of the oldest microbatch that is ready, else the oldest forward pass.

    Args:
        schedule: Rows of stages; all stages of one row must be on one device.
        stage_devices: Device of every stage.

    Returns:
        ``schedule`` itself when no two rows share a device.

    Raises:
        ValueError: The stages of one row are on several devices.
        VerifyError: The rows deadlock.
    """
    owners = [_owner(row, stage_devices) for row in schedule.rows if row]
    if len(set(owners)) == len(schedule.rows):
        return schedule
    waiting: dict[int, list[list[Action]]] = {device: [] for device in owners}
    for device, row in zip(owners, (row for row in schedule.rows if row), strict=True):
        waiting[device].append(list(reversed(row)))
    merged: dict[int, list[Action]] = {device: [] for device in waiting}
    done: set[Action] = set()
    left = sum(map(len, schedule.rows))
    while left:
        step: list[Action] = []
        for device, rows in waiting.items():
            chosen = _best(rows, done, schedule.num_stages)
            if chosen is not None:
                step.append(chosen.pop())
                merged[device].append(step[-1])
        if not step:
            raise VerifyError(f"the schedule deadlocks with {left} actions left")
        done.update(action.result for action in step)
        left -= len(step)
    rows_of_devices = tuple(tuple(row) for row in merged.values())
    return Schedule(schedule.name, schedule.num_stages, schedule.num_microbatches, rows_of_devices)


def one_forward_ahead(schedule: Schedule) -> Schedule:
    """Let every backward pass wait for one forward pass more of its row.

    Between the last stage's forward and backward pass of a microbatch there is then a whole forward
    and backward pass of others, in which all stages find the time for their softmax; every stage
    keeps one microbatch more.

    Source: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, MLSys 2025
    (arXiv 2411.05288), section 5.2: as many microbatches more as there are barriers.
    """
    rows = []
    for row in schedule.rows:
        forwards = [action for action in row if action.kind == "F"]
        made: list[Action] = []
        seen = done = 0
        for action in row:
            if action.kind == "F":
                seen += 1
                continue
            made += forwards[done : seen + 1]
            done = min(seen + 1, len(forwards))
            made.append(action)
        rows.append((*made, *forwards[done:]))
    return replace(schedule, rows=tuple(rows))


def _owner(row: Sequence[Action], stage_devices: Sequence[int]) -> int:
    devices = sorted({stage_devices[action.stage] for action in row})
    if len(devices) > 1:
        raise ValueError(
            f"one row of the schedule holds stages of devices {devices}; build the schedule for "
            "the plan's stage_devices"
        )
    return devices[0]


def _best(rows: Sequence[list[Action]], done: set[Action], num_stages: int) -> list[Action] | None:
    """Return the row whose next action should run now, if any can."""
    ready = [row for row in rows if row and requirements(row[-1], num_stages) <= done]
    return min(ready, key=lambda row: (row[-1].kind, row[-1].microbatch), default=None)


def with_vocabulary(schedule: Schedule, spread: Sequence[int]) -> Schedule:
    """Return the rows with the passes of the vocabulary; one without backward passes as it is.

    Args:
        schedule: One row for each device, all passes of a stage in one row.
        spread: Stages that hold rows.

    Raises:
        VerifyError: The schedule deadlocks, or a stage has no passes.
    """
    if not spread or all(action.kind == "F" for row in schedule.rows for action in row):
        return schedule
    return _Insertion(replace(schedule, spread=tuple(spread))).run()


class _Insertion:
    """Runs the rows on paper; every row takes what can start first."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.rows = schedule.rows
        home = {a.stage: n for n, row in enumerate(schedule.rows) for a in row}
        self.holders = [[s for s in schedule.spread if home.get(s) == n]
                        for n in range(len(self.rows))]  # fmt: skip
        self.at = [0] * len(self.rows)
        self.free = [0.0] * len(self.rows)
        self.ends: dict[Action, float] = {}
        self.next = dict.fromkeys((*((s, "S") for s in schedule.spread),
                                   *((s, "T") for s in schedule.spread)), 0)  # fmt: skip
        self.made: list[list[Action]] = [[] for _ in self.rows]
        self.home = home
        last = self.rows[home[schedule.num_stages - 1]]
        self.order = [a.microbatch for a in last
                      if a.kind in "BI" and a.stage == schedule.num_stages - 1]  # fmt: skip

    def run(self) -> Schedule:
        """Return the rows."""
        schedule, last = self.schedule, self.schedule.num_stages - 1
        left = sum(map(len, self.rows)) + 2 * schedule.num_microbatches * len(schedule.spread)
        every = range(len(self.rows))
        best = [self._first(row) for row in every]
        for _ in range(left):
            row = min(every, key=lambda n: best[n][0])
            start, action = best[row]
            if action is None:
                raise VerifyError("the schedule deadlocks: its vocabulary passes find no place")
            self._take(row, action, start)
            waits = {row, *(self.home.get(s, row) for s in (action.stage - 1, action.stage + 1))}
            if action.stage == last or action.kind == "S":
                waits = set(every)
            for other in waits:
                best[other] = self._first(other)
        return replace(schedule, rows=tuple(map(tuple, self.made)))

    def _first(self, row: int) -> tuple[float, Action | None]:
        """Return the pass of a row that can start first; of equals the one others wait for."""
        full = [s for s in self.holders[row] if self.next[s, "S"] - self.next[s, "T"] >= MOST_KEPT]
        found = [self._next(stage, "S") for stage in self.holders[row] if stage not in full]
        put_off = [self._next(stage, "T") for stage in self.holders[row]]
        own = self.rows[row][self.at[row] : self.at[row] + 1]
        found += [*put_off, *own] if full else [*own, *put_off]
        times = [(max(self.free[row], self._ready(a)), n) for n, a in enumerate(found) if a]
        start, number = min(times, default=(inf, -1))
        return (start, None) if start == inf else (start, found[number])

    def _next(self, stage: int, kind: str) -> Action | None:
        number = self.next[stage, kind]
        if number == len(self.order):
            return None
        return Action(stage, "S" if kind == "S" else "T", self.order[number])

    def _ready(self, action: Action) -> float:
        ends = (self.ends.get(needed, inf) for needed in self.schedule.requirements(action))
        return max(ends, default=0.0)

    def _take(self, row: int, action: Action, start: float) -> None:
        self.made[row].append(action)
        self.free[row] = self.ends[action.result] = start + _LENGTHS[action.kind]
        if action.kind in "ST":
            self.next[action.stage, action.kind] += 1
        else:
            self.at[row] += 1
