"""The exact price of one stage: its seconds, its bytes, and the options its blocks take.

Which option each block of one stage takes: the least time that fits the memory, exactly.

A multiple-choice knapsack. Partial selections are kept as a Pareto frontier of
(time, held bytes); a frontier point is dropped when even the fractional relaxation of the
blocks still open cannot beat a selection that is already known (Dantzig's bound).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.search.problem import Option, Problem, Slot, Value, bits


@dataclass(frozen=True)
class StagePrice:
    """A stage at one slot, with one way to run it. Seconds are for one microbatch.

    Attributes:
        forward_s: Compute of the forward pass.
        backward_s: Compute of the backward pass, recomputation included.
        send_forward_s: Forward transfers over both boundaries.
        send_backward_s: Gradient transfers over both boundaries.
        outer_s: Seconds per optimizer step (update, all-reduce).
        memory_bytes: Everything the stage holds, parameters shared with other blocks of the
            stage once; parameters shared with other stages included.
        picks: Option of each block of the stage, ascending.
        extra_s: Seconds that rows of their own count (copies over a link, for one).
    """

    forward_s: float
    backward_s: float
    send_forward_s: float
    send_backward_s: float
    outer_s: float
    memory_bytes: float
    picks: tuple[int, ...]
    extra_s: tuple[float, ...] = ()

    @property
    def forward_load_s(self) -> float:
        """Seconds that the forward pass of one microbatch occupies the device."""
        return self.forward_s + self.send_forward_s

    @property
    def backward_load_s(self) -> float:
        """Seconds that the backward pass of one microbatch occupies the device."""
        return self.backward_s + self.send_backward_s

    @property
    def load_s(self) -> float:
        """Seconds that one microbatch occupies the device."""
        return self.forward_load_s + self.backward_load_s


MOST_CANDIDATES = 8


@dataclass(frozen=True)
class PricedPipeline:
    """One complete pipeline and its price.

    Attributes:
        objective: Seconds per optimizer step in the search's closed form.
        boundaries: Mask of the done blocks after each stage.
        prices: Price of each stage.
        on_host: Whether a host core runs the stage (max-load instances).
    """

    objective: float
    boundaries: tuple[int, ...]
    prices: tuple[StagePrice, ...]
    on_host: tuple[bool, ...] = ()


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

    The search relies on three things: a price depends on nothing but the arguments; its seconds
    are never below those of the blocks' quickest options at the slot's speed (the bound that
    spares it most stages); ``picks`` names an option of every block, by which the plan says how
    it runs.
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
        numbers: dict[tuple[Option, ...], int] = {}
        self._menu = [numbers.setdefault(ways, len(numbers)) for ways in problem.options]
        self._alive: dict[int, list[Value]] = {}
        self._by_producer: list[list[Value]] = [[] for _ in problem.names]
        for value in problem.values:
            self._by_producer[value.producer].append(value)

    def prices(
        self, done: int, stage: int, slot: Slot, *, shared_pool: bool = False
    ) -> list[StagePrice]:
        """Return every undominated way to run ``stage`` at ``slot`` after ``done``; may be empty.

        Args:
            done: Mask of the blocks of earlier stages.
            stage: Mask of the blocks of this stage.
            slot: Where it runs.
            shared_pool: Other stages use the same memory, so smaller but slower ways count too.
        """
        if slot.host:
            return self._host_price(stage)
        if stage & slot.forbidden or stage & self.problem.host_only:
            return []
        base = self.base_bytes(done, stage, slot.in_flight)
        shared = 0.0 if shared_pool else self.shared_bytes(stage)
        budget = slot.capacity - base - shared
        selections = self._selections(stage, slot, budget, shared_pool=shared_pool)
        if not selections:
            return []
        send_forward, send_backward = self.transfers(done, stage, slot)
        outer = self.outer_s(stage) / slot.speed
        return [
            StagePrice(
                item.forward_s / slot.speed,
                item.backward_s / slot.speed,
                send_forward,
                send_backward,
                outer,
                base + shared + item.held_bytes,
                item.picks,
            )
            for item in selections
        ]

    def best(self, done: int, stage: int, slot: Slot) -> StagePrice | None:
        """Return the quickest way that fits the slot's own memory, or ``None``."""
        found = self.prices(done, stage, slot)
        return min(found, key=lambda price: price.load_s) if found else None

    def base_bytes(self, done: int, stage: int, in_flight: int) -> float:
        """Bytes that no option changes: private weights, and what enters, per microbatch.

        Without relays (the public instance formats) what enters is not charged.
        """
        problem = self.problem
        entering = 0.0
        if problem.relay:
            entering += sum(value.forward_bytes for value in self.entering(done, stage))
        entering += sum(item.num_bytes for item in problem.inputs if item.users & stage)
        return sum(problem.held[block] for block in bits(stage)) + in_flight * entering

    def shared_bytes(self, stage: int) -> float:
        """Bytes of the parameters that this stage and other blocks use, each once."""
        return sum(s.num_bytes for s in self.problem.shared_weights if s.users & stage)

    def least_bytes(self, done: int, stage: int, slot: Slot) -> float:
        """Fewest bytes with which the stage runs at ``slot``, parameters of other stages apart."""
        ways = [self.problem.options[block] for block in bits(stage)]
        spaces = sorted({o.workspace_bytes for options in ways for o in options})
        least = inf
        for space in spaces:
            fitting = [
                [o.held_bytes(slot.in_flight) for o in options if o.workspace_bytes <= space]
                for options in ways
            ]
            if all(fitting):
                least = min(least, space + sum(min(sizes) for sizes in fitting))
        base = self.base_bytes(done, stage, slot.in_flight)
        return base + self.shared_bytes(stage) + least

    def outer_s(self, stage: int) -> float:
        """Seconds per optimizer step at speed 1: updates and gradient exchanges."""
        exchanged = sum(
            item.seconds
            for item in self.problem.exchanges
            if item.users & stage and item.users & ~stage
        )
        return exchanged + sum(self.problem.outer[block] for block in bits(stage))

    def entering(self, done: int, stage: int) -> list[Value]:
        """Values made outside that the stage receives (to relay them, too)."""
        if not self.problem.relay:
            return [v for v in self.problem.values if v.consumers & stage
                    and not stage >> v.producer & 1]  # fmt: skip
        return self._crossing(done)

    def leaving(self, done: int, stage: int) -> list[Value]:
        """Values that the stage sends on (relayed ones, too)."""
        if not self.problem.relay:
            return [v for block in bits(stage) for v in self._by_producer[block]
                    if v.consumers & ~stage]  # fmt: skip
        return self._crossing(done | stage)

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
        forward = backward = 0.0
        sides = ((slot.link_in, self.entering), (slot.link_out, self.leaving))
        for link, values_of in sides:
            if link is None:
                continue
            for value in values_of(done, stage):
                forward += message_s(link, value.forward_bytes)
                backward += message_s(link, value.backward_bytes)
        return forward, backward

    def _host_price(self, stage: int) -> list[StagePrice]:
        times = self.problem.host_s or ()
        seconds = sum(times[block] for block in bits(stage))
        if seconds == inf:
            return []
        picks = tuple(0 for _ in bits(stage))
        return [StagePrice(seconds, 0.0, 0.0, 0.0, 0.0, 0.0, picks)]

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
        self, menus: tuple[int, ...], ways: Sequence[Sequence[Option]], slot: Slot
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
                points, self.thinned = _thinned(points, most), True
            known[menus[: number + 1]] = points
        return points


