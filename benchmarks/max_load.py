"""Max-load instances: values go straight to their readers, and host cores help.

The same exact search over ideals as ``planner/search/bottleneck.py``, whose pipelines relay every
value from stage to stage and run on devices alone. Here a value costs once per stage that reads it,
and blocks may run on a few host cores, where neither transfers nor memory count.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np

from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.search.bottleneck import BottleneckSearch, search_tables
from ipu_pipeline.planner.search.ideal_program import (
    IdealProgram,
    IdealTable,
    StagePositions,
    State,
)
from ipu_pipeline.planner.search.ideals import Lattice, TooManyIdeals
from ipu_pipeline.planner.search.problem import Problem, Slot, Value, bits, closure, mask_of
from ipu_pipeline.planner.search.stage_costs import (
    Bools,
    Floats,
    Ints,
    StageCosts,
    StageCostTable,
    both_ways_s,
)
from ipu_pipeline.planner.search.stage_price import (
    OptionPricer,
    PricedPipeline,
    SearchResult,
    message_s,
)

HOST = Slot(-1, -1)


@dataclass(frozen=True)
class MaxLoadProblem(Problem):
    """A problem whose values are not relayed, with host cores.

    Attributes:
        host_s: Seconds per block on a host core, or ``None``.
        host_only: Mask of the blocks that accelerators cannot run.
    """

    host_s: tuple[float, ...] | None = None
    host_only: int = 0

    @cached_property
    def host_worth(self) -> float:
        """Most device seconds that a second of a host core replaces."""
        shares = (
            option.total_s / seconds if seconds else inf
            for option, seconds in zip(self.fastest, self.host_s or (), strict=True)
            if option.total_s
        )
        return max(shares, default=0.0)


@dataclass(frozen=True)
class HostedPositions(StagePositions):
    """Positions of a pipeline, and the host cores that may be used anywhere in it.

    Attributes:
        hosts: Their number.
    """

    hosts: int = 0


@dataclass(frozen=True)
class HostedPipeline(PricedPipeline):
    """A pipeline and its price.

    Attributes:
        on_host: Whether a host core runs the stage.
    """

    on_host: tuple[bool, ...] = ()


class DirectPricer(OptionPricer):
    """Prices stages that receive what they read, and send it to every stage that reads it."""

    problem: MaxLoadProblem

    def prices(
        self, done: int, stage: int, slot: Slot, *, shared_pool: bool = False
    ) -> list[StagePrice]:
        """Return the price on a host core, or those of the base class."""
        if slot is HOST:
            seconds = sum((self.problem.host_s or ())[block] for block in bits(stage))
            picks = tuple(0 for _ in bits(stage))
            return [] if seconds == inf else [StagePrice(seconds, 0, 0, 0, picks=picks)]
        if stage & self.problem.host_only:
            return []
        return super().prices(done, stage, slot, shared_pool=shared_pool)

    def base_bytes(self, done: int, stage: int, in_flight: int) -> float:
        """Return the bytes of weights and inputs: what enters is not charged."""
        del done
        entering = sum(item.num_bytes for item in self.problem.inputs if item.users & stage)
        return sum(self.problem.held[block] for block in bits(stage)) + in_flight * entering

    def transfers(self, done: int, stage: int, slot: Slot) -> tuple[float, float]:
        """Return the seconds of forward and backward transfers over both boundaries."""
        del done
        forward = backward = 0.0
        sides = ((slot.link_in, self._entering(stage)), (slot.link_out, self._leaving(stage)))
        for link, values in sides:
            for value in values if link is not None else ():
                forward += message_s(link, value.forward_bytes)
                backward += message_s(link, value.backward_bytes)
        return forward, backward

    def _entering(self, stage: int) -> list[Value]:
        return [v for v in self.problem.values if v.consumers & stage
                and not stage >> v.producer & 1]  # fmt: skip

    def _leaving(self, stage: int) -> list[Value]:
        return [v for block in bits(stage) for v in self._by_producer[block]
                if v.consumers & ~stage]  # fmt: skip


class DirectCosts(StageCostTable):
    """Stage costs of :class:`DirectPricer`, with one link speed everywhere."""

    problem: MaxLoadProblem

    def __init__(self, lattice: Lattice, pricer: DirectPricer) -> None:
        """Prepare running totals over every set of ``lattice``."""
        self._closed: dict[int, Bools] = {}
        super().__init__(lattice, pricer)
        self._host = lattice.total(self.problem.host_s) if self.problem.host_s else None
        self._host_only = self._users(self.problem.host_only)

    def row_s(self, start: int, targets: Ints, slot: Slot) -> Floats:
        """Return seconds as the base class does; ``inf`` where a block needs a host core."""
        load_s = super().row_s(start, targets, slot)
        load_s[self._host_only[targets] > self._host_only[start]] = inf
        return load_s

    def host_row(self, start: int, limit_s: float, wanted: Bools) -> StageCosts:
        """Price the stages from ``start`` to ``wanted`` sets on a host core."""
        assert self._host is not None
        seconds, floor = self._host, self._host_floor
        stop = int(np.searchsorted(floor, (seconds[start] + limit_s) * (1 + 1e-12), side="right"))
        targets = self.lattice.supersets(start, start + 1, max(stop, start + 1))
        targets = targets[wanted[targets]]
        load_s = seconds[targets] - seconds[start]
        return StageCosts(targets, load_s, np.ones(len(targets), dtype=np.bool_))

    @cached_property
    def _host_floor(self) -> Floats:
        """Least host seconds of any set from a position on: they do not ascend themselves."""
        assert self._host is not None
        floor: Floats = np.minimum.accumulate(self._host[::-1])[::-1]
        return floor

    def _done(self, number: int) -> Bools:
        """Sets that contain every consumer of a value."""
        if number not in self._closed:
            rows = self.lattice.member[list(bits(self.problem.values[number].consumers))]
            self._closed[number] = np.all(rows, axis=0)
        return self._closed[number]

    def _entering_bytes(self) -> Floats:
        return np.zeros(len(self.lattice))

    def _transfer_s(self, start: int, targets: Ints, slot: Slot) -> Floats:
        link: Link | None = slot.link_out or slot.link_in
        if link is None:
            return np.zeros(len(targets))
        seconds = self.cut_s(link)[targets].copy()
        done, member = self.lattice.masks[start], self.lattice.member
        for number in np.flatnonzero(self._straddling[start]).tolist():
            value = self.problem.values[number]
            taken = np.zeros(len(targets), dtype=np.bool_)
            for block in bits(value.consumers & ~done):
                taken |= member[block][targets]
            counted = ~self._done(number)[targets]
            if not done >> value.producer & 1:  # a gradient: made behind, read in front
                made = member[value.producer][targets]
                taken, counted = taken | made, counted | ~made
            seconds += both_ways_s(link, value) * (taken.astype(np.int8) - counted)
        return seconds

    @cached_property
    def _straddling(self) -> Bools:
        """``[i, v]``: value v has an end in set i and an end outside."""
        table = np.zeros((len(self.lattice), len(self.problem.values)), dtype=np.bool_)
        for number, value in enumerate(self.problem.values):
            ends = self.lattice.member[list(bits(value.consumers | 1 << value.producer))]
            table[:, number] = ends.any(axis=0) & ~ends.all(axis=0)
        return table


@dataclass
class HostedTable(IdealTable):
    """A table by host cores, devices and start position.

    Attributes:
        by_host: Whether the first stage is on a host core.
    """

    by_host: Bools

    def hosted_path(self, devices: int, hosts: int) -> list[tuple[int, bool]]:
        """Positions after each stage of the best pipeline, and whether a host core runs it."""
        steps, position, last = [], 0, self.best.shape[-1] - 1
        while position != last:
            target = int(self.choice[hosts, devices, position])
            on_host = bool(self.by_host[hosts, devices, position])
            hosts, devices = hosts - on_host, devices - (not on_host)
            steps.append((target, on_host))
            position = target
        return steps


class HostedProgram(IdealProgram):
    """The program over ideals, any stage of which may be on a host core."""

    _rows: DirectCosts
    _layout: HostedPositions
    _table: HostedTable

    def _empty(self, shape: tuple[int, ...]) -> HostedTable:
        hosts = self._layout.hosts
        shape = (hosts + 1, *shape)
        if hosts:
            worth = self._rows.problem.host_worth
            self._elsewhere_s = hosts * self._limit * worth * self._fastest
            self._fewest = 0
        return HostedTable(
            np.full(shape, inf), np.full(shape, -1, np.int32), np.zeros(shape, np.bool_)
        )

    def _visit(self, start: int, low: int, high: int) -> None:
        super()._visit(start, low, high)
        if not self._layout.hosts:
            return
        on_devices = self._table.best[..., start].copy()
        row = self._rows.host_row(start, self._limit, self._reached)
        for hosts in range(1, self._layout.hosts + 1):
            for y in range(low, high + 1):
                self._lower(start, (hosts, y), row, (hosts - 1, y), HOST)
        self._table.by_host[..., start] = self._table.best[..., start] < on_devices

    def _settle(self, start: int, y: int, row: StageCosts, slot: Slot) -> None:
        for hosts in range(self._layout.hosts + 1):
            here: State = (hosts, y)
            self._lower(start, here, row, (hosts, y - 1), slot)


class MaxLoadSearch(BottleneckSearch):
    """Least load of the busiest position (``pace`` 1, ``spread`` 0)."""

    rows: DirectCosts
    layout: HostedPositions
    program = HostedProgram
    _tight = False  # stages on host cores are not counted ahead

    def at_once(self) -> float:
        """Bound without a search; a host core is worth part of a device."""
        hosts = self.layout.hosts
        if not hosts:
            return super().at_once()
        worth = self.rows.problem.host_worth
        if worth in (0.0, inf):
            return 0.0
        even = self._work_s() / (max(self.depths) + hosts * worth)
        return min(self.pace * even, self.upper_bound)

    def offer_neighbours(self) -> None:
        """As the base class, where there are no host cores."""
        if not self.layout.hosts:
            super().offer_neighbours()

    def offer(
        self, boundaries: Sequence[int], on_host: tuple[bool, ...] | None = None
    ) -> PricedPipeline:
        """Price a pipeline exactly and keep it."""
        hosted = on_host or (False,) * len(boundaries)
        left, slots = hosted.count(False), []
        for host in hosted:
            slots.append(HOST if host else self.layout.slots[left - 1])
            left -= not host
        found = HostedPipeline(**vars(self.keep(boundaries, slots)), on_host=hosted)
        self.offers[-1] = found
        return found

    def _even_s(self) -> float:
        devices = max(self.depths) + self.layout.hosts
        return self._work_s() / max(slot.speed for slot in self.layout.slots) / devices

    def _offer_all(self, table: IdealTable) -> None:
        assert isinstance(table, HostedTable)
        masks = self.rows.lattice.masks
        for depth in self.depths:
            for hosts in range(self.layout.hosts + 1):
                if table.best[hosts, depth, 0] < inf:
                    path = table.hosted_path(depth, hosts)
                    self.offer([masks[t] for t, _ in path], tuple(host for _, host in path))


def least_bottleneck(
    problem: MaxLoadProblem,
    positions: HostedPositions,
    depths: Sequence[int],
    max_ideals: int,
    deadline: float | None = None,
) -> SearchResult:
    """Least load of the busiest position over every order of the blocks.

    Blocks without time are merged into others first, where no split can lose by it.
    """
    small = Contraction.of(problem, min(slot.capacity for slot in positions.slots))
    pricer = DirectPricer(small.problem)
    lattices = [Lattice.of_masks(small.problem, _depth_first(small.problem))]
    with suppress(TooManyIdeals):
        lattices.append(Lattice(small.problem, limit=max_ideals))
    tables = [(DirectCosts(lattice, pricer), positions) for lattice in lattices]
    found = search_tables(tables, depths, (1.0, 0.0), deadline=deadline, search_class=MaxLoadSearch)
    whole = MaxLoadSearch(
        DirectCosts(Lattice.of_masks(problem, (0, problem.everything)), DirectPricer(problem)),
        positions, depths, 1.0, 0.0,
    )  # fmt: skip
    for item in found.pipelines:
        assert isinstance(item, HostedPipeline)
        whole.offer([small.expanded(mask) for mask in item.boundaries], item.on_host)
    lower = found.lower_bound if len(lattices) > 1 else whole.at_once()
    return SearchResult.of(lower, whole.offers)


def _depth_first(problem: MaxLoadProblem) -> list[int]:
    """Done blocks along one topological order that keeps branches together."""
    masks, done, ready = [0], 0, [b for b, mask in enumerate(problem.preds) if not mask][::-1]
    while ready:
        block = ready.pop()
        done |= 1 << block
        masks.append(done)
        opened = [s for s in bits(problem.succs[block]) if not problem.preds[s] & ~done]
        ready += opened[::-1]
    return masks


@dataclass(frozen=True)
class Contraction:
    """A problem with fewer blocks and the same optimum.

    Attributes:
        problem: The smaller problem.
        members: Per block of it, the mask of the blocks that it stands for.
    """

    problem: MaxLoadProblem
    members: tuple[int, ...]

    def expanded(self, mask: int) -> int:
        """The blocks that the blocks in ``mask`` stand for."""
        return sum(self.members[block] for block in bits(mask))

    @classmethod
    def of(cls, problem: MaxLoadProblem, capacity: float) -> Contraction:
        """Merge blocks that take no time into a neighbour, where no split can lose by it.

        Block b may go to the stage of block x when x is neither before a predecessor of b nor
        behind a successor. Then only values at b that x has no part in can newly cross a boundary
        of that stage or of the one that b leaves; and those between b and x alone no longer do. So
        where the first cost no more than the second, some best split has b with x.

        Args:
            problem: The problem.
            capacity: Memory of a stage; if not everything fits, blocks with bytes stay.
        """
        found = cls(problem, tuple(1 << block for block in range(problem.num_blocks)))
        ample = sum(problem.held) <= capacity and not problem.shared_weights
        while (pair := _mergeable(found.problem, ample=ample)) is not None:
            found = found._merged(*pair)
        return found

    def _merged(self, block: int, target: int) -> Contraction:
        old = self.problem
        preds = list(old.preds)
        preds[target] = (preds[target] | preds[block]) & ~(1 << target | 1 << block)
        for succ in bits(old.succs[block] & ~(1 << target)):
            preds[succ] |= 1 << target
        order = [b for b in _topological([m & ~(1 << block) for m in preds]) if b != block]
        number = {b: position for position, b in enumerate(order)}
        number[block] = number[target]

        def moved(mask: int) -> int:
            return mask_of({number[b] for b in bits(mask)})

        values = (
            replace(v, producer=number[v.producer],
                    consumers=moved(v.consumers) & ~(1 << number[v.producer]))
            for v in old.values
        )  # fmt: skip
        held = [*old.held]
        held[target] += held[block]
        members = [*self.members]
        members[target] |= members[block]
        return Contraction(
            replace(
                old,
                names=tuple(old.names[b] for b in order),
                preds=tuple(moved(preds[b] & ~(1 << block)) for b in order),
                options=tuple(old.options[b] for b in order),
                values=tuple(v for v in values if v.consumers),
                weight_bytes=tuple(held[b] for b in order),
                host_s=old.host_s and tuple(old.host_s[b] for b in order),
                host_only=moved(old.host_only),
            ),
            tuple(members[b] for b in order),
        )


def _topological(preds: Sequence[int]) -> list[int]:
    order, done, waiting = [], 0, list(range(len(preds)))
    while waiting:
        ready = [block for block in waiting if not preds[block] & ~done]
        order += ready
        done |= mask_of(ready)
        waiting = [block for block in waiting if not done >> block & 1]
    return order


def _mergeable(problem: MaxLoadProblem, *, ample: bool) -> tuple[int, int] | None:
    """A block that takes no time, and the block it may be merged into."""
    before = closure(problem.preds)
    ends: list[list[tuple[int, float]]] = [[] for _ in problem.names]
    for value in problem.values:
        mask = value.consumers | 1 << value.producer
        for block in bits(mask):
            ends[block].append((mask, value.forward_bytes + value.backward_bytes))
    for block, ways in enumerate(problem.options):
        takes = ways[0].total_s or ways[0].held_bytes(1) or ways[0].workspace_bytes
        if len(ways) > 1 or takes or (problem.held[block] and not ample):
            continue
        if (problem.host_s and problem.host_s[block]) or problem.host_only >> block & 1:
            continue
        for target in bits(_between(problem, before, block)):
            alone = 1 << block | 1 << target
            saved = sum(cost for mask, cost in ends[block] if not mask & ~alone)
            added = sum(cost for mask, cost in ends[block] if not mask >> target & 1)
            if added <= saved:
                return block, target
    return None


def _between(problem: MaxLoadProblem, before: Sequence[int], block: int) -> int:
    """Blocks that may be in the same stage whatever the split: behind what ``block`` needs."""
    preds, succs = problem.preds[block], problem.succs[block]
    mask = problem.everything & ~(1 << block)
    for succ in bits(succs):
        mask &= before[succ] | 1 << succ
    return mask_of(x for x in bits(mask) if not preds & ~(before[x] | 1 << x))
