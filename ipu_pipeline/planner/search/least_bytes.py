"""The split of the execution order that asks least of the memories, without a search.

Least bytes of a stage are exact: for each workspace that may be the largest, the smallest options
whose own workspace is no larger. A dynamic program makes the largest stage (of a shared memory:
the sum) smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.search.constraints import LayerRule
from ipu_pipeline.planner.search.problem import Problem, Shared, Slot, closure

Floats = NDArray[np.float64]
# Of more different workspaces, only some are looked at as the largest.
_MOST_WORKSPACES = 64
_NONE = BlockChoice(inf, workspace_bytes=inf)


@dataclass(frozen=True)
class LeastSplit:
    """The least demanding split of one pipeline.

    Attributes:
        stages: Mask and least bytes of every stage.
        device_bytes: Bytes by device; a parameter of two of its stages counts once.
    """

    stages: tuple[tuple[int, float], ...]
    device_bytes: dict[int, float]

    def fits(self, slots: Sequence[Slot]) -> bool:
        """Whether every stage fits its slot; enough where no two share a memory."""
        return all(
            need <= slot.capacity for (_, need), slot in zip(self.stages, slots, strict=True)
        )


class LeastBytes:
    """Least bytes of all stages of the execution order; ``of(k)[a, b]``: blocks a to b-1."""

    def __init__(self, problem: Problem) -> None:
        """Add up what no option changes."""
        self.problem = problem
        count = problem.num_blocks
        self._used = np.triu(np.ones((count + 1, count + 1), dtype=np.bool_), k=1)
        self._weights = _between(problem.held) + self._shared(problem.shared_weights)
        entering = np.zeros(count + 1)
        for value in problem.values:
            entering[value.producer + 1 : value.consumers.bit_length()] += value.held_bytes
        self._per_microbatch = self._shared(problem.inputs) + entering[:, None]
        self._order = [(1 << done) - 1 for done in range(count + 1)]
        most = max(map(len, problem.options), default=0)
        padded = [[*ways, *[_NONE] * (most - len(ways))] for ways in problem.options]
        self._stash = np.array([[o.stash_bytes for o in ways] for ways in padded], float)
        self._fixed = np.array([[o.fixed_bytes for o in ways] for ways in padded], float)
        self._space = np.array([[o.workspace_bytes for o in ways] for ways in padded], float)
        self._spaces: list[float] = [s for s in np.unique(self._space).tolist() if s < inf]
        self._known: dict[int, Floats] = {}
        self._by_workspace: dict[int, list[tuple[float, Floats, Floats]]] = {}

    @cached_property
    def is_least_of_all(self) -> bool:
        """Whether there is no other order of the blocks, and every workspace was looked at."""
        before = closure(self.problem.preds)
        one_order = all(mask == (1 << block) - 1 for block, mask in enumerate(before))
        return one_order and len(self._spaces) <= _MOST_WORKSPACES

    def of(self, in_flight: int) -> Floats:
        """Least bytes by first block and the block behind the last one; ``inf`` for no stage."""
        if in_flight not in self._known:
            self._known[in_flight] = self._from(slice(None), in_flight)
        return self._known[in_flight]

    def _from(self, first: slice, in_flight: int) -> Floats:
        """Rows of :meth:`of`, those of stages that begin with the blocks ``first``."""
        least: Floats = np.full((1, 1), inf)
        for space, running, missing in self._menus(in_flight):
            total = running - running[first, None] + space
            total[missing > missing[first, None]] = inf
            least = np.minimum(least, total)
        held = self._weights[first] + in_flight * self._per_microbatch[first] + least
        return np.where(self._used[first], held, inf)

    def _menus(self, in_flight: int) -> list[tuple[float, Floats, Floats]]:
        """For each workspace, the bytes up to every block of the smallest options with none larger.

        With them how many blocks have no such option.
        """
        if in_flight not in self._by_workspace:
            spaces, sizes, found = self._spaces, in_flight * self._stash + self._fixed, []
            if len(spaces) > _MOST_WORKSPACES:
                spaces = [*spaces[:: len(spaces) // _MOST_WORKSPACES + 1], spaces[-1]]
            for space in spaces:
                least = np.where(self._space <= space, sizes, inf).min(axis=1)
                missing = np.isinf(least)
                found.append((space, _running(np.where(missing, 0.0, least)), _running(missing)))
            self._by_workspace[in_flight] = found
        return self._by_workspace[in_flight]

    def packs(self, slots: Sequence[Slot], groups: Sequence[int]) -> bool:
        """Whether stages that take as many blocks as fit, one after another, take all of them."""
        start, count = 0, self.problem.num_blocks
        may_end = ~self._uncut(groups)
        for number, slot in enumerate(slots):
            need = self._from(slice(start, start + 1), slot.in_flight)[0]
            last = count + 1 - (len(slots) - 1 - number)
            fitting = np.flatnonzero((need <= slot.capacity)[:last] & may_end[:last])
            if slot.forbidden or not fitting.size:
                return False
            start = int(fitting[-1])
        return start == count

    def _shared(self, items: Sequence[Shared]) -> Floats:
        total = np.zeros(self._used.shape)
        for item in items:
            users = [float(item.users >> b & 1) for b in range(self.problem.num_blocks)]
            total += item.num_bytes * (_between(users) > 0)
        return total

    def split(
        self, slots: Sequence[Slot], rule: LayerRule | None, groups: Sequence[int]
    ) -> LeastSplit | None:
        """Return the least demanding split over ``slots``; ``None`` if there is none.

        Args:
            slots: The positions.
            rule: Given layers per device.
            groups: Masks of blocks that no boundary may part.
        """
        pooled = len({slot.pool for slot in slots}) == 1 < len(slots)
        count, capacity = self.problem.num_blocks, min(slot.capacity for slot in slots)
        value = np.full(count + 1, inf)
        value[count] = 0.0
        stops: list[NDArray[np.int64]] = []
        uncut = self._uncut(groups)
        for number, slot in reversed(list(enumerate(slots))):
            need = self.of(slot.in_flight)
            if slot.forbidden:
                banned = [float(slot.forbidden >> b & 1) for b in range(count)]
                need = np.where(_between(banned) > 0, inf, need)
            alike = pooled or slot.capacity == capacity or not 0 < capacity < slot.capacity < inf
            scaled = need if alike else need * (capacity / slot.capacity)
            joined = scaled + value if pooled else np.maximum(scaled, value)
            stops.append(np.argmin(joined, axis=1))
            value = joined[np.arange(count + 1), stops[-1]]
            value[uncut if rule is None else uncut | ~self._by_rule(rule, number)] = inf
        if value[0] == inf:
            return None
        stages, start = [], 0
        for slot, stop in zip(slots, reversed(stops), strict=True):
            end = int(stop[start])
            stages.append(((1 << end) - (1 << start), float(self.of(slot.in_flight)[start, end])))
            start = end
        return LeastSplit(tuple(stages), self._by_device(slots, stages))

    def _uncut(self, groups: Sequence[int]) -> NDArray[np.bool_]:
        """Boundaries that part one of ``groups``."""
        return np.array([any(done & g not in (0, g) for g in groups) for done in self._order])

    def _by_rule(self, rule: LayerRule, stages_done: int) -> NDArray[np.bool_]:
        return np.array([rule.allows(done, stages_done) for done in self._order])

    def _by_device(
        self, slots: Sequence[Slot], stages: Sequence[tuple[int, float]]
    ) -> dict[int, float]:
        used: dict[int, float] = {}
        blocks: dict[int, int] = {}
        for (mask, needed), slot in zip(stages, slots, strict=True):
            before = blocks.get(slot.device, 0)
            twice = sum(w.num_bytes for w in self.problem.shared_weights
                        if w.users & mask & ~before and w.users & before)  # fmt: skip
            used[slot.device] = used.get(slot.device, 0.0) + needed - twice
            blocks[slot.device] = before | mask
        return used


def _running(amounts: Sequence[float] | Floats) -> Floats:
    """Sums of the amounts of all blocks before each one, and of all."""
    return np.concatenate(([0.0], np.cumsum(np.asarray(amounts, dtype=np.float64))))


def _between(amounts: Sequence[float]) -> Floats:
    """``[a, b]``: sum of the amounts of blocks a to b-1."""
    running = _running(amounts)
    found: Floats = running[None, :] - running[:, None]
    return found
