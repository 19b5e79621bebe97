"""The choice of options inside one stage, against every combination."""

from __future__ import annotations

import itertools
import random

import pytest

from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.search.knapsack import NOTHING, grown, least_time, summarize, within


def random_menus(seed, num_blocks, *, spaces=True):
    rng = random.Random(seed)
    return [
        tuple(
            BlockChoice(rng.randint(0, 5), rng.randint(0, 9), rng.randint(0, 20),
                   rng.choice([0, 5, 9]) if spaces else 0, rng.randint(0, 5))
            for _ in range(rng.randint(1, 3))
        )
        for _ in range(num_blocks)
    ]  # fmt: skip


def every(menus, in_flight):
    return [
        summarize(menus, picks, in_flight)
        for picks in itertools.product(*(range(len(menu)) for menu in menus))
    ]


@pytest.mark.parametrize("seed", range(120))
def test_least_time_equals_enumeration(seed):
    menus = random_menus(seed, 1 + seed % 6)
    ways = every(menus, 2)
    for share in (0.2, 0.5, 0.8):
        budget = sorted(way.held_bytes for way in ways)[int(share * (len(ways) - 1))]
        fitting = [w for w in ways if w.held_bytes <= budget]
        best = min(w.forward_s + w.backward_s for w in fitting)
        found = least_time(menus, 2, budget)
        assert found is not None
        assert found.held_bytes <= budget
        assert found.forward_s + found.backward_s == pytest.approx(best)


def pareto(ways, in_flight, budget_bytes):
    points = [NOTHING]
    for options in ways:
        points = grown(points, options, in_flight, budget_bytes)
    return within(points, budget_bytes, by_memory=True)


@pytest.mark.parametrize("seed", range(60))
def test_pareto_keeps_exactly_the_undominated_points(seed):
    menus = random_menus(seed, 1 + seed % 4)
    ways = every(menus, 3)
    budget = sorted(way.held_bytes for way in ways)[len(ways) // 2]
    points = {(w.forward_s, w.backward_s, w.held_bytes) for w in ways if w.held_bytes <= budget}
    expected = {
        p for p in points
        if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)
    }  # fmt: skip
    found = pareto(menus, 3, budget)
    assert {(w.forward_s, w.backward_s, w.held_bytes) for w in found} == expected


def test_nothing_fits():
    menus = random_menus(1, 3)
    assert least_time(menus, 2, -1.0) is None
    assert pareto(menus, 2, -1.0) == []


def test_many_different_blocks_are_still_exact():
    rng = random.Random(5)
    menus = []
    for _ in range(60):
        forward, stash = rng.uniform(1, 2), rng.uniform(50, 100)
        menus.append(
            (BlockChoice(forward, 2 * forward, stash), BlockChoice(forward, 3 * forward, stash / 9))
        )
    total = sum(menu[0].stash_bytes for menu in menus)
    found = least_time(menus, 1, 0.6 * total)
    assert found is not None
    assert found.held_bytes <= 0.6 * total
    # The fractional relaxation bounds the optimum, and leaves at most one block undecided.
    saved = sorted(
        ((m[0].stash_bytes - m[1].stash_bytes, m[1].total_s - m[0].total_s) for m in menus),
        key=lambda pair: pair[1] / pair[0],
    )
    need, extra = 0.4 * total, 0.0
    for size, seconds in saved:
        part = min(1.0, need / size)
        need, extra = need - part * size, extra + part * seconds
    relaxed = sum(menu[0].total_s for menu in menus) + extra
    assert relaxed <= found.forward_s + found.backward_s <= relaxed + 2.0
