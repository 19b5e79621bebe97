"""Exact optimum of ``pace * busiest stage + spread * sum of the stages`` from a few sweeps.

The fast exact search: every stage has its own device and memory, one row paces the step. First the
least busiest stage T of every depth; then, per depth, the least sum S under a limit on T. As a
split with a busiest stage below some T' has a sum of at least S(T'), ``pace * T_least + spread *
S(T')`` bounds everything still open; each sweep lowers the limit below the busiest stage it found,
until the bound meets the best split. On large lattices the limit climbs from below: sweeps under a
tight limit are cheap, and each one that finds nothing raises the proven bound.

``best[y, i]`` is the least cost of putting everything outside set i on exactly y devices. Sets are
visited from the full one back, so all depths come out of one sweep; the row of stages that start at
a set is priced once, with numpy. Costs are the largest load or their sum, with every load within a
limit, which also bounds the work that may be left for y devices, and so prunes most (y, i).

A stage whose options must be weighed against memory has a lower bound in its row; the minimum
settles such stages one by one until the smallest value is an exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from time import monotonic
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.search.problem import Problem, Slot, bits
from ipu_pipeline.planner.search.stage_costs import Floats, StageCosts, StageCostTable
from ipu_pipeline.planner.search.stage_price import PricedPipeline, SearchResult

LADDER_FROM = 3000
_EPS = 1e-11


@dataclass
class BottleneckSearch:
    """Minimises ``pace * max load + spread * sum of loads`` over pipelines of ``depths`` devices.

    Attributes:
        rows: Stage prices.
        layout: Positions, counted from the end.
        depths: Numbers of devices to consider.
        pace: Weight of the busiest stage.
        spread: Weight of the sum over the stages.
        upper_bound: Only pipelines below this are looked for.
        deadline: ``time.monotonic()`` at which to stop.
        offers: Every pipeline that was priced.
        lower_bound: Proven: no pipeline is below it.
    """

    rows: StageCostTable
    layout: StagePositions
    depths: Sequence[int]
    pace: float
    spread: float
    upper_bound: float = inf
    deadline: float | None = None
    lower_bound: float = 0.0
    offers: list[PricedPipeline] = field(default_factory=list)
    program: ClassVar[type[IdealProgram]]
    _least_sum_s: float = field(init=False, default=0.0)
    _ahead: tuple[float, Floats] = field(init=False, default=(-inf, np.zeros(0)))
    _prices: dict[tuple[int, int, Slot], StagePrice | None] = field(
        init=False, default_factory=dict
    )

    def run(self) -> None:
        """Search; leaves what it found in ``offers`` and ``lower_bound``."""
        self._least_sum_s = self._work_s() / max(slot.speed for slot in self.layout.slots)
        self.lower_bound = max(self.lower_bound, self.at_once())
        try:
            self._search()
        except OutOfTimeError:
            return
        self.lower_bound = self.upper_bound

    def _search(self) -> None:
        least = self._least_pace() if self.pace else dict.fromkeys(self.depths, 0.0)
        if not self.spread:
            return
        bounds = {d: self._bound(least[d], self._least_sum_s) for d in least}
        for depth in sorted(bounds, key=lambda d: bounds[d]):
            self.lower_bound = max(self.lower_bound, min(self.upper_bound, bounds[depth]))
            self._least_at(depth, least[depth])

    def at_once(self) -> float:
        """Bound without a search."""
        bound = even_bound(
            self.rows.problem, self.layout.slots, max(self.depths), self.pace, self.spread
        )
        return min(bound, self.upper_bound)

    def _work_s(self) -> float:
        return float(self.rows.lattice.work_s[-1])

    def _bound(self, pace_s: float, sum_s: float) -> float:
        return self.pace * pace_s + self.spread * sum_s

    def _limit_s(self, sum_s: float) -> float:
        """Largest busiest stage with which a pipeline can still be below the upper bound."""
        if not self.pace or self.upper_bound == inf:
            return inf
        return max((self.upper_bound - self.spread * sum_s) / self.pace, 0.0) * (1 - _EPS)

    def _least_pace(self) -> dict[int, float]:
        """Least busiest stage of every depth that can still win."""
        for step in self._ladder():
            table, limit = self._sweep("max", step, self.depths, settled=not self._tight), step
            if self._tight and self._has_pipeline(table):
                with suppress(_DoesNotFitError):
                    self._offer_all(table)
                limit = self._sharpened(step)
                table = self._sweep("max", limit, self.depths)
            if self._has_pipeline(table):
                break
            if limit != step:
                return {}  # none is better than what was offered
            bound = self._bound(limit, self._least_sum_s)
            self.lower_bound = max(self.lower_bound, min(bound, self.upper_bound))
        else:
            return {}
        self._offer_all(table)
        wider = self._limit_s(self._least_sum_s)
        if self.spread and wider > limit:
            table = self._sweep("max", wider, self.depths)
            self._offer_all(table)
        return {d: c for d in self.depths if (c := float(table.best[..., d, 0].min())) < inf}

    def _sharpened(self, limit: float) -> float:
        """Return what the busiest stage of a better pipeline has at most, by bounds of its sum."""
        if self.upper_bound == inf:
            return limit
        if self.spread:
            every = self._limit_s(self._least_sum_s)
            sums = self._sweep("sum", every, self.depths, settled=False).best
            self._least_sum_s = float(sums[list(self.depths), 0].min())
        return self._limit_s(self._least_sum_s)

    @cached_property
    def _tight(self) -> bool:
        """Whether options are weighed against memory: that takes most of the time."""
        rows, choice = self.rows, max(map(len, self.rows.problem.options)) > 1
        return choice and any(map(rows.memory_matters, self.layout.slots))

    def _has_pipeline(self, table: IdealTable) -> bool:
        return float(table.best[..., list(self.depths), 0].min()) < inf

    def _ladder(self) -> Iterator[float]:
        top = self._limit_s(self._least_sum_s)
        floor = self._even_s()
        step = 0.01 if len(self.rows.lattice) > LADDER_FROM else 0.08
        while floor * (1 + step) < min(top, 4 * floor):
            yield floor * (1 + step)
            step *= 2
        yield top

    def _even_s(self) -> float:
        """Least load of the busiest device."""
        return self._work_s() / max(slot.speed for slot in self.layout.slots) / max(self.depths)

    def _least_at(self, depth: int, least_pace_s: float) -> None:
        """Find the best pipeline of one depth: least sums under falling limits."""
        limit = least_pace_s * (1 + _EPS) if self.pace else inf
        found = self._least_sum(depth, limit)
        if found is None or not self.pace:
            return
        limit = self._limit_s(self._least_sum_s)
        while limit >= least_pace_s:
            found = self._least_sum(depth, limit)
            if found is None:
                return
            busiest_s, sum_s = found
            if self._bound(least_pace_s, sum_s) >= self.upper_bound * (1 - _EPS):
                return
            limit = min(busiest_s * (1 - _EPS), self._limit_s(sum_s))

    def _least_sum(self, depth: int, limit: float) -> tuple[float, float] | None:
        """Busiest stage and sum of the pipeline with the least sum under ``limit``."""
        table = self._sweep("sum", limit, (depth,))
        if table.best[depth, 0] == inf:
            return None
        split = self.offer([self.rows.lattice.masks[target] for target in table.path(depth)])
        return max(price.load_s for price in split.prices), float(table.best[depth, 0])

    def _sweep(
        self, combine: Combine, limit: float, depths: Sequence[int], *, settled: bool = True
    ) -> IdealTable:
        made = self.program(self.rows, self.layout, combine, limit, depths, self.deadline)
        made.settled = settled
        if self._tight and limit < inf:
            if limit > self._ahead[0]:
                every = self.program(
                    self.rows, self.layout, "max", limit, self.depths, self.deadline
                )
                self._ahead = limit, every.ahead()
            made.starts = self._ahead[1] <= limit
        return made.run()

    def _offer_all(self, table: IdealTable) -> None:
        for depth in self.depths:
            if table.best[depth, 0] < inf:
                self.offer([self.rows.lattice.masks[target] for target in table.path(depth)])

    def offer(self, boundaries: Sequence[int]) -> PricedPipeline:
        """Price a pipeline exactly and keep it."""
        slots = self.layout.slots[len(boundaries) - 1 :: -1]
        return self.keep(boundaries, slots)

    def keep(self, boundaries: Sequence[int], slots: Sequence[Slot]) -> PricedPipeline:
        """Price a pipeline over ``slots`` exactly and keep it."""
        prices, done = [], 0
        for boundary, slot in zip(boundaries, slots, strict=True):
            key = done, boundary, slot
            if key not in self._prices:  # neighbours have all stages but two in common
                self._prices[key] = self.rows.pricer.best(done, boundary ^ done, slot)
            price = self._prices[key]
            if price is None:
                raise _DoesNotFitError
            done = boundary
            prices.append(price)
        loads = [price.load_s for price in prices]
        found = PricedPipeline(
            self._bound(max(loads), sum(loads)), tuple(boundaries), tuple(prices)
        )
        self.offers.append(found)
        self.upper_bound = min(self.upper_bound, found.objective)
        return found

    def offer_neighbours(self) -> None:
        """Price what the best pipeline becomes when one block moves to the next stage or back."""
        if not self.offers:
            return
        best = min(self.offers, key=lambda item: item.objective)
        everything = self.rows.problem.everything
        for stage, boundary in enumerate(best.boundaries[:-1]):
            before = best.boundaries[stage - 1] if stage else 0
            behind = best.boundaries[stage + 1]
            for block in bits(everything & ~before & behind):
                moved = boundary ^ (1 << block)
                if moved in (before, behind) or not self._may_end(moved, len(best.prices), stage):
                    continue
                boundaries = (*best.boundaries[:stage], moved, *best.boundaries[stage + 1 :])
                with suppress(_DoesNotFitError):
                    self.offer(boundaries)

    def _may_end(self, done: int, depth: int, stage: int) -> bool:
        """Whether a set of blocks may be done after ``stage`` of ``depth``."""
        position, starts = self.rows.lattice.position.get(done), self.layout.starts
        if position is None:
            return False
        return starts is None or bool(starts[depth - stage - 2][position])


def even_bound(
    problem: Problem, slots: Sequence[Slot], depth: int, pace: float, spread: float
) -> float:
    """Bound of ``pace * max load + spread * sum``: even shares of the work, the largest block."""
    speeds = sorted((slot.speed for slot in slots), reverse=True)
    work_s = sum(option.total_s for option in problem.fastest)
    block_s = max(option.total_s for option in problem.fastest) / speeds[0]
    return pace * max(work_s / sum(speeds[:depth]), block_s) + spread * work_s / speeds[0]


class _DoesNotFitError(Exception):
    """A stage of a pipeline that was looked at does not fit its slot."""


def search_tables(
    tables: Iterable[tuple[StageCostTable, StagePositions]],
    depths: Sequence[int],
    weights: tuple[float, float],
    upper_bound: float = inf,
    deadline: float | None = None,
    search_class: type[BottleneckSearch] = BottleneckSearch,
) -> SearchResult:
    """Search several lattices, the small ones first; the bound is that of the last one.

    Args:
        tables: Stage costs over a lattice, and the positions.
        depths: Numbers of devices to consider.
        weights: Of the busiest stage and of the sum.
        upper_bound: Only pipelines below this are looked for.
        deadline: ``time.monotonic()`` at which to stop; a first split is found in any case.
        search_class: Searches each of them.
    """
    found: list[PricedPipeline] = []
    lower, known = 0.0, 0
    for table, positions in tables:
        if len(table.lattice) == known:
            continue
        first = not known and upper_bound == inf
        known = len(table.lattice)
        search = search_class(
            table, positions, depths, *weights, upper_bound, None if first else deadline
        )
        search.run()
        search.offer_neighbours()
        found += search.offers
        upper_bound, lower = search.upper_bound, search.lower_bound
    return SearchResult.of(lower, found)


Bools = NDArray[np.bool_]
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


BottleneckSearch.program = IdealProgram