def message_s(link: Link, num_bytes: float) -> float:
    """Seconds to send ``num_bytes`` in one message; 0 for nothing (as ``Link.transfer_s``)."""
    return link.latency_s + num_bytes / link.bytes_per_s if num_bytes else 0.0


def _forward_varies(ways: Sequence[Sequence[Option]]) -> bool:
    return any(len({option.forward_s for option in options}) > 1 for options in ways)


Floats = NDArray[np.float64]
# Seconds forward and backward, bytes held, largest workspace, picks.
Point = tuple[float, float, float, float, tuple[int, ...]]
NOTHING: Point = (0.0, 0.0, 0.0, 0.0, ())
# Most undominated selections that are kept of a stage: of few blocks, and of more.
EXACT_BLOCKS = 12
EXACT_POINTS = 512
MOST_POINTS = 64
_EPS = 1e-12
# A table of pairs is quicker for some; of more it takes too much memory.
_MOST_IN_A_TABLE = 512


@dataclass(frozen=True)
class Selection:
    """One option per block of a stage.

    Attributes:
        forward_s: Seconds of the forward passes at speed 1.
        backward_s: Seconds of the backward passes at speed 1.
        held_bytes: Bytes of stash and fixed parts, plus the largest workspace.
        picks: Position of the chosen option, per block.
    """

    forward_s: float
    backward_s: float
    held_bytes: float
    picks: tuple[int, ...]


