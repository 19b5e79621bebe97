"""A backend's own step price chooses among the best splits of the search."""

from __future__ import annotations

from math import inf

import pytest

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.planner.search import Constraints, solve
from tests.planner.search.partition_oracle import make_graph, make_machine, unit_costs

GRAPH = make_graph(9, [(i, i + 1) for i in range(8)], sizes=[1] * 9)
COSTS = unit_costs(GRAPH, [2, 1, 3, 1, 2, 5, 1, 1, 2])
MACHINE = make_machine(3, bandwidth=1e9)
G = 6


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
