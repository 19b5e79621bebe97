"""Published ``layers_per_ipu`` lists."""

from __future__ import annotations

from itertools import accumulate

import pytest

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.planner.search import Constraints, solve
from ipu_pipeline.planner.search.constraints import layer_rule
from tests.planner.search.partition_oracle import make_graph, make_machine, unit_costs

KINDS = ["embedding", *["layer"] * 6, "other", "head", "loss"]


def bert(**more):
    return make_graph(10, [(i, i + 1) for i in range(9)], sizes=[1] * 10, kinds=KINDS, **more)


@pytest.mark.parametrize(
    ("given", "devices", "counts"),
    [((-1, -1), 2, (3, 3)), ((1, -1, 2), 3, (1, 3, 2)), ((6, -1), 2, (6, 0))],
)
def test_wildcards(given, devices, counts):
    assert layer_rule(bert(), given, range(devices)).counts == tuple(accumulate(counts))


@pytest.mark.parametrize(
    ("given", "devices", "message"),
    [
        ((3, 2), 2, r"\[3, 2\] places 5 layers, the model has 6"),
        ((7, -1), 2, r"\[7, -1\] places 7 layers, the model has 6"),
        ((3, 3), 3, r"\[3, 3\] has 2 entries for 3 IPUs"),
    ],
)
def test_wrong_lists_are_refused(given, devices, message):
    with pytest.raises(PartitionError, match=message):
        layer_rule(bert(), given, range(devices))


def test_what_is_no_count_is_refused():
    with pytest.raises(ValueError, match="layers_per_ipu must be at least -1, got -2"):
        Constraints(layers_per_ipu=(3, -2))


@pytest.mark.parametrize("counts", [(2, 4), (0, 6), (3, 1, 2), (0, 2, 2, 2)])
def test_split_obeys_the_list(counts):
    graph = bert()
    machine = make_machine(4, bandwidth=1e9)
    constraints = Constraints(layers_per_ipu=counts, num_microbatches=8)
    found = solve(graph, unit_costs(graph), machine, constraints)
    kinds = [[graph[name].kind for name in stage.blocks] for stage in found.stages]
    assert [kind.count("layer") for kind in kinds] == list(counts)
    assert "embedding" in kinds[0]
    assert kinds[-1][-2:] == ["head", "loss"]


def test_default_list_spreads_over_every_device():
    graph = bert()
    machine = make_machine(3, bandwidth=1e9)
    found = solve(graph, unit_costs(graph), machine, Constraints(layers_per_ipu=(-1,)))
    assert [sum(graph[b].kind == "layer" for b in s.blocks) for s in found.stages] == [2, 2, 2]


def test_tied_head_returns_to_the_first_device_without_layers():
    graph = bert(params=[("word", (0, 8))])
    machine = make_machine(3, bandwidth=1e9)
    constraints = Constraints(layers_per_ipu=(0, 3, 3), tied="same_device", num_microbatches=9)
    found = solve(graph, unit_costs(graph), machine, constraints)
    assert found.devices == (0, 1, 2, 0)
    assert "b8" in found.blocks[-1]


def test_wrong_sum_reaches_the_caller_of_solve():
    graph = bert()
    with pytest.raises(PartitionError, match="places 5 layers, the model has 6"):
        solve(graph, unit_costs(graph), make_machine(2), Constraints(layers_per_ipu=(2, 3)))
