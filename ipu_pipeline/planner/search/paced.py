"""Exact optimum of ``pace * busiest stage + spread * sum of the stages`` from a few sweeps.

The busiest stage's load T and the sum S pull apart: slower transfers or recomputation may buy a
shorter busiest stage. First the least T of every depth; then, per depth, the least S under a
limit on T. A split with a busiest stage below some T' has a sum of at least S(T'), so
``pace * T_least + spread * S(T')`` bounds everything that is still open; each sweep moves the
limit strictly below the busiest stage it has just found, until the bound meets the best split.

On large lattices the limit climbs a ladder from below: sweeps under a tight limit are cheap, and
each one that finds nothing raises the proven bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from ipu_pipeline.planner.search.pricing import Price
from ipu_pipeline.planner.search.problem import Slot
from ipu_pipeline.planner.search.rows import Rows
from ipu_pipeline.planner.search.sweep import Combine, Layout, OutOfTime, Table, sweep

LADDER_FROM = 3000
_EPS = 1e-11


@dataclass(frozen=True)
class Split:
    """One complete pipeline and its price.

    Attributes:
        objective: ``pace * busiest + spread * total``.
        busiest_s: Largest load of a stage.
        boundaries: Mask of the done blocks after each stage.
        prices: Price of each stage.
        on_host: Whether a host core runs the stage.
    """

    objective: float
    busiest_s: float
    boundaries: tuple[int, ...]
    prices: tuple[Price, ...]
    on_host: tuple[bool, ...]


@dataclass
class PacedSearch:
    """Minimises ``pace * max load + spread * sum of loads`` over pipelines of ``depths`` devices.

    Attributes:
        rows: Stage prices.
        layout: Positions, counted from the end.
        depths: Numbers of devices to consider.
        pace: Weight of the busiest stage.
        spread: Weight of the sum over the stages.
        upper_bound: Only pipelines below this are looked for.
        deadline: ``time.monotonic()`` at which to stop.
        best: The best pipeline so far.
        lower_bound: Proven: no pipeline is below it.
    """

    rows: Rows
    layout: Layout
    depths: Sequence[int]
    pace: float
    spread: float
    upper_bound: float = inf
    deadline: float | None = None
    best: Split | None = None
    lower_bound: float = 0.0
    _least_sum_s: float = field(init=False, default=0.0)

    def run(self) -> None:
        """Search; leaves the result in ``best`` and ``lower_bound``."""
        if not self.layout.hosts:
            self._least_sum_s = self._work_s() / max(slot.speed for slot in self.layout.slots)
        self.lower_bound = max(self.lower_bound, self.at_once())
        try:
            self._search()
        except OutOfTime:
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
        """Bound without a search: work shared out evenly, and the largest block."""
        if self.layout.hosts:
            return self._at_once_with_hosts()
        speeds = sorted((slot.speed for slot in self.layout.slots), reverse=True)
        block = max(option.total_s for option in self.rows.problem.fastest)
        even = self._work_s() / sum(speeds[: max(self.depths)])
        bound = self._bound(max(even, block / speeds[0]), self._work_s() / speeds[0])
        return min(bound, self.upper_bound)

    def _at_once_with_hosts(self) -> float:
        """As ``at_once`` for equal devices: a host core is worth part of a device."""
        problem = self.rows.problem
        shares = [
            option.total_s / seconds if seconds else inf
            for option, seconds in zip(problem.fastest, problem.host_s or (), strict=True)
            if option.total_s
        ]
        if not shares or max(shares) == inf:
            return 0.0
        even = self._work_s() / (max(self.depths) + self.layout.hosts * max(shares))
        return min(self.pace * even, self.upper_bound)

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
        table, limit = self._climb()
        if self.spread and table is not None:
            self._offer_all(table)
            wider = self._limit_s(self._least_sum_s)
            if wider > limit:
                table = self._sweep("max", wider, self.depths)
        if table is None:
            return {}
        self._offer_all(table)
        return {d: c for d in self.depths if (c := float(table.best[:, d, 0].min())) < inf}

    def _climb(self) -> tuple[Table | None, float]:
        """Sweep under rising limits until something is found or the upper bound is reached."""
        for limit in self._ladder():
            table = self._sweep("max", limit, self.depths)
            if float(table.best[:, list(self.depths), 0].min()) < inf:
                return table, limit
            bound = self._bound(limit, self._least_sum_s)
            self.lower_bound = max(self.lower_bound, min(bound, self.upper_bound))
        return None, inf

    def _ladder(self) -> Iterator[float]:
        top = self._limit_s(self._least_sum_s)
        devices = max(self.depths) + self.layout.hosts
        speed = max(slot.speed for slot in self.layout.slots)
        floor = self._work_s() / speed / devices
        step = 0.01 if len(self.rows.lattice) > LADDER_FROM else 0.08
        while floor * (1 + step) < min(top, 4 * floor):
            yield floor * (1 + step)
            step *= 2
        yield top

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
        if table.best[0, depth, 0] == inf:
            return None
        split = self._offer(table, depth, 0)
        return split.busiest_s, float(table.best[0, depth, 0])

    def _sweep(self, combine: Combine, limit: float, depths: Sequence[int]) -> Table:
        return sweep(self.rows, self.layout, combine, limit, depths, self.deadline)

    def _offer_all(self, table: Table) -> None:
        for depth in self.depths:
            for hosts in range(self.layout.hosts + 1):
                if table.best[hosts, depth, 0] < inf:
                    self._offer(table, depth, hosts)

    def _offer(self, table: Table, devices: int, hosts: int) -> Split:
        """Price the pipeline of a table exactly, and keep it if it is the best."""
        masks = self.rows.lattice.masks
        prices, boundaries, on_host, done = [], [], [], 0
        for target, host in table.path(devices, hosts):
            slot = Slot(-1, -1, host=True) if host else self.layout.slots[devices - 1]
            price = self.rows.pricer.best(done, masks[target] ^ done, slot)
            assert price is not None, "the sweep used a stage that does not fit"
            devices -= not host
            done = masks[target]
            prices.append(price)
            boundaries.append(done)
            on_host.append(host)
        loads = [price.load_s for price in prices]
        objective = self._bound(max(loads), sum(loads))
        split = Split(objective, max(loads), tuple(boundaries), tuple(prices), tuple(on_host))
        if objective < self.upper_bound:
            self.best, self.upper_bound = split, objective
        return split
