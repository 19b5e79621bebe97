"""The exact price of one stage: its seconds, its bytes, and the options its blocks take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.search.knapsack import (
    EXACT_BLOCKS,
    EXACT_POINTS,
    MOST_POINTS,
    NOTHING,
    Point,
    Selection,
    grown,
    least_time,
    thinned,
    within,
)
from ipu_pipeline.planner.search.problem import Problem, Slot, Value, bits

MOST_CANDIDATES = 8


@dataclass(frozen=True)
class PricedPipeline:
    """One complete pipeline and its price.

    Attributes:
        objective: Seconds per optimizer step in the search's closed form.
        boundaries: Mask of the done blocks after each stage.
        prices: Price of each stage.
    """

    objective: float
    boundaries: tuple[int, ...]
    prices: tuple[StagePrice, ...]


@dataclass(frozen=True)
class SearchResult:
    """What a search knows when it ends.

    Attributes:
        lower_bound: No split is quicker; the best one's objective when the search was complete.
        pipelines: The best splits found, best first, at most :data:`MOST_CANDIDATES`.
    """

    lower_bound: float
    pipelines: tuple[PricedPipeline, ...] = ()

    @property
    def objective(self) -> float:
        """Seconds of the best split; ``inf`` without one."""
        return self.pipelines[0].objective if self.pipelines else inf

    @classmethod
    def of(cls, lower_bound: float, pipelines: Iterable[PricedPipeline]) -> SearchResult:
        """Keep the best distinct ``pipelines``."""
        best: dict[tuple[int, ...], PricedPipeline] = {}
        for item in sorted(pipelines, key=lambda item: item.objective):
            best.setdefault(item.boundaries, item)
        return cls(lower_bound, tuple(best.values())[:MOST_CANDIDATES])


class StagePricer(Protocol):
    """Prices stages; a backend may supply its own, which knows more than sums over blocks.

    A price must depend on nothing but the arguments, its seconds must not be below those of the
    blocks' quickest options at the slot's speed, and ``picks`` names an option of every block.
    """

    def prices(
        self, done: int, stage: int, slot: Slot, *, shared_pool: bool = False
    ) -> list[StagePrice]:
        """Return every undominated way to run ``stage`` at ``slot`` after ``done``.

        Args:
            done: Mask of the blocks of earlier stages.
            stage: Mask of the blocks of this stage.
            slot: Where it runs: its ``index`` among ``num_stages``, device, microbatches in flight.
            shared_pool: Other stages use the same memory: bytes of all of them are added up, so
                smaller but slower ways count, and parameters shared with other blocks are left
                out of ``memory_bytes``.

        Returns:
            Nothing when the stage does not fit.
        """
        ...


class OptionPricer:
    """Prices stages ``done .. done | stage`` of one problem and remembers the answers."""

    def __init__(self, problem: Problem, *, split_passes: bool = False) -> None:
        """Price ``problem``; ``split_passes`` keeps options that trade forward for backward."""
        self.problem = problem
        self._split_passes = split_passes
        self._stage_memo: dict[tuple[tuple[int, ...], int, float, bool], list[Selection]] = {}
        self._frontiers: dict[tuple[int, float], dict[tuple[int, ...], list[Point]]] = {}
        # Whether some stage has more undominated ways than were kept: its optimum is not proven.
        self.thinned = False
        numbers: dict[tuple[BlockChoice, ...], int] = {}
        self._menu = [numbers.setdefault(ways, len(numbers)) for ways in problem.options]
        self._alive: dict[int, list[Value]] = {}
        self._by_producer: list[list[Value]] = [[] for _ in problem.names]
        for value in problem.values:
            self._by_producer[value.producer].append(value)

    def prices(
        self, done: int, stage: int, slot: Slot, *, shared_pool: bool = False
    ) -> list[StagePrice]:
        """Return every undominated way to run ``stage``, as :meth:`StagePricer.prices`."""
        anchors = self.problem.anchors
        if stage & slot.forbidden or (anchors and not stage & anchors):
            return []
        base = self.base_bytes(done, stage, slot.in_flight)
        shared = 0.0 if shared_pool else self.shared_bytes(stage)
        budget = slot.capacity - base - shared
        selections = self._selections(stage, slot, budget, shared_pool=shared_pool)
        if not selections:
            return []
        return [self.stage_price(done, stage, slot, item, base + shared) for item in selections]

    def stage_price(
        self, done: int, stage: int, slot: Slot, chosen: Selection, base: float
    ) -> StagePrice:
        """Return the price of a stage that holds ``base`` bytes besides those of its options."""
        send_forward, send_backward = self.transfers(done, stage, slot)
        entering_s = sum(item.seconds for item in self.problem.entries if item.users & stage)
        return StagePrice(
            chosen.forward_s / slot.speed,
            (chosen.backward_s + entering_s) / slot.speed,
            send_forward,
            send_backward,
            self.outer_s(stage) / slot.speed,
            base + chosen.held_bytes,
            chosen.picks,
        )

    def best(self, done: int, stage: int, slot: Slot) -> StagePrice | None:
        """Return the quickest way that fits the slot's own memory, or ``None``."""
        found = self.prices(done, stage, slot)
        return min(found, key=lambda price: price.load_s) if found else None

    def base_bytes(self, done: int, stage: int, in_flight: int) -> float:
        """Bytes that no option changes: private weights, and what enters, per microbatch."""
        entering = sum(value.held_bytes for value in self._crossing(done))
        entering += sum(item.num_bytes for item in self.problem.inputs if item.users & stage)
        return sum(self.problem.held[block] for block in bits(stage)) + in_flight * entering

    def shared_bytes(self, stage: int) -> float:
        """Bytes of the parameters that this stage and other blocks use, each once."""
        return sum(s.num_bytes for s in self.problem.shared_weights if s.users & stage)

    def outer_s(self, stage: int) -> float:
        """Seconds per optimizer step at speed 1: updates and gradient exchanges."""
        exchanged = sum(
            item.seconds
            for item in self.problem.exchanges
            if item.users & stage and item.users & ~stage
        )
        return exchanged + sum(self.problem.outer[block] for block in bits(stage))

    def _crossing(self, done: int) -> list[Value]:
        """Values alive at the boundary behind ``done``."""
        if done not in self._alive:
            self._alive[done] = [
                value
                for block in bits(done)
                for value in self._by_producer[block]
                if value.consumers & ~done
            ]
        return self._alive[done]

    def transfers(self, done: int, stage: int, slot: Slot) -> tuple[float, float]:
        """Seconds of forward and of backward transfers over both boundaries of the stage."""
        before = self.crossing_s(done, slot.link_in)
        behind = self.crossing_s(done | stage, slot.link_out)
        return before[0] + behind[0], before[1] + behind[1]

    def crossing_s(self, done: int, link: Link | None) -> tuple[float, float]:
        """Seconds of forward and of backward transfers over the boundary behind ``done``."""
        if link is None:
            return 0.0, 0.0
        values = self._crossing(done)
        forward_s = sum(message_s(link, value.forward_bytes) for value in values)
        return forward_s, sum(message_s(link, value.backward_bytes) for value in values)

    def _selections(
        self, stage: int, slot: Slot, budget: float, *, shared_pool: bool
    ) -> list[Selection]:
        """Ways to run the stage; what counts is how many blocks of each kind it has."""
        blocks = sorted(bits(stage), key=self._menu.__getitem__)
        menus = tuple(self._menu[block] for block in blocks)
        key = (menus, slot.in_flight, budget, shared_pool)
        if key not in self._stage_memo:
            ways = [self.problem.options[block] for block in blocks]
            if shared_pool or (self._split_passes and _forward_varies(ways)):
                points = self._frontier(menus, ways, slot)
                found = within(points, budget, by_memory=shared_pool)
            else:
                one = least_time(ways, slot.in_flight, budget)
                found = [] if one is None else [one]
            self._stage_memo[key] = found
        order = sorted(range(len(blocks)), key=blocks.__getitem__)
        return [
            replace(item, picks=tuple(item.picks[place] for place in order))
            for item in self._stage_memo[key]
        ]

    def _frontier(
        self, menus: tuple[int, ...], ways: Sequence[Sequence[BlockChoice]], slot: Slot
    ) -> list[Point]:
        """Undominated selections, grown block by block from the longest known beginning."""
        known = self._frontiers.setdefault((slot.in_flight, slot.capacity), {(): [NOTHING]})
        length = len(menus)
        while menus[:length] not in known:
            length -= 1
        points = known[menus[:length]]
        most = EXACT_POINTS if len(menus) <= EXACT_BLOCKS else MOST_POINTS
        for number in range(length, len(menus)):
            points = grown(points, ways[number], slot.in_flight, slot.capacity)
            if len(points) > most:
                points, self.thinned = thinned(points, most), True
            known[menus[: number + 1]] = points
        return points


def message_s(link: Link, num_bytes: float) -> float:
    """Seconds to send ``num_bytes`` in one message; 0 for nothing (as ``Link.transfer_s``)."""
    return link.latency_s + num_bytes / link.bytes_per_s if num_bytes else 0.0


def _forward_varies(ways: Sequence[Sequence[BlockChoice]]) -> bool:
    return any(len({option.forward_s for option in options}) > 1 for options in ways)
