"""The passes of a vocabulary that is spread over stages, put into the rows of any schedule.

Every stage with rows computes its part of the softmax (S) as soon as the last stage has the hidden
states of a microbatch, before anything else: the last stage's backward pass waits for it. The
gradients of the rows (T), which nobody waits for, fill the gaps of a row. A stage keeps the softmax
of two microbatches at most, in the order of the last stage's backward passes. All other actions
keep their order.

Source of the two passes: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism,
MLSys 2025 (arXiv 2411.05288), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from ipu_pipeline.errors import VerifyError
from ipu_pipeline.ir.schedule import Action, Schedule

# How long passes take while they are put in order, in units of a forward pass. Those of the
# vocabulary are taken as short: rows made so lose next to nothing where they are long, but rows
# made for long ones let all devices wait for each other where they are short.
_LENGTHS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "S": 0.1, "T": 0.05}
MOST_KEPT = 2


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
