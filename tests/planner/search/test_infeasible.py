"""What an infeasible problem proposes, and that it does make it fit."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.planner.search import Constraints, InfeasibleError, solve
from ipu_pipeline.planner.search.pipeline_search import search
from tests.later import every_second
from tests.planner.search.partition_oracle import make_graph, make_machine, random_case

GRAPH = make_graph(6, [(i, i + 1) for i in range(5)], sizes=[1] * 6)


def costs(*, weights=100, stash=100):
    """Plain, recomputed and serialized ways; only both together save the most."""
    menu = (
        BlockChoice(1, 2, stash, 60),
        BlockChoice(1, 3, stash // 10, 60, recompute=True),
        BlockChoice(2, 4, stash, 5, serialize_factor=4),
        BlockChoice(2, 5, stash // 10, 5, recompute=True, serialize_factor=4),
    )
    return GraphCosts({f"b{i}": BlockCost(menu, {f"w{i}": weights}) for i in range(6)}, "made up")


def refusal(machine, constraints, prices=None):
    with pytest.raises(InfeasibleError) as caught:
        solve(GRAPH, prices or costs(), machine, constraints)
    for change in caught.value.changes:
        assert change.text in str(caught.value)
        assert solve(GRAPH, change.costs, change.machine, change.constraints).stages
    return caught.value


def test_recompute_is_proposed_when_it_was_forbidden():
    constraints = Constraints(num_microbatches=8, recompute="never", num_stages=2)
    error = refusal(make_machine(2, memory=520), constraints)
    assert str(error) == (
        "no split fits: even split for memory alone, stage 1 (b2 to b5) needs 0.000809 MB, its "
        "device has 0.00052 MB; it fits if you allow recompute; or give every device 0.00081 MB"
    )


def test_serialization_is_proposed_when_it_was_forbidden():
    constraints = Constraints(num_microbatches=8, allow_serialize=False, num_stages=2)
    error = refusal(make_machine(2, memory=390), constraints)
    assert error.changes[0].text == "allow serialization"


def test_both_are_proposed_when_neither_is_enough():
    constraints = Constraints(2, 8, recompute="never", allow_serialize=False)
    error = refusal(make_machine(2, memory=390), constraints)
    assert error.changes[0].text == "allow recompute and allow serialization"


def test_the_least_number_of_devices_is_proposed():
    error = refusal(make_machine(2, memory=300), Constraints(num_microbatches=2))
    texts = [change.text for change in error.changes]
    assert texts[0] == "use 3 devices, not 2"
    with pytest.raises(InfeasibleError):
        solve(GRAPH, costs(), make_machine(2, memory=300), Constraints(num_microbatches=2))


def test_memory_is_proposed_when_a_block_is_too_large_for_any_device():
    error = refusal(make_machine(6, memory=90), Constraints())
    assert [change.text for change in error.changes] == ["give every device 0.00012 MB"]


def test_a_shared_memory_says_the_sum():
    machine = make_machine(2, memory=200, shared_memory=True)
    error = refusal(machine, Constraints(num_stages=2))
    assert "the stages need at least" in str(error)
    assert "together, the machine has 0.0004 MB" in str(error)


def test_contradicting_pins_are_named():
    error = refusal(make_machine(2), Constraints(pinned_stages={"b0": 1, "b5": 0}))
    assert [change.text for change in error.changes] == ["drop pinned_stages"]


@pytest.mark.parametrize("seeds", every_second([range(30), range(30, 60)]), ids=str)
def test_every_proposal_for_random_problems_fits(seeds):
    refused = 0
    for seed in seeds:
        graph, prices, machine, _ = random_case(seed)
        tight = dataclasses.replace(
            machine,
            devices=tuple(dataclasses.replace(d, memory_bytes=250) for d in machine.devices),
        )
        constraints = Constraints(num_microbatches=4, recompute="never", allow_serialize=False)
        with contextlib.suppress(PartitionError):
            if search(graph, prices, tight, constraints).partitions:
                continue
        with pytest.raises(InfeasibleError) as caught:
            solve(graph, prices, tight, constraints)
        refused += 1
        assert caught.value.changes
        for change in caught.value.changes:
            assert solve(graph, change.costs, change.machine, change.constraints).stages
    assert refused > 10