def summarize(ways: Sequence[Sequence[Option]], picks: Sequence[int], in_flight: int) -> Selection:
    """Add up the options ``picks`` of the blocks ``ways``."""
    chosen = [options[pick] for options, pick in zip(ways, picks, strict=True)]
    return Selection(
        sum(option.forward_s for option in chosen),
        sum(option.backward_s for option in chosen),
        sum(option.held_bytes(in_flight) for option in chosen)
        + max((option.workspace_bytes for option in chosen), default=0),
        tuple(picks),
    )


def fastest_picks(ways: Sequence[Sequence[Option]], in_flight: int) -> list[int]:
    """Position of the quickest option of each block; the smaller one of equals."""
    return [
        min(range(len(o)), key=lambda p: (o[p].total_s, o[p].held_bytes(in_flight))) for o in ways
    ]


def least_time(
    ways: Sequence[Sequence[Option]], in_flight: int, budget_bytes: float
) -> Selection | None:
    """Return the quickest selection within ``budget_bytes``; ``None`` when nothing fits."""
    quick = summarize(ways, fastest_picks(ways, in_flight), in_flight)
    if quick.held_bytes <= budget_bytes:
        return quick
    best: Selection | None = None
    for limit in sorted({o.workspace_bytes for options in ways for o in options}, reverse=True):
        bound = inf if best is None else best.forward_s + best.backward_s
        found = _knapsack(ways, in_flight, budget_bytes - limit, limit, bound)
        if found is None:
            continue
        best = summarize(ways, found, in_flight)
    return best


def pareto(
    ways: Sequence[Sequence[Option]], in_flight: int, budget_bytes: float, *, by_memory: bool
) -> list[Selection]:
    """Return every selection within the budget that no other one dominates.

    Args:
        ways: Options of each block.
        in_flight: Microbatches kept.
        budget_bytes: Largest ``held_bytes``.
        by_memory: Also keep slower selections that hold fewer bytes (the memory is shared).
    """
    points = [NOTHING]
    for options in ways:
        points = grown(points, options, in_flight, budget_bytes)
    return within(points, budget_bytes, by_memory=by_memory)


def grown(
    points: Sequence[Point], options: Sequence[Option], in_flight: int, budget_bytes: float
) -> list[Point]:
    """Add one block to the undominated selections of others."""
    return _undominated(
        [
            (f + o.forward_s, b + o.backward_s, held + o.held_bytes(in_flight),
             max(space, o.workspace_bytes), (*picks, pick))
            for f, b, held, space, picks in points
            for pick, o in enumerate(options)
            if held + o.held_bytes(in_flight) + max(space, o.workspace_bytes) <= budget_bytes
        ]
    )  # fmt: skip


