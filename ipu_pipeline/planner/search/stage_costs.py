"""Prices of all stages that start at one boundary, as numpy rows over the boundaries they reach.

Seconds are exact where the quickest options surely fit, else lower bounds, which
:meth:`StageCostTable.exact_s` settles. Bytes lie between those of the smallest and the quickest
options.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.search.ideals import Lattice
from ipu_pipeline.planner.search.knapsack import byte_prices, tables
from ipu_pipeline.planner.search.problem import Slot, Value, bits
from ipu_pipeline.planner.search.stage_price import OptionPricer, message_s

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
_BYTES_EPS = 1e-9
_QUANTILES = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class StageCosts:
    """Stages from one boundary to each of ``targets``, at one slot.

    Attributes:
        targets: Positions of the boundaries after the stage.
        load_s: Seconds per microbatch; exact where ``certain``, else a lower bound; ``inf``
            where nothing fits.
        certain: Where the seconds are exact.
    """

    targets: Ints
    load_s: Floats
    certain: Bools


class StageCostTable:
    """Vectorised stage prices over one lattice."""

    def __init__(self, lattice: Lattice, pricer: OptionPricer) -> None:
        """Prepare running totals over every set of ``lattice``."""
        problem = pricer.problem
        self.lattice, self.pricer, self.problem = lattice, pricer, problem
        self._cut_s: dict[Link | None, Floats] = {None: np.zeros(len(lattice))}
        self._held: dict[int, tuple[Floats, Floats]] = {}
        self._most_bytes: dict[int, float] = {}
        self._settled: dict[tuple[int, int, Slot], float] = {}
        self._lagrange: dict[int, tuple[Floats, Floats]] = {}
        self._weights = lattice.total(problem.held)
        self._entering = self._entering_bytes()
        self._tied = [(item.num_bytes, self._users(item.users)) for item in problem.shared_weights]
        self._inputs = [(item.num_bytes, self._users(item.users)) for item in problem.inputs]
        self._entries = [(item.seconds, self._users(item.users)) for item in problem.entries]
        self._anchors = self._users(problem.anchors) if problem.anchors else None
        self._space = max((o.workspace_bytes for ways in problem.options for o in ways), default=0)

    def row(self, start: int, slot: Slot, limit_s: float, wanted: Bools) -> StageCosts:
        """Price the stages from ``start`` to ``wanted`` sets whose load may be ``limit_s``."""
        targets = self.reach(start, slot, limit_s)
        targets = targets[wanted[targets]]
        return self.with_memory(start, targets, self.row_s(start, targets, slot), slot)

    def row_s(self, start: int, targets: Ints, slot: Slot) -> Floats:
        """Seconds of the stages from ``start`` to ``targets`` with their quickest options."""
        load_s: Floats = (self.lattice.work_s[targets] - self.lattice.work_s[start]) / slot.speed
        load_s += self._transfer_s(start, targets, slot)
        for seconds, users in self._entries:
            load_s += seconds / slot.speed * (users[targets] > users[start])
        return load_s

    def reach(self, start: int, slot: Slot, limit_s: float) -> Ints:
        """Positions of the sets that a stage of at most ``limit_s`` can reach from ``start``."""
        work = self.lattice.work_s
        top = (work[start] + limit_s * slot.speed) * (1 + 1e-12) if limit_s < inf else inf
        stop = int(np.searchsorted(work, top, side="right"))
        found = self.lattice.supersets(start, start + 1, stop)
        if self._anchors is None:
            return found
        behind: Ints = found[self._anchors[found] > self._anchors[start]]
        return behind

    def with_memory(self, start: int, targets: Ints, load_s: Floats, slot: Slot) -> StageCosts:
        """Mark what surely fits, what surely does not, and what must be looked at."""
        if not self.memory_matters(slot):
            return StageCosts(targets, load_s, np.ones(len(targets), dtype=np.bool_))
        least, quick = self.held_bytes(slot.in_flight)
        common = self._weights[targets] - self._weights[start]
        common = common + slot.in_flight * self._entering[start]
        for num_bytes, users in self._tied:
            common += num_bytes * (users[targets] > users[start])
        for num_bytes, users in self._inputs:
            common += slot.in_flight * num_bytes * (users[targets] > users[start])
        slack = _BYTES_EPS * slot.capacity
        low = common + least[targets] - least[start]
        high = common + quick[targets] - quick[start] + self._space
        load_s = np.where(low > slot.capacity + slack, inf, load_s)
        certain = high <= slot.capacity - slack
        if not certain.all():
            room = slot.capacity - common
            load_s = load_s + self._extra_s(start, targets, room, slot.in_flight) / slot.speed
        return StageCosts(targets, load_s, certain)

    def _extra_s(self, start: int, targets: Ints, room: Floats, in_flight: int) -> Floats:
        """Seconds that memory surely adds to the quickest options (Lagrangian bound).

        For any price per byte p >= 0, no selection within ``room`` bytes is quicker than
        ``sum of min (seconds + p bytes) - p room``.
        """
        prices, totals = self._priced(in_flight)
        floor_s = totals[:, targets] - totals[:, start : start + 1] - prices[:, None] * room
        quick_s = self.lattice.work_s[targets] - self.lattice.work_s[start]
        least: Floats = floor_s.max(axis=0) * (1 - 1e-12)
        extra_s: Floats = np.maximum(least - quick_s, 0.0)
        return extra_s

    def _priced(self, in_flight: int) -> tuple[Floats, Floats]:
        """Prices per byte worth trying, and per price the running minimum of each set."""
        if in_flight not in self._lagrange:
            seconds, held = tables(self.problem.options, in_flight)
            prices = np.unique(np.quantile(byte_prices(seconds, held), _QUANTILES))
            least = [(seconds + price * held).min(axis=1).tolist() for price in prices.tolist()]
            self._lagrange[in_flight] = prices, np.stack([self.lattice.total(s) for s in least])
        return self._lagrange[in_flight]

    def memory_matters(self, slot: Slot) -> bool:
        """Whether a stage of all blocks with the quickest options could overflow the slot."""
        if slot.in_flight not in self._most_bytes:
            entering = float(self._entering.max()) + sum(size for size, _ in self._inputs)
            stash = sum(option.held_bytes(slot.in_flight) for option in self.problem.fastest)
            weights = sum(self.problem.held) + sum(size for size, _ in self._tied)
            self._most_bytes[slot.in_flight] = (
                stash + weights + self._space + slot.in_flight * entering
            )
        return self._most_bytes[slot.in_flight] > slot.capacity * (1 - _BYTES_EPS)

    def exact_s(self, start: int, target: int, slot: Slot) -> float:
        """Seconds of one stage with the best options that fit; ``inf`` if none do."""
        key = (start, target, slot)
        if key not in self._settled:
            done = self.lattice.masks[start]
            price = self.pricer.best(done, self.lattice.masks[target] ^ done, slot)
            self._settled[key] = inf if price is None else price.load_s
        return self._settled[key]

    def held_bytes(self, in_flight: int) -> tuple[Floats, Floats]:
        """Bytes of each set with the smallest and with the quickest options."""
        if in_flight not in self._held:
            options = self.problem.options
            least = [min(o.held_bytes(in_flight) for o in ways) for ways in options]
            quick = [option.held_bytes(in_flight) for option in self.problem.fastest]
            self._held[in_flight] = (self.lattice.total(least), self.lattice.total(quick))
        return self._held[in_flight]

    def cut_s(self, link: Link | None) -> Floats:
        """Seconds of all messages over each boundary, were ``link`` there."""
        if link not in self._cut_s:
            total = np.zeros(len(self.lattice))
            for number, value in enumerate(self.problem.values):
                total[self._open(number)] += both_ways_s(link, value)
            self._cut_s[link] = total
        return self._cut_s[link]

    def _users(self, mask: int) -> Ints:
        """How many blocks of ``mask`` are in each set."""
        counts: Ints = self.lattice.member[list(bits(mask))].sum(axis=0, dtype=np.int64)
        return counts

    def _open(self, number: int) -> Bools:
        """Boundaries that a value crosses: its producer on one side, a consumer on the other."""
        value = self.problem.values[number]
        made = self.lattice.member[value.producer]
        readers = self.lattice.member[list(bits(value.consumers))]
        crossed: Bools = (made & ~readers.all(axis=0)) | (~made & readers.any(axis=0))
        return crossed

    def _entering_bytes(self) -> Floats:
        total = np.zeros(len(self.lattice))
        for number, value in enumerate(self.problem.values):
            total[self._open(number)] += value.held_bytes
        return total

    def _transfer_s(self, start: int, targets: Ints, slot: Slot) -> Floats:
        seconds: Floats = self.cut_s(slot.link_out)[targets] + self.cut_s(slot.link_in)[start]
        return seconds


def both_ways_s(link: Link | None, value: Value) -> float:
    """Seconds of a value and of its gradient over ``link``."""
    if link is None:
        return 0.0
    return message_s(link, value.forward_bytes) + message_s(link, value.backward_bytes)
