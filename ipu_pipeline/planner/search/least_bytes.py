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

from ipu_pipeline.planner.search.constraints import LayerRule
from ipu_pipeline.planner.search.problem import Problem, Shared, Slot, closure

Floats = NDArray[np.float64]
# Of more different workspaces, only some are looked at as the largest.
_MOST_WORKSPACES = 64


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
        self._most_entering = float(entering.max())
        self._per_microbatch = self._shared(problem.inputs) + entering[:, None]
        self._order = [(1 << done) - 1 for done in range(count + 1)]
        self._known: dict[int, Floats] = {}

    @cached_property
    def is_least_of_all(self) -> bool:
        """Whether there is no other order of the blocks, and every workspace was looked at."""
        before = closure(self.problem.preds)
        one_order = all(mask == (1 << block) - 1 for block, mask in enumerate(before))
        return one_order and len(self._workspaces()) <= _MOST_WORKSPACES

    def _workspaces(self) -> list[float]:
        return sorted({o.workspace_bytes for ways in self.problem.options for o in ways})

    def of(self, in_flight: int) -> Floats:
        """Least bytes by first block and the block behind the last one; ``inf`` for no stage."""
        if in_flight not in self._known:
            held = self._weights + in_flight * self._per_microbatch + self._options(in_flight)
            self._known[in_flight] = np.where(self._used, held, inf)
        return self._known[in_flight]

    def always_fits(self, slots: Sequence[Slot]) -> bool:
        """Whether the whole model fits any of ``slots``, so that every stage of it does."""
        in_flight = max(slot.in_flight for slot in slots)
        most = self.of(in_flight)[0, -1] + in_flight * self._most_entering
        return bool(most <= min(slot.capacity for slot in slots))

    def _options(self, in_flight: int) -> Floats:
        options = self.problem.options
        spaces = self._workspaces()
        if len(spaces) > _MOST_WORKSPACES:
            spaces = [*spaces[:: len(spaces) // _MOST_WORKSPACES + 1], spaces[-1]]
        least = np.full(self._used.shape, inf)
        for space in spaces:
            sizes = [
                min((o.held_bytes(in_flight) for o in ways if o.workspace_bytes <= space),
                    default=inf)
                for ways in options
            ]  # fmt: skip
            missing = _between([float(size == inf) for size in sizes])
            total = _between([0.0 if size == inf else size for size in sizes]) + space
            least = np.minimum(least, np.where(missing > 0, inf, total))
        return least

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
        uncut = np.array([any(done & g not in (0, g) for g in groups) for done in self._order])
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


def _between(amounts: Sequence[float]) -> Floats:
    """``[a, b]``: sum of the amounts of blocks a to b-1."""
    running = np.concatenate(([0.0], np.cumsum(np.asarray(amounts, dtype=np.float64))))
    found: Floats = running[None, :] - running[:, None]
    return found
