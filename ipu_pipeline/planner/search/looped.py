"""Good splits for schedules that put several stages on every device: an iterated local search.

From each given split, runs of neighbouring boundaries move by one block while the step gets
shorter, the same step better balanced, or, where the split does not fit yet, its overflow smaller:
first by the schedule's closed form, then by its exact replay. Then a few boundaries of the best one
move at random, and it is improved again. The options of all blocks of a device are chosen together
(``knapsack.py``).

Source: Lourenço, Martin, Stützle, Iterated Local Search, Handbook of Metaheuristics, 2003.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle
from math import inf
from random import Random
from time import monotonic

from ipu_pipeline.planner.schedules import PipelineShape, ScheduleKind, StagePrice, step_seconds
from ipu_pipeline.planner.schedules.objective import Objective
from ipu_pipeline.planner.schedules.replay import replayed_microbatches
from ipu_pipeline.planner.search.ideals import Bools, Lattice
from ipu_pipeline.planner.search.knapsack import least_time, summarize
from ipu_pipeline.planner.search.least_bytes import LeastBytes
from ipu_pipeline.planner.search.problem import Slot, bits
from ipu_pipeline.planner.search.stage_price import OptionPricer, PricedPipeline

LONGEST_RUN = 8  # boundaries that move together
MOST_ACTIONS = 20_000_000  # of all replays of one pipeline together
MOST_KICKS = 8
_KICK = (2, 6)  # moves of a kick
_BETTER = 1 - 1e-12

# Position of the boundary after every stage.
Split = tuple[int, ...]
# Groups parted, bytes over the limits, seconds of a step, spread of the devices' loads.
Cost = tuple[int, float, float, float]


@dataclass
class LoopedSearch:
    """Improves splits of one pipeline whose stages share devices.

    Attributes:
        lattice: Boundaries in the order of execution.
        pricer: Prices of the blocks.
        slots: The stage positions, in pipeline order.
        kind: The schedule.
        shape: What it runs.
        allowed: For 0..num_stages stages done: which sets of the lattice are allowed.
        least_bytes: Least bytes of stages.
        deadline: ``time.monotonic()`` at which to stop once something fits.
    """

    lattice: Lattice
    pricer: OptionPricer
    slots: Sequence[Slot]
    kind: ScheduleKind
    shape: PipelineShape
    allowed: Sequence[Bools]
    least_bytes: LeastBytes
    deadline: float | None = None
    _actions: int = MOST_ACTIONS
    _devices: dict[tuple[tuple[int, int, int], ...], tuple[float, list[StagePrice]]] = field(
        default_factory=dict
    )

    def run(self, starts: Iterable[Sequence[int]]) -> list[PricedPipeline]:
        """Return the best split behind ``starts`` (done blocks after every stage), if one fits."""
        best: Split = ()
        cost: Cost = (0, inf, inf, inf)
        chance = Random(0)
        first = [split for split in map(self._split, starts) if split]
        for number in range(len(first) + MOST_KICKS):
            fits, spent = cost[2] < inf, self._is_late() or self._actions <= 0
            if (fits and spent) or (not fits and number >= len(first)):
                break
            split = first[number] if number < len(first) else self._kicked(best, chance)
            split = self._improved(self._improved(split, exact=False), exact=True)
            if _better(found := self.cost(split, exact=True), cost):
                best, cost = split, found
        if not best or cost[0] or cost[1]:
            return []
        seconds = cost[2]
        done = tuple(self.lattice.masks[place] for place in best)
        return [PricedPipeline(seconds, done, tuple(self._prices(best)[1]))]

    def _kicked(self, split: Split, chance: Random) -> Split:
        """Move some runs of boundaries at random."""
        for _ in range(chance.randint(*_KICK)):
            length = chance.randint(1, min(LONGEST_RUN, len(split) - 1))
            first = chance.randint(0, len(split) - 1 - length)
            split = self._moved(split, first, first + length, chance.choice((-1, 1))) or split
        return split

    def _is_late(self) -> bool:
        return self.deadline is not None and monotonic() > self.deadline

    def _split(self, masks: Sequence[int]) -> Split | None:
        """Find the positions of boundaries; ``None`` where one is not allowed."""
        if not all(mask in self.lattice.position for mask in masks):
            return None
        split = tuple(self.lattice.position[mask] for mask in masks)
        return split if all(self.allowed[n][place] for n, place in enumerate(split, 1)) else None

    def _improved(self, split: Split, *, exact: bool) -> Split:
        """Try all moves in turn, until none of them helps."""
        last = len(split) - 1
        moves = [
            (first, first + length, step)
            for length in range(1, min(LONGEST_RUN, last) + 1)
            for first in range(last - length + 1)
            for step in (-1, 1)
        ]
        cost, failed = self.cost(split, exact=exact), 0
        for move in cycle(moves):
            spent = self._is_late() or (exact and self._actions <= 0)
            if failed == len(moves) or (spent and cost[2] < inf):
                break
            moved = self._moved(split, *move)
            other = None if moved is None else self.cost(moved, exact=exact)
            if moved is not None and other is not None and _better(other, cost):
                split, cost, failed = moved, other, 0
            else:
                failed += 1
        return split

    def _moved(self, split: Split, first: int, stop: int, step: int) -> Split | None:
        """Move a run of boundaries by one position, if it may be there."""
        run = [place + step for place in split[first:stop]]
        before = split[first - 1] if first else 0
        if not before < run[0] or not run[-1] < split[stop]:
            return None
        if not all(self.allowed[n][place] for n, place in enumerate(run, first + 1)):
            return None
        return (*split[:first], *run, *split[stop:])

    def cost(self, split: Split, *, exact: bool) -> Cost:
        """Compare splits by this: what breaks a limit first, then the step."""
        over, prices = self._prices(split)
        parted = self._parted(split)
        if parted or over:
            return parted, over, inf, inf
        devices = [slot.device for slot in self.slots]
        loads: dict[int, float] = {}
        for device, price in zip(devices, prices, strict=True):
            loads[device] = loads.get(device, 0.0) + price.load_s
        seconds = self._replayed(prices) if exact else self._form.seconds(devices, prices)
        return 0, 0.0, seconds, sum(load * load for load in loads.values())

    @cached_property
    def _form(self) -> Objective:
        return self.kind.objective(self.shape)

    def _replayed(self, prices: Sequence[StagePrice]) -> float:
        count = min(self.shape.num_microbatches, replayed_microbatches(self.shape))
        self._actions -= 2 * self.shape.num_stages * count
        outer: dict[int, float] = {}
        for slot, price in zip(self.slots, prices, strict=True):
            outer[slot.device] = outer.get(slot.device, 0.0) + price.outer_s
        split = [replace(price, weights_s=price.backward_s / 2) for price in prices]
        return step_seconds(self.kind, self.shape, split) + max(outer.values())

    def _parted(self, split: Split) -> int:
        """Count the groups of blocks that are on several devices."""
        parted = 0
        for group in self.pricer.problem.same_device:
            devices, done = set(), 0
            for place, slot in zip(split, self.slots, strict=True):
                mask = self.lattice.masks[place]
                if mask & ~done & group:
                    devices.add(slot.device)
                done = mask
            parted += len(devices) > 1
        return parted

    def _prices(self, split: Split) -> tuple[float, list[StagePrice]]:
        """Bytes over the limits of all devices, and the price of every stage."""
        stages: dict[int, list[tuple[int, int, int]]] = {}
        for stage, (start, end) in enumerate(zip((0, *split), split, strict=False)):
            stages.setdefault(self.slots[stage].pool, []).append((start, end, stage))
        over = 0.0
        prices: dict[int, StagePrice] = {}
        for parts in map(tuple, stages.values()):
            if parts not in self._devices:
                self._devices[parts] = self._device(parts)
            too_much, found = self._devices[parts]
            over += too_much
            prices.update(zip((stage for _, _, stage in parts), found, strict=True))
        return over, [prices[stage] for stage in sorted(prices)]

    def _device(self, parts: tuple[tuple[int, int, int], ...]) -> tuple[float, list[StagePrice]]:
        """Choose the options of all blocks in one memory; every stage has its own workspace."""
        pricer, masks = self.pricer, self.lattice.masks
        stages = [
            (masks[start], masks[end] ^ masks[start], self.slots[s]) for start, end, s in parts
        ]
        if any(blocks & slot.forbidden for _, blocks, slot in stages):
            return inf, [_NO_PRICE for _ in stages]
        base = [pricer.base_bytes(done, blocks, slot.in_flight) for done, blocks, slot in stages]
        capacity = stages[0][2].capacity
        # As the price of a plan does, with shared parameters in every stage that uses them.
        budget = capacity - sum(base) - sum(pricer.shared_bytes(blocks) for _, blocks, _ in stages)
        options = pricer.problem.options
        ways = [
            [
                replace(o, stash_bytes=0, fixed_bytes=o.held_bytes(slot.in_flight))
                for o in options[b]
            ]
            for _, blocks, slot in stages
            for b in bits(blocks)
        ]
        needed = sum(
            float(
                self.least_bytes.of(slot.in_flight)[done.bit_count(), (done | blocks).bit_count()]
            )
            for done, blocks, slot in stages
        )
        room = budget if needed <= capacity else -1.0
        while (chosen := least_time(ways, 1, room)) is not None:
            prices, held, place = [], 0.0, 0
            for (done, blocks, slot), own in zip(stages, base, strict=True):
                here = slice(place, place + blocks.bit_count())
                part = summarize(ways[here], chosen.picks[here], 1)
                held, place = held + part.held_bytes, here.stop
                prices.append(pricer.stage_price(done, blocks, slot, part, own))
            if held <= budget:
                return 0.0, prices
            room -= held - budget
        return max(1.0, needed - capacity), [_NO_PRICE for _ in stages]


_NO_PRICE = StagePrice(inf, inf, 0.0, 0.0)


def _better(first: Cost, second: Cost) -> bool:
    """Whether the first is below the second in the first number that differs visibly."""
    for one, other in zip(first, second, strict=True):
        if one < other * _BETTER:
            return True
        if one * _BETTER > other:
            return False
    return False
