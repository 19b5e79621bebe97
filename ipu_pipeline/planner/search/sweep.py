"""The fast exact search: every stage has its own device and memory, one row paces the step.

``best[h, y, i]`` is the least cost of putting everything outside set i on exactly y devices and
h host cores. Sets are visited from the full one back, so all depths come out of one sweep; the
row of stages that start at a set is priced once, with numpy. Costs either take the maximum of
the loads or add them up, always with every load within a limit, which also bounds the work that
may be left for y devices, and so prunes most (y, i).

A stage whose options must be weighed against memory has a lower bound in its row; the minimum
settles such stages one by one until the smallest value is an exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.planner.search.problem import Slot
from ipu_pipeline.planner.search.rows import Floats, Row, Rows

Bools = NDArray[np.bool_]
Combine = Literal["max", "sum"]
_SLACK = 1 + 1e-9


class OutOfTime(Exception):
    """The deadline passed before the sweep was complete."""


@dataclass(frozen=True)
class Layout:
    """The positions of a pipeline, counted from its end.

    Attributes:
        slots: ``slots[y - 1]`` is the position with y devices to the end, itself included.
        starts: ``starts[y - 1]``: the sets at which that position may start; ``None`` for all.
        hosts: Host cores that may be used, anywhere in the pipeline.
        uniform: All positions price alike apart from the microbatches in flight.
    """

    slots: Sequence[Slot]
    starts: Sequence[Bools] | None = None
    hosts: int = 0
    uniform: bool = True


@dataclass
class Table:
    """The result of one sweep.

    Attributes:
        best: Least cost by host cores, devices and start position.
        choice: Position after the first stage of the best way; -1 without one.
        by_host: Whether that stage is on a host core.
    """

    best: Floats
    choice: NDArray[np.int32]
    by_host: Bools

    def path(self, devices: int, hosts: int = 0) -> list[tuple[int, bool]]:
        """Positions after each stage of the best pipeline, and whether a host core runs it."""
        steps, position, last = [], 0, self.best.shape[2] - 1
        while position != last:
            target = int(self.choice[hosts, devices, position])
            on_host = bool(self.by_host[hosts, devices, position])
            hosts, devices = hosts - on_host, devices - (not on_host)
            steps.append((target, on_host))
            position = target
        return steps


def sweep(
    rows: Rows,
    layout: Layout,
    combine: Combine,
    limit_s: float,
    depths: Sequence[int],
    deadline: float | None = None,
) -> Table:
    """Fill the table for pipelines of ``depths`` devices with loads up to ``limit_s``.

    Raises:
        OutOfTime: ``time.monotonic()`` passed ``deadline``.
    """
    return _Sweep(rows, layout, combine, limit_s, depths, deadline).run()


class _Sweep:
    def __init__(
        self,
        rows: Rows,
        layout: Layout,
        combine: Combine,
        limit_s: float,
        depths: Sequence[int],
        deadline: float | None,
    ) -> None:
        self._rows, self._layout, self._limit = rows, layout, limit_s
        self._join: Callable[[Floats, Floats], Floats] = np.maximum if combine == "max" else np.add
        self._deadline = deadline
        self._depths = range(min(depths), max(depths) + 1)
        shape = (layout.hosts + 1, max(depths) + 1, len(rows.lattice))
        self._table = Table(
            np.full(shape, inf), np.full(shape, -1, np.int32), np.zeros(shape, np.bool_)
        )
        self._fastest = max(slot.speed for slot in layout.slots)
        self._host_share = self._work_on_hosts() if layout.hosts else 0.0

    def run(self) -> Table:
        last = len(self._rows.lattice) - 1
        self._table.best[:, 0, last] = 0.0
        low, high = self._depth_ranges()
        for start in np.flatnonzero(low <= high)[::-1].tolist():
            if start == last:
                continue
            if self._deadline is not None and monotonic() > self._deadline:
                raise OutOfTime
            self._visit(start, int(low[start]), int(high[start]))
        return self._table

    def _depth_ranges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every set: fewest and most devices that may be left for what is outside it."""
        work = self._rows.lattice.work_s
        each = self._limit * self._fastest * _SLACK
        most = np.full(len(work), max(self._depths))
        least = np.zeros(len(work), dtype=np.int64)
        if each < inf:
            left = np.maximum(work[-1] - work - self._host_share, 0.0)
            before = np.maximum(work - self._host_share, 0.0)
            unit = max(each, 1e-300)
            least = np.ceil(np.minimum(left / unit, 1e9) - 1e-9).astype(np.int64)
            most = most - np.ceil(np.minimum(before / unit, 1e9) - 1e-9).astype(np.int64)
        most[1:] = np.minimum(most[1:], max(self._depths) - (0 if self._layout.hosts else 1))
        least[0] = max(least[0], 0 if self._layout.hosts else min(self._depths))
        return np.maximum(least, 0 if self._layout.hosts else 1), most

    def _work_on_hosts(self) -> float:
        """Most device work that the host cores can take over within the limit."""
        problem = self._rows.problem
        ratio = max(
            (option.total_s / seconds if seconds else inf)
            for option, seconds in zip(problem.fastest, problem.host_s or (), strict=True)
            if option.total_s
        )
        return self._layout.hosts * self._limit * ratio * self._fastest

    def _visit(self, start: int, low: int, high: int) -> None:
        counts = [y for y in range(max(low, 1), high + 1) if self._may_start(start, y)]
        if counts and self._layout.uniform:
            self._visit_uniform(start, counts)
        elif counts:
            for y in counts:
                slot = self._layout.slots[y - 1]
                row = self._rows.row(start, slot, self._limit)
                self._settle(start, y, row, slot)
        if self._layout.hosts:
            self._visit_host(start, range(low, high + 1))

    def _may_start(self, start: int, y: int) -> bool:
        starts = self._layout.starts
        return starts is None or bool(starts[y - 1][start])

    def _visit_uniform(self, start: int, counts: Sequence[int]) -> None:
        """All positions share seconds; only the microbatches in flight differ."""
        slot = self._layout.slots[counts[0] - 1]
        targets = self._rows.reach(start, slot, self._limit)
        if not targets.size:
            return
        base = self._rows.row_s(start, targets, slot)
        near = base <= self._limit
        targets, base = targets[near], base[near]
        for y in counts:
            slot = self._layout.slots[y - 1]
            self._settle(start, y, self._rows.with_memory(start, targets, base, slot), slot)

    def _settle(self, start: int, y: int, row: Row, slot: Slot) -> None:
        for hosts in range(self._layout.hosts + 1):
            self._lower(start, (hosts, y), row, (hosts, y - 1), slot)

    def _visit_host(self, start: int, counts: Sequence[int]) -> None:
        slot = Slot(-1, -1, host=True)
        row = self._rows.row(start, slot, self._limit)
        for hosts in range(1, self._layout.hosts + 1):
            for y in counts:
                self._lower(start, (hosts, y), row, (hosts - 1, y), slot)

    def _lower(
        self, start: int, here: tuple[int, int], row: Row, rest: tuple[int, int], slot: Slot
    ) -> None:
        """Improve ``best[here, start]`` by a stage of ``row`` followed by ``rest``."""
        if not row.targets.size:
            return
        best = self._table.best
        behind = best[rest][row.targets]
        cost = self._join(row.load_s, behind)
        cost[row.load_s > self._limit] = inf
        while True:
            pick = int(np.argmin(cost))
            if not cost[pick] < best[here][start]:
                return
            target = int(row.targets[pick])
            if row.certain[pick]:
                break
            exact = self._rows.exact_s(start, target, slot)
            settled = float(self._join(np.float64(exact), behind[pick]))  # type: ignore[arg-type]
            cost[pick] = inf
            if exact <= self._limit and settled < best[here][start]:
                self._store(here, start, settled, target, host=False)
        self._store(here, start, float(cost[pick]), target, host=slot.host)

    def _store(
        self, here: tuple[int, int], start: int, cost: float, target: int, *, host: bool
    ) -> None:
        self._table.best[here][start] = cost
        self._table.choice[here][start] = target
        self._table.by_host[here][start] = host
