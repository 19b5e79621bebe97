"""The dynamic program over ideals: the least cost of what is outside of every set, by devices left.

``best[y, i]`` is the least cost of putting everything outside set i on exactly y devices. Sets are
visited from the full one back, so all depths come out of one sweep; the row of stages that start at
a set is priced once, with numpy. Costs are the largest load or their sum, with every load within a
limit, which also bounds the work that may be left for y devices, and so prunes most (y, i).

A stage whose options must be weighed against memory has a lower bound in its row; the minimum
settles such stages one by one until the smallest value is an exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.planner.search.problem import Slot
from ipu_pipeline.planner.search.stage_costs import Bools, Floats, StageCosts, StageCostTable

# Loads of the stages from a set, costs behind their targets, the set, devices left, the targets.
State = Any  # devices left (the max-load benchmark: host cores and devices)
Join = Callable[[Floats, Floats, int, State, NDArray[np.int64]], Floats]
_JOINS: dict[str, Join] = {
    "max": lambda loads, behind, *_: np.maximum(loads, behind),
    "sum": lambda loads, behind, *_: loads + behind,
}
Combine = Literal["max", "sum"] | Join
_SLACK = 1 + 1e-9


class OutOfTimeError(Exception):
    """The deadline passed before the sweep was complete."""


@dataclass(frozen=True)
class StagePositions:
    """The positions of a pipeline, counted from its end.

    Attributes:
        slots: ``slots[y - 1]`` is the position with y devices to the end, itself included.
        starts: ``starts[y - 1]``: the sets at which that position may start; ``None`` for all.
        uniform: All positions price alike apart from the microbatches in flight.
    """

    slots: Sequence[Slot]
    starts: Sequence[Bools] | None = None
    uniform: bool = True


@dataclass
class IdealTable:
    """The result of one ideal_dynamic_program.

    Attributes:
        best: Least cost by devices and start position.
        choice: Position after the first stage of the best way; -1 without one.
    """

    best: Floats
    choice: NDArray[np.int32]

    def path(self, devices: int) -> list[int]:
        """Positions after each stage of the best pipeline."""
        steps, position, last = [], 0, self.best.shape[-1] - 1
        while position != last:
            position = int(self.choice[devices, position])
            devices -= 1
            steps.append(position)
        return steps


class IdealProgram:
    """Fills the table for pipelines of ``depths`` devices with loads up to ``limit_s``."""

    settled = True  # whether lower bounds of loads are made exact before one is chosen
    starts: Bools | None = None  # of devices left and sets: where a stage may start
    _elsewhere_s = 0.0  # most work that may be done elsewhere than on the devices
    _fewest = 1  # devices for what is left

    def __init__(
        self,
        rows: StageCostTable,
        layout: StagePositions,
        combine: Combine,
        limit_s: float,
        depths: Sequence[int],
        deadline: float | None,
    ) -> None:
        self._rows, self._layout, self._limit = rows, layout, limit_s
        self._join: Join = _JOINS[combine] if isinstance(combine, str) else combine
        self._deadline = deadline
        self._depths = range(min(depths), max(depths) + 1)
        # Sets from which the rest can be placed: only they are worth a look as targets.
        self._reached = np.zeros(len(rows.lattice), np.bool_)
        self._fastest = max(slot.speed for slot in layout.slots)
        self._table = self._empty((max(depths) + 1, len(rows.lattice)))

    def _empty(self, shape: tuple[int, ...]) -> IdealTable:
        return IdealTable(np.full(shape, inf), np.full(shape, -1, np.int32))

    def run(self) -> IdealTable:
        """Return the table.

        Raises:
            OutOfTimeError: ``time.monotonic()`` passed the deadline.
        """
        last = len(self._rows.lattice) - 1
        self._table.best[..., 0, last] = 0.0
        self._reached[last] = True
        low, high = self._depth_ranges()
        for start in np.flatnonzero(low <= high)[::-1].tolist():
            if start == last:
                continue
            self._check_time()
            self._visit(start, int(low[start]), int(high[start]))
        return self._table

    def _depth_ranges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every set: fewest and most devices that may be left for what is outside it."""
        work = self._rows.lattice.work_s
        each = self._limit * self._fastest * _SLACK
        most = np.full(len(work), max(self._depths))
        least = np.zeros(len(work), dtype=np.int64)
        if each < inf:
            left = np.maximum(work[-1] - work - self._elsewhere_s, 0.0)
            before = np.maximum(work - self._elsewhere_s, 0.0)
            unit = max(each, 1e-300)
            least = np.ceil(np.minimum(left / unit, 1e9) - 1e-9).astype(np.int64)
            most = most - np.ceil(np.minimum(before / unit, 1e9) - 1e-9).astype(np.int64)
        most[1:] = np.minimum(most[1:], max(self._depths) - self._fewest)
        least[0] = max(least[0], self._fewest * min(self._depths))
        return np.maximum(least, self._fewest), most

    def ahead(self) -> Floats:
        """Bound of the busiest stage before every set, by the devices that are left for the rest.

        Infinite where no stages within the limit lead there.
        """
        found = np.full_like(self._table.best, inf)
        found[list(self._depths), 0] = 0.0
        self._reached[:] = True
        low, high = self._depth_ranges()
        for start in np.flatnonzero(low <= high).tolist():
            self._check_time()
            counts = range(max(int(low[start]), 1), int(high[start]) + 1)
            for y, row, _ in self._stages(start, [y for y in counts if found[y, start] < inf]):
                near = row.targets[row.load_s <= self._limit]
                busiest_s = np.maximum(row.load_s[row.load_s <= self._limit], found[y, start])
                found[y - 1, near] = np.minimum(found[y - 1, near], busiest_s)
        return found

    def _check_time(self) -> None:
        if self._deadline is not None and monotonic() > self._deadline:
            raise OutOfTimeError

    def _visit(self, start: int, low: int, high: int) -> None:
        for y, row, slot in self._stages(start, range(max(low, 1), high + 1)):
            self._settle(start, y, row, slot)

    def _may_start(self, start: int, y: int) -> bool:
        starts = self._layout.starts
        allowed = starts is None or bool(starts[y - 1][start])
        return allowed and (self.starts is None or bool(self.starts[y, start]))

    def _stages(self, start: int, counts: Iterable[int]) -> Iterator[tuple[int, StageCosts, Slot]]:
        """Yield the stages from a set, by the devices left: that of the stage included."""
        slots, rows, limit = self._layout.slots, self._rows, self._limit
        counts = [y for y in counts if self._may_start(start, y)]
        if not self._layout.uniform:
            for y in counts:
                yield y, rows.row(start, slots[y - 1], limit, self._reached), slots[y - 1]
        elif counts:  # all positions share seconds; only the microbatches in flight differ
            first = slots[counts[0] - 1]
            targets = rows.reach(start, first, limit)
            targets = targets[self._reached[targets]]
            base = rows.row_s(start, targets, first)
            targets, base = targets[base <= limit], base[base <= limit]
            for y in counts if targets.size else ():
                yield y, rows.with_memory(start, targets, base, slots[y - 1]), slots[y - 1]

    def _settle(self, start: int, y: int, row: StageCosts, slot: Slot) -> None:
        self._lower(start, y, row, y - 1, slot)

    def _lower(self, start: int, here: State, row: StageCosts, rest: State, slot: Slot) -> None:
        """Improve ``best[here, start]`` by a stage of ``row`` followed by ``rest``."""
        if not row.targets.size:
            return
        best = self._table.best
        behind = best[rest][row.targets]
        cost = self._join(row.load_s, behind, start, here, row.targets)
        cost[row.load_s > self._limit] = inf
        while True:
            pick = int(np.argmin(cost))
            if not cost[pick] < best[here][start]:
                return
            target = int(row.targets[pick])
            if row.certain[pick] or not self.settled:
                break
            exact = self._rows.exact_s(start, target, slot)
            one = slice(pick, pick + 1)
            joined = self._join(np.array([exact]), behind[one], start, here, row.targets[one])
            settled = float(joined[0])
            cost[pick] = inf
            if exact <= self._limit and settled < best[here][start]:
                self._store(here, start, settled, target)
        self._store(here, start, float(cost[pick]), target)

    def _store(self, here: State, start: int, cost: float, target: int) -> None:
        self._reached[start] = True
        self._table.best[here][start] = cost
        self._table.choice[here][start] = target
