"""Merging blocks that take no time: fewer blocks, the same optimum, as trying all orders shows."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.max_load import (
    Contraction,
    DirectCosts,
    DirectPricer,
    HostedPositions,
    MaxLoadProblem,
    MaxLoadSearch,
    least_bottleneck,
)
from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.search.ideals import Lattice
from ipu_pipeline.planner.search.problem import Slot, Value, bits


def random_problem(seed):
    """A graph in which half of the blocks take no time, with values in both directions."""
    rng = random.Random(seed)
    count = rng.randint(2, 8)
    preds = [sum(1 << p for p in range(b) if rng.random() < 0.35) for b in range(count)]
    work = [0.0 if rng.random() < 0.5 else rng.randint(1, 5) for _ in range(count)]
    values = []
    for block in range(count):
        readers = sum(1 << c for c in range(block + 1, count) if preds[c] >> block & 1)
        if readers:
            values.append(Value(block, readers, rng.choice([0, 1, 1, 2])))
        if readers and rng.random() < 0.3:  # a gradient: made behind, read in front
            producer = next(bits(readers))
            values.append(Value(producer, 1 << block, 1))
    return MaxLoadProblem(
        names=tuple(map(str, range(count))),
        preds=tuple(preds),
        options=tuple((BlockChoice(seconds),) for seconds in work),
        values=tuple(values),
        weight_bytes=tuple(float(rng.randint(0, 3)) for _ in range(count)),
        host_s=tuple(10 * seconds for seconds in work) if rng.random() < 0.5 else None,
    )


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.sampled_from([4.0, 8.0, 100.0]))
def test_the_optimum_is_that_of_the_whole_problem(seed, capacity):
    problem = random_problem(seed)
    slot = Slot(0, 0, capacity=capacity, link_in=Link(1.0), link_out=Link(1.0))
    positions = HostedPositions((slot,) * 3, hosts=1 if problem.host_s else 0)
    depths = range(0 if positions.hosts else 1, 4)
    table = DirectCosts(Lattice(problem), DirectPricer(problem))
    whole = MaxLoadSearch(table, positions, depths, 1.0, 0.0)
    whole.run()
    found = least_bottleneck(problem, positions, depths, 10**5)
    assert found.objective == pytest.approx(whole.upper_bound)
    assert found.lower_bound == pytest.approx(min(found.objective, found.lower_bound))
    if found.objective < inf:
        assert found.lower_bound == pytest.approx(found.objective)
        assert found.pipelines[0].boundaries[-1] == problem.everything


def test_a_chain_of_work_keeps_only_its_work():
    work = [3.0, 0.0, 2.0, 0.0]
    chain = MaxLoadProblem(
        names=("a", "b", "c", "d"),
        preds=(0, 1, 2, 4),
        options=tuple((BlockChoice(seconds),) for seconds in work),
        values=tuple(Value(i, 1 << i + 1, 1.0) for i in range(3)),
    )
    small = Contraction.of(chain, inf)
    assert small.problem.names == ("a", "c")
    assert small.members == (0b0011, 0b1100)
    assert small.expanded(0b01) == 0b0011
    heavy = replace(chain, weight_bytes=(1.0, 1.0, 1.0, 1.0))
    assert Contraction.of(heavy, 3.0).problem.num_blocks == 4