def within(points: Sequence[Point], budget_bytes: float, *, by_memory: bool) -> list[Selection]:
    """Selections of ``points`` that fit, without those that another one dominates."""
    results = [
        Selection(f, b, held + space, picks)
        for f, b, held, space, picks in points
        if held + space <= budget_bytes
    ]
    results.sort(key=lambda s: (s.forward_s + s.backward_s, s.held_bytes))
    kept: list[Selection] = []
    for item in results:
        if not any(_dominates(other, item, by_memory=by_memory) for other in kept):
            kept.append(item)
    return kept


def _thinned(points: list[Point], most: int) -> list[Point]:
    """Keep ``most`` of them, evenly by time, the quickest and the smallest ones included."""
    points = sorted(points, key=lambda point: point[0] + point[1])
    step = (len(points) - 1) / (most - 2)
    smallest = min(points, key=lambda point: point[2] + point[3])
    return [*(points[round(step * n)] for n in range(most - 1)), smallest]


def _dominates(first: Selection, second: Selection, *, by_memory: bool) -> bool:
    return (
        first.forward_s <= second.forward_s
        and first.backward_s <= second.backward_s
        and (not by_memory or first.held_bytes <= second.held_bytes)
    )


def _undominated(points: list[Point]) -> list[Point]:
    """Drop points that another one beats in all four numbers."""
    points.sort()
    if not 0 < len(points) <= _MOST_IN_A_TABLE:
        return _undominated_of_many(points)
    backward, held, space = np.array([point[1:4] for point in points]).T
    beats = (backward[:, None] <= backward) & (held[:, None] <= held) & (space[:, None] <= space)
    dropped = np.triu(beats, k=1).any(axis=0)  # by one before it, which is not slower forward
    return [point for point, drop in zip(points, dropped.tolist(), strict=True) if not drop]


def _undominated_of_many(points: Sequence[Point]) -> list[Point]:
    kept: list[Point] = []
    for point in points:
        if not any(k[1] <= point[1] and k[2] <= point[2] and k[3] <= point[3] for k in kept):
            kept.append(point)
    return kept


def _knapsack(
    ways: Sequence[Sequence[Option]],
    in_flight: int,
    budget_bytes: float,
    limit: float,
    upper_s: float,
) -> list[int] | None:
    """Quickest picks with workspaces up to ``limit`` that beat ``upper_s``, or ``None``."""
    menus = [
        _frontier([(o.total_s, o.held_bytes(in_flight), pick) for pick, o in enumerate(options)
                   if o.workspace_bytes <= limit])
        for options in ways
    ]  # fmt: skip
    if not all(menus):
        return None
    relaxed_s, greedy_s, levels = _greedy(menus, budget_bytes)
    if relaxed_s >= upper_s * (1 - _EPS):
        return None
    better = None
    if greedy_s > relaxed_s * (1 + _EPS):
        better = _search(menus, budget_bytes, min(upper_s, greedy_s))
    if better is None and greedy_s < upper_s:
        better = levels
    if better is None:
        return None
    return [menu[level][2] for menu, level in zip(menus, better, strict=True)]


def _greedy(
    menus: list[list[tuple[float, float, int]]], budget_bytes: float
) -> tuple[float, float, list[int]]:
    """Fractional least time, and a selection that takes the best seconds per byte first.

    Returns:
        The relaxed seconds (``inf`` if nothing fits), the selection's, and its levels.
    """
    levels = [len(menu) - 1 for menu in menus]
    seconds = sum(menu[-1][0] for menu in menus)
    room = budget_bytes - sum(menu[-1][1] for menu in menus)
    if room < 0:
        return inf, inf, levels
    steps = sorted((*step, index) for index, menu in enumerate(menus) for step in _hull_steps(menu))
    relaxed_s, relaxed_room, full = seconds, room, set()
    for _, size, saved, level, index in steps:
        part = min(1.0, relaxed_room / size)
        relaxed_s, relaxed_room = relaxed_s + part * saved, relaxed_room - part * size
        if size <= room and index not in full:
            seconds, room, levels[index] = seconds + saved, room - size, level
        else:
            full.add(index)
    return relaxed_s, seconds, levels


