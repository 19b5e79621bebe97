"""Which option each block of one stage takes: the least time that fits the memory, exactly.

A multiple-choice knapsack. Partial selections are kept as a Pareto frontier of
(time, held bytes); a frontier point is dropped when even the fractional relaxation of the
blocks still open cannot beat a selection that is already known (Dantzig's bound).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.planner.options.block_cost import BlockChoice

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


def summarize(
    ways: Sequence[Sequence[BlockChoice]], picks: Sequence[int], in_flight: int
) -> Selection:
    """Add up the options ``picks`` of the blocks ``ways``."""
    chosen = [options[pick] for options, pick in zip(ways, picks, strict=True)]
    return Selection(
        sum(option.forward_s for option in chosen),
        sum(option.backward_s for option in chosen),
        sum(option.held_bytes(in_flight) for option in chosen)
        + max((option.workspace_bytes for option in chosen), default=0),
        tuple(picks),
    )


def fastest_picks(ways: Sequence[Sequence[BlockChoice]], in_flight: int) -> list[int]:
    """Position of the quickest option of each block; the smaller one of equals."""
    return [
        min(range(len(o)), key=lambda p: (o[p].total_s, o[p].held_bytes(in_flight))) for o in ways
    ]


def least_time(
    ways: Sequence[Sequence[BlockChoice]], in_flight: int, budget_bytes: float
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


def grown(
    points: Sequence[Point], options: Sequence[BlockChoice], in_flight: int, budget_bytes: float
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


def thinned(points: list[Point], most: int) -> list[Point]:
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
    ways: Sequence[Sequence[BlockChoice]],
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
