"""A backend's own stage prices and its own step price, against every split tried out."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.planner.search import Constraints, solve
from ipu_pipeline.planner.search.stage_price import OptionPricer
from tests.planner.search.partition_oracle import all_splits, make_graph, make_machine, unit_costs

GRAPH = make_graph(9, [(i, i + 1) for i in range(8)], sizes=[1] * 9)
COSTS = unit_costs(GRAPH, [2, 1, 3, 1, 2, 5, 1, 1, 2])
SECONDS = dict(zip(GRAPH.block_index, [2, 1, 3, 1, 2, 5, 1, 1, 2], strict=True))
MACHINE = make_machine(3, bandwidth=1e9)
G = 6


class WholeStage:
    """Every stage but the last computes its forward pass twice; at most four blocks fit."""

    def __init__(self, built):
        self.inner = OptionPricer(built.problem)

    def prices(self, done, stage, slot, *, shared_pool=False):
        if stage.bit_count() > 4:
            return []
        (price,) = self.inner.prices(done, stage, slot, shared_pool=shared_pool)
        again = price.forward_s if slot.index < slot.num_stages - 1 else 0.0
        return [replace(price, backward_s=price.backward_s + again)]


def loads(stages):
    times = [sum(3 * SECONDS[name] for name in stage) for stage in stages]
    again = [sum(SECONDS[name] for name in stage) for stage in stages]
    return [t + (a if s < len(stages) - 1 else 0) for s, (t, a) in
            enumerate(zip(times, again, strict=True))]  # fmt: skip


def test_a_stage_pricer_of_the_backend_is_what_is_minimised():
    constraints = Constraints(num_stages=3, num_microbatches=G)
    found = solve(GRAPH, COSTS, MACHINE, constraints, stage_pricer=WholeStage)
    best = min(
        (G - 1) * max(loads(stages)) + sum(loads(stages))
        for stages in all_splits(GRAPH, 3)
        if max(map(len, stages)) <= 4
    )
    assert found.objective == pytest.approx(best, rel=1e-6)
    assert found.gap == pytest.approx(0.0, abs=1e-9)
    assert max(len(stage.blocks) for stage in found.stages) <= 4


def test_the_best_of_several_splits_by_the_step_price_is_returned():
    constraints = Constraints(num_stages=3, num_microbatches=G)
    seen = {}

    def step(partition):
        worse = 1e6 if partition.blocks == plain.blocks else 0.0
        seen[partition.blocks] = partition.objective + worse
        return seen[partition.blocks]

    plain = solve(GRAPH, COSTS, MACHINE, constraints)
    found = solve(GRAPH, COSTS, MACHINE, constraints, step=step)
    assert plain.blocks in seen
    assert len(seen) > 1
    assert found.objective == min(seen.values()) < plain.objective + 1e6
    assert found.lower_bound <= found.objective


def test_a_step_price_that_nothing_fits_says_so():
    with pytest.raises(PartitionError, match="best splits fits by the machine's own price"):
        solve(GRAPH, COSTS, MACHINE, Constraints(num_stages=3), step=lambda _: inf)