def _search(
    menus: list[list[tuple[float, float, int]]], budget_bytes: float, upper_s: float
) -> list[int] | None:
    """Levels of the quickest selection below ``upper_s``, or ``None``."""
    order = sorted(range(len(menus)), key=lambda i: menus[i][0][1] - menus[i][-1][1], reverse=True)
    spent, left = _suffix_bounds([menus[i] for i in order])
    times, held = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for depth, position in enumerate(order):
        menu = menus[position]
        grown_t = (times[:, None] + np.array([way[0] for way in menu])).ravel()
        grown_m = (held[:, None] + np.array([way[1] for way in menu])).ravel()
        reach = grown_t + _relaxed(spent[depth + 1], left[depth + 1], budget_bytes - grown_m)
        keep = _thin(grown_t, grown_m, reach, upper_s)
        if not keep.size:
            return None
        times, held = grown_t[keep], grown_m[keep]
        trail.append((keep // len(menu), keep % len(menu)))
    levels, point = [0] * len(menus), int(np.argmin(times))
    for position, (parents, chosen) in zip(reversed(order), reversed(trail), strict=True):
        levels[position] = int(chosen[point])
        point = int(parents[point])
    return levels


def _frontier(ways: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Options by ascending time and descending bytes; dominated ones dropped."""
    kept: list[tuple[float, float, int]] = []
    for way in sorted(ways):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept


def _thin(times: Floats, held: Floats, reach: Floats, upper_s: float) -> NDArray[np.int64]:
    """Positions of the undominated points that can still beat ``upper_s``."""
    alive = np.flatnonzero(reach < upper_s * (1 - _EPS) if upper_s < inf else reach < inf)
    order = alive[np.lexsort((times[alive], held[alive]))]
    if not order.size:
        return order
    best_before = np.concatenate(([inf], np.minimum.accumulate(times[order])[:-1]))
    return order[times[order] < best_before]


def _suffix_bounds(menus: list[list[tuple[float, float, int]]]) -> tuple[Floats, Floats]:
    """Per suffix of the blocks: breakpoints (bytes, seconds) of its relaxed least time.

    Row d is for the blocks from d on; steps of earlier blocks have no width in it.
    """
    steps = sorted(
        (*step[:3], index) for index, menu in enumerate(menus) for step in _hull_steps(menu)
    )
    owner = np.array([step[3] for step in steps], dtype=np.int64)
    is_open = owner >= np.arange(len(menus) + 1)[:, None]
    tables = []
    for axis, column in ((1, 1), (0, 2)):
        base = np.cumsum([0.0, *(menu[-1][axis] for menu in reversed(menus))])[::-1]
        table = np.zeros((len(menus) + 1, len(steps) + 1))
        np.cumsum(is_open * [step[column] for step in steps], axis=1, out=table[:, 1:])
        tables.append(table + base[:, None])
    return tables[0], tables[1]


def _hull_steps(
    menu: list[tuple[float, float, int]],
) -> list[tuple[float, float, float, int]]:
    """Edges (slope, bytes, seconds, level reached) of the lower hull, from the smallest up."""
    hull: list[tuple[float, float, int]] = []
    for level in range(len(menu) - 1, -1, -1):
        point = (menu[level][1], menu[level][0], level)
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return [(_slope(a, b), b[0] - a[0], b[1] - a[1], b[2]) for a, b in pairwise(hull)]


def _slope(first: tuple[float, float, int], second: tuple[float, float, int]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def _relaxed(spent: Floats, left: Floats, budget: Floats) -> Floats:
    """Least fractional seconds of the open blocks within ``budget`` bytes; inf if none."""
    slack = _EPS * max(1.0, abs(float(spent[0])))
    return np.where(budget >= spent[0] - slack, np.interp(budget, spent, left), inf)
