"""Exact search for every schedule and for shared devices and memories: labels with dominance.

A label is a partial pipeline: its boundary, the load of every device in every row of the objective,
the bytes in every memory. It is dropped when another one at its boundary is no worse in all of
them, or when its bound (plus the least that the remaining stages can do, ``_to_go``) reaches a
known split. A narrow pass finds a split, a full one proves it; when the time ends in between, the
lowest bound of the open labels is a true lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.planner.schedules.objective import Objective, StagePrice
from ipu_pipeline.planner.search.ideals import Lattice
from ipu_pipeline.planner.search.knapsack import undominated
from ipu_pipeline.planner.search.problem import Slot, bits
from ipu_pipeline.planner.search.stage_price import (
    MOST_CANDIDATES,
    PricedPipeline,
    SearchResult,
    StagePricer,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
# What a memory holds: (blocks done before, blocks, position, price) of each of its stages.
Part = tuple[int, int, int, StagePrice]
Parts = tuple[Part, ...]
BEAM_WIDTH = 64
TOLERANCE = 1e-12
_SLACK = 1e-9


@dataclass(frozen=True)
class _Step:
    """One stage that may be put at a slot: to which set it leads and what it costs."""

    target: int
    price: StagePrice
    loads: Floats


@dataclass(frozen=True)
class _Resources:
    """Rows of the objective that load the same resources.

    Attributes:
        of_stage: Resource of every stage.
        columns: The rows.
        still_open: For 0..num_stages stages done: resources used before and again.
    """

    of_stage: tuple[int, ...]
    columns: tuple[int, ...]
    still_open: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Label:
    """A partial pipeline (module docstring); groups, resident and held must match to compare.

    ``rows`` has one table per group of rows that load the same resources: first what is closed
    (its largest load), then one line for each resource that comes again.
    """

    position: int
    rows: tuple[Floats, ...]
    total_s: float
    used: tuple[float, ...]
    groups: tuple[int, ...]
    resident: tuple[int, ...]
    held: tuple[Parts, ...]
    bound: float
    parent: _Label | None = None
    step: _Step | None = None

    def numbers(self) -> Floats:
        """Everything that must not be larger for this label to dominate."""
        return np.concatenate((*(r.ravel() for r in self.rows), (self.total_s, *self.used)))


@dataclass
class LabelSettingSearch:
    """Finds the best split over ``slots``, one stage each.

    Attributes:
        lattice: Boundaries to choose from.
        slots: The stage positions, in pipeline order.
        objective: Step time, made for ``len(slots)`` stages.
        boundaries: For 0..num_stages stages done: which sets of the lattice are allowed.
        deadline: ``time.monotonic()`` at which to stop once there is a split; ``None`` never.
        load_limit_s: Stages with a larger load cannot be part of a better split.
        proof_s: Stop proving after so many seconds; the bound says what is left open.
        fits_together: Says whether the stages of one memory fit it together, where bytes do not
            simply add up; such labels compare only with equal stages in the open memories.
        true_s: Seconds of a whole split where the objective is only a bound of them.
    """

    lattice: Lattice
    pricer: StagePricer
    slots: Sequence[Slot]
    objective: Objective
    boundaries: Sequence[Bools]
    deadline: float | None = None
    load_limit_s: float = inf
    proof_s: float = inf
    fits_together: Callable[[Parts], bool] | None = None
    true_s: Callable[[Sequence[int], Sequence[StagePrice]], float] | None = None
    _steps: list[dict[int, list[_Step]]] = field(default_factory=list)
    _to_go: list[dict[int, Floats]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._resources = _resources(self.objective, [slot.device for slot in self.slots])
        everywhere = (1,) * len(self.slots)
        even = [  # the busiest device has at least its share of all passes
            (row.forward == row.backward == everywhere and row.extra < 0 and not row.resources)
            / len({slot.device for slot in self.slots})
            for row in self.objective.rows
        ]
        order = [column for kind in self._resources for column in kind.columns]
        self._order = np.array(order)
        weights = np.array([*(row.weight for row in self.objective.rows), 1], float)
        self._weights = weights[self._order]
        self._even = np.array([*even, 0.0])[self._order]
        pools = [slot.pool for slot in self.slots]
        self._open_pools = [_still_open(pools, s) for s in range(len(pools) + 1)]
        self._pool_is_shared = [pools.count(pool) > 1 for pool in pools]
        self._groups = self.lattice.problem.same_device

    def run(self, upper_bound: float = inf) -> SearchResult:
        """Search; splits that are not below ``upper_bound`` are not reported.

        Without one the deadline counts from the first split on.
        """
        if not self._tabulate(hurried=upper_bound < inf):
            return SearchResult(0.0 if self._late() else upper_bound)
        quick = self._pass(upper_bound, BEAM_WIDTH)
        if self.proof_s < inf:
            self.deadline = min(self.deadline or inf, monotonic() + self.proof_s)
        full = self._pass(min(upper_bound, quick.objective), None)
        return SearchResult.of(full.lower_bound, (*full.pipelines, *quick.pipelines))

    def _late(self) -> bool:
        return self.deadline is not None and monotonic() > self.deadline

    def _tabulate(self, *, hurried: bool) -> bool:
        """List every possible stage at every slot, from the end; False if none leads there."""
        lattice, last = self.lattice, len(self.slots)
        self._steps = [{} for _ in self.slots]
        self._to_go = [{} for _ in range(last + 1)]
        if self.boundaries[last][len(lattice) - 1]:
            self._to_go[last][len(lattice) - 1] = np.zeros(len(self._weights) + 1)
        for stage in range(last - 1, -1, -1):
            targets = np.zeros(len(lattice), dtype=np.bool_)
            targets[list(self._to_go[stage + 1])] = True
            starts = [0] if stage == 0 else np.flatnonzero(self.boundaries[stage]).tolist()
            for position in starts:
                if hurried and self._late():
                    return False
                steps = self._steps_from(stage, position, targets)
                if steps:
                    self._steps[stage][position] = steps
                    self._to_go[stage][position] = self._least(stage, steps)
        return 0 in self._to_go[0]

    def _steps_from(self, stage: int, position: int, targets: Bools) -> list[_Step]:
        slot, shared = self.slots[stage], self._pool_is_shared[stage]
        done = self.lattice.masks[position]
        work = self.lattice.work_s
        top = work[position] + self.load_limit_s * slot.speed
        stop = int(np.searchsorted(work, top * (1 + _SLACK), side="right"))
        reached = self.lattice.supersets(position, position + 1, max(stop, position + 1))
        steps = []
        for target in reached[targets[reached]].tolist():
            blocks = self.lattice.masks[target] ^ done
            for price in self.pricer.prices(done, blocks, slot, shared_pool=shared):
                if price.load_s > self.load_limit_s * (1 + _SLACK):
                    continue
                rows = [row.load_s(stage, price) for row in self.objective.rows]
                loads = np.array([*rows, price.outer_s])[self._order]
                steps.append(_Step(target, price, loads))
        return steps

    def _least(self, stage: int, steps: list[_Step]) -> Floats:
        """Per row, and for the sum: the least any completion from here pays."""
        best = np.full(len(self._weights) + 1, inf)
        for step in steps:
            rest = self._to_go[stage + 1][step.target]
            here = np.maximum(rest[:-1], step.loads)
            best = np.minimum(best, (*here, rest[-1] + step.price.load_s))
        return best

    def _pass(self, upper_bound: float, beam: int | None) -> SearchResult:
        labels = [self._first()]
        for stage in range(len(self.slots)):
            children: dict[tuple[object, ...], list[_Label]] = {}
            for number, label in enumerate(labels):
                if beam is None and self._late():
                    waiting = [*labels[number:], *(c for group in children.values() for c in group)]
                    return SearchResult(min(item.bound for item in waiting))
                for step in self._steps[stage].get(label.position, ()):
                    child = self._extend(label, stage, step)
                    if child is not None and child.bound < upper_bound * (1 - TOLERANCE):
                        key = (child.position, child.groups, child.resident, child.held)
                        children.setdefault(key, []).append(child)
            labels = [label for group in children.values() for label in _undominated(group)]
            labels.sort(key=lambda label: label.bound)
            labels = labels[:beam]
        return self._best_of(labels) if labels else SearchResult(upper_bound)

    def _best_of(self, labels: Sequence[_Label]) -> SearchResult:
        """The best of whole splits, sorted by their bound; the bound is the first one's."""
        whole: list[PricedPipeline] = []
        for label in labels[: BEAM_WIDTH if self.true_s else 2 * MOST_CANDIDATES]:
            if self.true_s and whole and label.bound >= min(item.objective for item in whole):
                break
            whole.append(self._unwind(label))
        found = SearchResult.of(0.0, whole)
        bound = labels[0].bound if self.true_s else found.objective
        return replace(found, lower_bound=min(bound, found.objective))

    def _first(self) -> _Label:
        rows = tuple(np.zeros((1, len(kind.columns))) for kind in self._resources)
        groups = (-1,) * len(self._groups)
        return _Label(0, rows, 0.0, (), groups, (), (), self._bound(0, 0, rows, 0.0))

    def _bound(self, stage: int, position: int, rows: tuple[Floats, ...], total_s: float) -> float:
        rest = self._to_go[stage][position]
        in_all_s = total_s + rest[-1]
        reached = np.concatenate([table.max(axis=0) for table in rows])
        busiest = np.maximum(np.maximum(reached, rest[:-1]), in_all_s * self._even)
        spread = self.objective.sum_weight * in_all_s
        return float(busiest @ self._weights + spread + self.objective.fixed_s)

    def _extend(self, label: _Label, stage: int, step: _Step) -> _Label | None:
        """Add one stage; ``None`` if it breaks a memory or a device group."""
        if step.target not in self._to_go[stage + 1]:
            return None
        blocks = self.lattice.masks[step.target] ^ self.lattice.masks[label.position]
        groups = self._place_groups(label, stage, blocks)
        memory = self._place_memory(label, stage, blocks, step.price)
        if groups is None or memory is None:
            return None
        held = self._place_together(label, stage, blocks, step.price)
        if held is None:
            return None
        rows = self._place_loads(label, stage, step.loads)
        total_s = label.total_s + step.price.load_s
        bound = max(label.bound, self._bound(stage + 1, step.target, rows, total_s))
        used, resident = memory
        return _Label(step.target, rows, total_s, used, groups, resident, held, bound, label, step)

    def _place_groups(self, label: _Label, stage: int, blocks: int) -> tuple[int, ...] | None:
        if not self._groups:
            return ()
        device, placed = self.slots[stage].device, list(label.groups)
        for number, group in enumerate(self._groups):
            if group & blocks:
                if placed[number] not in (-1, device):
                    return None
                placed[number] = device
        return tuple(placed)

    def _place_memory(
        self, label: _Label, stage: int, blocks: int, price: StagePrice
    ) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
        before, after = self._open_pools[stage], self._open_pools[stage + 1]
        if self.fits_together is not None:
            return (), ()
        used = dict(zip(before, label.used, strict=True))
        resident = dict(zip(before, label.resident, strict=True))
        if self._pool_is_shared[stage]:
            slot, weights = self.slots[stage], self.lattice.problem.shared_weights
            held = resident.get(slot.pool, 0)
            new = sum(1 << n for n, w in enumerate(weights) if w.users & blocks) & ~held
            total = used.get(slot.pool, 0.0) + price.memory_bytes
            total += sum(weights[n].num_bytes for n in bits(new))
            if total > slot.capacity:
                return None
            used[slot.pool], resident[slot.pool] = total, held | new
        return tuple(used[pool] for pool in after), tuple(resident[pool] for pool in after)

    def _place_together(
        self, label: _Label, stage: int, blocks: int, price: StagePrice
    ) -> tuple[Parts, ...] | None:
        """Stages in the memories that come again; ``None`` if this one does not fit with them."""
        if self.fits_together is None or not self._pool_is_shared[stage]:
            return label.held
        before, after = self._open_pools[stage], self._open_pools[stage + 1]
        held = dict(zip(before, label.held, strict=True))
        pool = self.slots[stage].pool
        part = (self.lattice.masks[label.position], blocks, stage, price)
        held[pool] = (*held.get(pool, ()), part)
        if not self.fits_together(held[pool]):
            return None
        return tuple(held[pool] for pool in after)

    def _place_loads(self, label: _Label, stage: int, loads: Floats) -> tuple[Floats, ...]:
        """Loads of the closed resources (their maximum) and of each one that comes again."""
        tables, start = [], 0
        for kind, rows in zip(self._resources, label.rows, strict=True):
            own = loads[start : start + len(kind.columns)]
            start += len(kind.columns)
            before, after = kind.still_open[stage], kind.still_open[stage + 1]
            if not before and not after:
                tables.append(np.maximum(rows, own))
                continue
            resource = kind.of_stage[stage]
            by_resource = {name: rows[1 + n] for n, name in enumerate(before)}
            by_resource[resource] = by_resource.get(resource, 0.0) + own
            closed = rows[0]
            if resource not in after:
                closed = np.maximum(closed, by_resource[resource])
            tables.append(np.stack([closed, *(by_resource[name] for name in after)]))
        return tuple(tables)

    def _unwind(self, label: _Label) -> PricedPipeline:
        boundaries, prices = [], []
        walk: _Label | None = label
        while walk is not None and walk.step is not None:
            boundaries.append(self.lattice.masks[walk.position])
            prices.append(walk.step.price)
            walk = walk.parent
        prices.reverse()
        boundaries.reverse()
        if self.true_s is not None:
            return PricedPipeline(self.true_s(boundaries, prices), (*boundaries,), (*prices,))
        seconds = self.objective.seconds([slot.device for slot in self.slots], prices)
        return PricedPipeline(seconds, tuple(boundaries), tuple(prices))


def _resources(objective: Objective, devices: Sequence[int]) -> tuple[_Resources, ...]:
    """Group the rows, and the outer seconds behind them, by the resources that they load."""
    columns: dict[tuple[int, ...], list[int]] = {}
    for column, row in enumerate(objective.rows):
        columns.setdefault(row.resources or tuple(devices), []).append(column)
    columns.setdefault(tuple(devices), []).append(len(objective.rows))
    return tuple(
        _Resources(
            of_stage,
            tuple(found),
            tuple(_still_open(of_stage, stage) for stage in range(len(devices) + 1)),
        )
        for of_stage, found in columns.items()
    )


def _still_open(names: Sequence[int], stage: int) -> tuple[int, ...]:
    """Names that occur both before and from ``stage`` on."""
    return tuple(sorted(set(names[:stage]) & set(names[stage:])))


def _undominated(labels: list[_Label]) -> list[_Label]:
    """Labels that no other label at the same boundary beats in every number."""
    if len(labels) == 1:
        return labels
    labels.sort(key=lambda label: label.bound)
    kept = undominated(np.array([label.numbers() for label in labels]))
    return [labels[position] for position in kept]
