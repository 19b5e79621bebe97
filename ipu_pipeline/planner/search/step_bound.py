"""A bound, proven over every split of a pipeline, of the exact replay of its schedule.

For unequal stages the search's closed form may be above or below the replay, which is never
shorter than any dependency path: a sum over stages of passes times seconds (``critical_paths``).

* Without a search: all coefficients of a path at their least, times the least work of the model;
  the same for the mean of all paths.
* Where stages have their own devices and a path counts forward and backward passes alike, the path
  through the stage it counts most is at least ``own * load`` of that stage, plus the least
  coefficient before it times the work there, plus the least one behind it times the least sum of
  loads behind. Two dynamic programs over ideals give the least of the longest such path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.planner.schedules.objective import Path
from ipu_pipeline.planner.search.ideal_program import (
    IdealProgram,
    OutOfTimeError,
    StagePositions,
)
from ipu_pipeline.planner.search.problem import Problem
from ipu_pipeline.planner.search.stage_costs import StageCostTable

Floats = NDArray[np.float64]
# Least coefficients of a path before a stage, at it, and behind it.
Counted = tuple[float, float, float]


def least_path_s(problem: Problem, paths: Sequence[Path], speed: float) -> float:
    """Seconds that the longest of ``paths`` surely has, on devices of at most ``speed``."""
    forward_s = sum(min(option.forward_s for option in ways) for ways in problem.options)
    backward_s = sum(min(option.backward_s for option in ways) for ways in problem.options)
    both_s = sum(option.total_s for option in problem.fastest)
    count = len(paths)
    mean = Path(
        tuple(sum(column) / count for column in zip(*(p.forward for p in paths), strict=True)),
        tuple(sum(column) / count for column in zip(*(p.backward for p in paths), strict=True)),
    )
    found = 0.0
    for path in (*paths, mean):
        first, second = min(path.forward), min(path.backward)
        # Options may trade one pass for the other: their sum counts, where both do.
        alike = min(first, second)
        found = max(
            found,
            alike * both_s,
            first * forward_s + second * backward_s,
        )
    return found / speed


def least_fullest(sizes: Sequence[float], bins: int) -> float:
    """Return what the fullest of some bins surely holds, however the items are put into them.

    Source: Fekete and Schepers, New classes of fast lower bounds for bin packing problems,
    Mathematical Programming 91, 2001: of a bin of size C every item is counted as
    ``floor((k + 1) size / C) / k``, which adds up to at most 1 in each bin.
    """
    items = np.array(sizes)
    parts = np.arange(1.0, 33.0)
    low, high = max(items.sum() / bins, items.max()), items.sum()
    for _ in range(40):
        middle = (low + high) / 2
        counted = np.floor(np.outer(parts + 1, items) / middle * (1 - 1e-9)).sum(axis=1) / parts
        low, high = (middle, high) if counted.max() > bins else (low, middle)
    return float(low)


@dataclass(frozen=True)
class _LongestPath:
    """Joins a stage with what is behind it: the longest path through any of them."""

    counted: dict[int, tuple[Counted, ...]]
    before_s: Floats
    behind_s: Floats

    def __call__(
        self, loads: Floats, behind: Floats, start: int, devices: int, targets: NDArray[np.int64]
    ) -> Floats:
        longest = behind
        for before, own, later in self.counted[devices]:
            path_s = before * self.before_s[start] + own * loads
            if later:
                path_s = path_s + later * self.behind_s[devices - 1][targets]
            longest = np.maximum(longest, path_s)
        return longest


def longest_path_bound(
    table: StageCostTable,
    positions: StagePositions,
    paths: Mapping[int, Sequence[Path]],
    upper_s: float,
    deadline: float | None = None,
) -> float:
    """Return a bound of the longest path over every split; at most ``upper_s``.

    Args:
        table: Stage costs over a lattice of all allowed boundaries.
        positions: Positions for the deepest pipeline, which the others share.
        paths: By depth, paths with as many forward as backward passes of every stage.
        upper_s: Seconds of a replay that is known.
        deadline: ``time.monotonic()`` after which 0 is returned.
    """
    counted: dict[int, tuple[Counted, ...]] = {}
    for depth, found in paths.items():
        for stage in range(depth):
            here = _counted(stage, found)
            there = counted.setdefault(depth - stage, here)
            if here != there:  # depths differ: what holds for both
                counted[depth - stage] = tuple(set(here) & set(there))
    if not all(counted.values()):
        return 0.0
    limit_s = upper_s / min(max(own for _, own, _ in item) for item in counted.values())
    depths = sorted(paths)
    try:
        every = range(1, max(depths) + 1)
        sums = IdealProgram(table, positions, "sum", limit_s, every, deadline).run()
        speed = max(slot.speed for slot in positions.slots)
        join = _LongestPath(counted, table.lattice.work_s / speed, sums.best)
        longest = IdealProgram(table, positions, join, limit_s, depths, deadline).run()
    except OutOfTimeError:
        return 0.0
    return min(upper_s, float(longest.best[depths, 0].min()))


def _counted(stage: int, paths: Sequence[Path]) -> tuple[Counted, ...]:
    """Paths that count ``stage`` most; before the first stage and behind the last is nothing."""
    found = []
    for path in paths:
        passes = path.forward
        if passes[stage] == max(passes):
            before = min(passes[:stage], default=1.0)
            found.append((before, passes[stage], min(passes[stage + 1 :], default=0.0)))
    return tuple(sorted(set(found)))


def is_even(path: Path) -> bool:
    """Whether the path has as many backward as forward passes of every stage."""
    return path.forward == path.backward
