"""Which option each block of one stage takes: the least time that fits the memory, exactly.

A multiple-choice knapsack. Partial selections are kept as a Pareto frontier of
(time, held bytes); a frontier point is dropped when even a Lagrangian relaxation of the
blocks still open cannot beat a selection that is already known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    found = sorted(
        (f + o.forward_s, b + o.backward_s, held + o.held_bytes(in_flight),
         max(space, o.workspace_bytes), (*picks, pick))
        for f, b, held, space, picks in points
        for pick, o in enumerate(options)
        if held + o.held_bytes(in_flight) + max(space, o.workspace_bytes) <= budget_bytes
    )  # fmt: skip
    numbers = np.array([point[1:4] for point in found]).reshape(-1, 3)  # forward, they ascend
    return [found[position] for position in undominated(numbers)]


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


def undominated(numbers: Floats) -> list[int]:
    """Return the rows to which no row before them is nowhere above."""
    kept: list[int] = []
    table = np.empty_like(numbers)
    for position, row in enumerate(numbers):
        if not (table[: len(kept)] <= row).all(axis=1).any():
            table[len(kept)] = row
            kept.append(position)
    return kept


def _knapsack(
    ways: Sequence[Sequence[BlockChoice]],
    in_flight: int,
    budget_bytes: float,
    limit: float,
    upper_s: float,
) -> list[int] | None:
    """Quickest picks with workspaces up to ``limit`` that beat ``upper_s``, or ``None``.

    For any price p of a byte, the least of ``seconds + p bytes`` of every open block, less what
    the bytes left cost, is a bound; with the price at which the blocks just fit, it is the
    fractional relaxation.
    """
    seconds, held = tables(ways, in_flight, limit)
    smallest = np.where(np.isinf(seconds), inf, held)
    if smallest.min(axis=1).sum() > budget_bytes:
        return None
    prices = byte_prices(seconds, held)
    dual_s = (seconds + prices[:, None, None] * held).min(axis=2).sum(axis=1)
    dual_s -= prices * budget_bytes
    price = float(prices[np.argmax(dual_s)])
    if dual_s.max() >= upper_s * (1 - _EPS):
        return None
    rows = np.arange(len(ways))
    picks = np.argmin(seconds + price * (1 + 1e-9) * held, axis=1)
    if held[rows, picks].sum() > budget_bytes:
        picks = np.argmin(smallest, axis=1)
    known_s = float(seconds[rows, picks].sum())
    # Equal blocks one after another: most of their selections are alike.
    order = np.argsort(-held.max(axis=1), kind="stable")
    better = _search(seconds[order], held[order], budget_bytes, price, min(upper_s, known_s))
    if better is not None:
        picks[order] = better
    elif known_s >= upper_s:
        return None
    return [int(pick) for pick in picks]


def tables(
    ways: Sequence[Sequence[BlockChoice]], in_flight: int, limit: float = inf
) -> tuple[Floats, Floats]:
    """Seconds and bytes by block and option; infinitely many seconds where there is none."""
    shape = (len(ways), max(map(len, ways)))
    seconds, held = np.full(shape, inf), np.zeros(shape)
    for row, options in enumerate(ways):
        for column, way in enumerate(options):
            if way.workspace_bytes <= limit:
                seconds[row, column], held[row, column] = way.total_s, way.held_bytes(in_flight)
    return seconds, held


def byte_prices(seconds: Floats, held: Floats) -> Floats:
    """Prices of a byte at which some block takes another option, ascending; the first is 0."""
    smaller = held[:, :, None] - held[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        slower = seconds[:, None, :] - seconds[:, :, None]
        slopes = slower / smaller
    return np.unique([0.0, *slopes[np.isfinite(slopes) & (smaller > 0) & (slower > 0)].tolist()])


def _search(
    seconds: Floats, held: Floats, budget_bytes: float, price: float, upper_s: float
) -> list[int] | None:
    """Picks of the quickest selection below ``upper_s``, or ``None``."""
    floor_s, quick_s, least = (
        np.append(np.cumsum(table.min(axis=1)[::-1])[-2::-1], 0.0)
        for table in (seconds + price * held, seconds, np.where(np.isinf(seconds), inf, held))
    )
    times, used = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    slack = _EPS * max(1.0, abs(budget_bytes))
    for depth, options in enumerate(zip(seconds, held, strict=True)):
        later_s, later = (
            known[:, None] + own for known, own in zip((times, used), options, strict=True)
        )
        left = budget_bytes - later
        reach = later_s + np.maximum(floor_s[depth] - price * left, quick_s[depth])
        alive = np.flatnonzero((reach < upper_s * (1 - _EPS)) & (left >= least[depth] - slack))
        later_s, later = later_s.ravel(), later.ravel()
        order = alive[np.lexsort((later_s[alive], later[alive]))]
        if not order.size:
            return None
        before = np.concatenate(([inf], np.minimum.accumulate(later_s[order])[:-1]))
        keep = order[later_s[order] < before]
        times, used = later_s[keep], later[keep]
        trail.append((keep // len(options[0]), keep % len(options[0])))
    picks, point = [0] * len(trail), int(np.argmin(times))
    for depth in range(len(trail) - 1, -1, -1):
        parents, chosen = trail[depth]
        picks[depth], point = int(chosen[point]), int(parents[point])
    return picks
