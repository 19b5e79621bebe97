"""The quickest layers and memory proportions per IPU for one setting, under a memory limit. Exact.

Bound: a fill cycle and the flush cycle that follows the same stage together hold every stage
once, so with busiest load M per microbatch a step of G microbatches takes at least G M, plus what
does not depend on the split. Splits are enumerated in rising M until no quicker one can exist.
Memory is looked at for promising splits only; every look teaches the bytes of F cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from math import inf

from ipu_pipeline.backends.ipu.prices import IPUSettings
from ipu_pipeline.backends.ipu.prices.layout import make_layout
from ipu_pipeline.backends.ipu.prices.timing import step_time
from ipu_pipeline.planner.tuning.cells import Bytes, Seconds

MAX_SPLITS = 2000  # per setting and memory limit; a search that reaches it says so
MAX_SPLITS_UNLIKE = 200  # where layers differ, memory is looked at for almost every split
_STEP = 1.04  # growth of the load up to which splits are enumerated
_EPSILON = 1e-9


@dataclass(frozen=True)
class Split:
    """Layers and proportions of every IPU, with the seconds of one optimizer step."""

    counts: tuple[int, ...]
    proportions: tuple[float, ...]
    step_s: float


@dataclass
class SplitSearch:
    """One search (see the module).

    Attributes:
        seconds: Loads of the cells.
        memory: Bytes of the cells, shared by searches of the same setting.
        settings: The setting without layers and proportions.
        floor_s: Seconds per step that every split has besides G M.
        limit_bytes: Bytes that the fullest tile of every IPU may have.
        incumbent_s: Only quicker splits are of interest.
    """

    seconds: Seconds
    memory: Bytes
    settings: IPUSettings
    floor_s: float
    limit_bytes: int
    incumbent_s: float = inf
    exhausted: bool = True
    best: Split | None = None
    _too_many: dict[tuple[int, float], int] = field(default_factory=dict)
    _reach: dict[tuple[int, int], bool] = field(default_factory=dict)
    _seen: int = 0

    def run(self) -> Split | None:
        """Return the quickest split that fits and beats the incumbent, if there is one."""
        self._learn()
        if self._most() < self.seconds.least_cycle_s or self._bound([], 0) >= self.incumbent_s:
            return None
        if not self._probe():
            return None
        pace = self.seconds.least_cycle_s * (1 + _EPSILON)
        ipus, count = self.settings.num_ipus, len(self.memory.ground.layers)
        ceiling = sum(self.seconds.options(ipu, 0, count)[-1][0] for ipu in range(ipus))
        while pace <= min(self._most(), _STEP * ceiling) and self.exhausted:
            self._enumerate(pace)
            if self.best is not None:
                self._enumerate(self._most())
                return self.best
            self._reach.clear()
            if not self._can_finish(0, 0, inf):
                return None
            pace *= _STEP
        if self._most() < inf and self.exhausted:
            self._enumerate(self._most())
        return self.best

    @property
    def _allowed(self) -> int:
        return MAX_SPLITS if self.memory.ground.alike else MAX_SPLITS_UNLIKE

    def _most(self) -> float:
        """Busiest load that can still beat the best step."""
        return (self.incumbent_s - self.floor_s) / self.settings.accumulation

    def _learn(self) -> None:
        for (ipu, start, end, proportion), size in self.memory.known.items():
            self._note(ipu, end - start, proportion, size)

    def _note(self, ipu: int, count: int, proportion: float, size: int) -> None:
        """Remember what does not fit: a larger proportion needs more, so do more layers."""
        if size <= self.limit_bytes:
            return
        for larger in self.seconds.proportions:
            if larger >= proportion:
                key = (ipu, larger)
                self._too_many[key] = min(count, self._too_many.get(key, count))

    def _probe(self) -> bool:
        """Look at splits with the least proportions until one fits or none can; say which.

        Bytes of an IPU grow with its layers, so IPUs that overflow pass layers on to those that
        have room. Only where all layers are alike; otherwise nothing is claimed.
        """
        if not self.memory.ground.alike:
            return True
        least = self.seconds.proportions[0]
        count, ipus = len(self.memory.ground.layers), self.settings.num_ipus
        fits = list(self.seconds.least_layers)
        while True:
            most = [self._too_many.get((ipu, least), count + 1) - 1 for ipu in range(ipus)]
            if sum(most) < count or any(a > b for a, b in zip(fits, most, strict=True)):
                return False
            counts = _between(fits, most, count)
            keys = [self.memory.key(ipu, 0, n, least) for ipu, n in enumerate(counts)]
            if any(key not in self.memory.known for key in keys):
                self.memory.look(counts, (least,) * ipus)
            sizes = [self.memory.known[key] for key in keys]
            for ipu, (n, size) in enumerate(zip(counts, sizes, strict=True)):
                self._note(ipu, n, least, size)
                if size <= self.limit_bytes:
                    fits[ipu] = max(fits[ipu], n)
            if all(size <= self.limit_bytes for size in sizes):
                return True

    def _usable(self, ipu: int, start: int, end: int) -> tuple[float, float] | None:
        """Return the quickest (load, proportion) of a cell that is not known to be too large."""
        alike = self.memory.ground.alike
        for load, proportion in self.seconds.options(ipu, start, end):
            if alike and end - start >= self._too_many.get((ipu, proportion), end + 1):
                continue
            size = self.memory.known.get(self.memory.key(ipu, start, end, proportion))
            if size is None or size <= self.limit_bytes:
                return load, proportion
        return None

    def _ends(self, ipu: int, start: int) -> range:
        count = len(self.memory.ground.layers)
        if ipu == self.settings.num_ipus - 1:
            return range(count, count + int(count - start >= self.seconds.least_layers[ipu]))
        return range(start + self.seconds.least_layers[ipu], count + 1)

    def _can_finish(self, ipu: int, start: int, cap: float) -> bool:
        """Whether IPUs from ``ipu`` on can hold the layers from ``start`` on, as far as known."""
        if ipu == self.settings.num_ipus:
            return True
        key = (ipu, start)
        if key not in self._reach:
            self._reach[key] = any(
                (found := self._usable(ipu, start, end)) is not None
                and found[0] <= cap
                and self._can_finish(ipu + 1, end, cap)
                for end in self._ends(ipu, start)
            )
        return self._reach[key]

    def _enumerate(self, cap: float) -> None:
        self._reach.clear()
        if self._can_finish(0, 0, cap):
            self._extend([], [], cap)

    def _extend(self, ends: list[int], passes: list[tuple[float, float]], cap: float) -> None:
        ipu, start = len(ends), ends[-1] if ends else 0
        if ipu == self.settings.num_ipus:
            self._judge(ends)
            return
        for end in self._ends(ipu, start):
            if self._seen >= self._allowed:
                self.exhausted = False
                return
            if self.seconds.options(ipu, start, end)[0][0] > min(cap, self._most()):
                return
            found = self._usable(ipu, start, end)
            if found is None or found[0] > min(cap, self._most()):
                continue
            if not self._can_finish(ipu + 1, end, cap):
                continue
            forward = self.seconds.forward_s(ipu, start, end, found[1])
            longer = [*passes, (forward, found[0])]
            if self._bound(longer, end) < self.incumbent_s:
                self._extend([*ends, end], longer, cap)

    def _bound(self, passes: Sequence[tuple[float, float]], start: int) -> float:
        """Least seconds of a step whose first IPUs have these (forward, load) per microbatch.

        With one stage per IPU the fill cycles are max(forward of IPUs before k) for k < F, then
        max(those, loads from k on); flush cycles are the same with backward passes. The busiest
        of the IPUs from k on has at least their average load.
        """
        ipus, done = self.settings.num_ipus, len(passes)
        rest = self.seconds.rest[done][start]
        later = rest / (ipus - done) if done < ipus else 0.0
        busiest = max(later, self.seconds.least_cycle_s, *(load for _, load in passes))
        if self.seconds.returns or ipus == 1:
            return self.floor_s + self.settings.accumulation * busiest
        suffix = [later] * (ipus + 1)
        for k in range(done - 1, 0, -1):
            suffix[k] = max(suffix[k + 1], passes[k][1])
        cap = self._most()
        for k in range(done + 1, ipus if cap < inf else 0):
            suffix[k] = max(0.0, (rest - (k - done) * cap) / (ipus - k))
        forward = backward = edges = 0.0
        for k in range(1, ipus):
            if k <= done:
                forward = max(forward, passes[k - 1][0])
                backward = max(backward, passes[k - 1][1] - passes[k - 1][0])
            behind = suffix[k] if k <= done or cap < inf else 0.0
            edges += forward + backward + max(behind, backward) + max(behind, forward)
        main = self.settings.accumulation - 2 * (ipus - 1)
        return self.floor_s + max(main * busiest + edges, self.settings.accumulation * busiest)

    def _judge(self, ends: Sequence[int]) -> None:
        """Price one list of layers with the quickest proportions that fit."""
        self._seen += 1
        cells = [(ipu, *span) for ipu, span in enumerate(pairwise([0, *ends]))]
        counts = tuple(end - start for _, start, end in cells)
        while True:
            chosen = [self._usable(*cell) for cell in cells]
            if None in chosen or max(c[0] for c in chosen if c) > self._most():
                return
            proportions = tuple(c[1] for c in chosen if c)
            step_s = self._step_s(counts, proportions)
            if step_s >= self.incumbent_s:
                return
            keys = [self.memory.key(*cell, p) for cell, p in zip(cells, proportions, strict=True)]
            if all(key in self.memory.known for key in keys):
                self.incumbent_s = step_s
                self.best = Split(counts, proportions, step_s)
                return
            self.memory.look(counts, proportions)
            for key, count in zip(keys, counts, strict=True):
                self._note(key[0], count, key[3], self.memory.known[key])

    def _step_s(self, counts: tuple[int, ...], proportions: tuple[float, ...]) -> float:
        key = (counts, proportions)
        if key not in self.memory.times:
            ground = self.memory.ground
            given = replace(self.settings, layers_per_ipu=counts, proportions=proportions)
            layout = make_layout(ground.graph, given)
            step = step_time(ground.graph, layout, given, ground.chip, ground.calibration)
            self.memory.times[key] = step.total_s
        return self.memory.times[key]

    def relaxed(self, split: Split) -> Split:
        """Return ``split`` with the lowest proportions that are just as quick and no larger."""
        spans = list(pairwise([0, *accumulate(split.counts)]))
        for ipu, (start, end) in enumerate(spans):
            for proportion in self.seconds.proportions:
                now = split.proportions[ipu]
                if proportion >= now:
                    break
                given = (*split.proportions[:ipu], proportion, *split.proportions[ipu + 1 :])
                if self._step_s(split.counts, given) > split.step_s * (1 + _EPSILON):
                    continue
                self.memory.look(split.counts, given)
                size = self.memory.known[self.memory.key(ipu, start, end, proportion)]
                if size <= self.memory.known[self.memory.key(ipu, start, end, now)]:
                    split = Split(split.counts, given, self._step_s(split.counts, given))
                    break
        return split


def _between(least: Sequence[int], most: Sequence[int], total: int) -> tuple[int, ...]:
    """Return numbers that add up to ``total``, as even as their limits allow."""
    counts = list(least)
    for _ in range(total - sum(counts)):
        room = [i for i in range(len(counts)) if counts[i] < most[i]]
        counts[min(room, key=lambda i: counts[i])] += 1
    return tuple(counts)
