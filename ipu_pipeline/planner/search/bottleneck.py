"""Exact optimum of ``pace * busiest stage + spread * sum of the stages`` from a few sweeps.

The fast exact search: every stage has its own device and memory, one row paces the step. First the
least busiest stage T of every depth; then, per depth, the least sum S under a limit on T. As a
split with a busiest stage below some T' has a sum of at least S(T'), ``pace * T_least + spread *
S(T')`` bounds everything still open; each sweep lowers the limit below the busiest stage it found,
until the bound meets the best split. On large lattices the limit climbs from below: sweeps under a
tight limit are cheap, and each one that finds nothing raises the proven bound.

Where options must be weighed against memory, sweeps over lower bounds alone come first: they give a
split, a bound of the sum, and with both a limit under which few stages are left to be weighed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import ClassVar

import numpy as np

from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.search.ideal_program import (
    Combine,
    IdealProgram,
    IdealTable,
    OutOfTimeError,
    StagePositions,
)
from ipu_pipeline.planner.search.problem import Problem, Slot, bits
from ipu_pipeline.planner.search.stage_costs import Floats, StageCostTable
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
    program: ClassVar[type[IdealProgram]] = IdealProgram
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
                with suppress(_DoesNotFitError):  # by their lower bounds alone stages may seem to
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
