"""The solver against brute force on random graphs: every schedule, memory, sharing, pins."""

from __future__ import annotations

import contextlib
import dataclasses
from itertools import pairwise
from math import inf, isclose

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.solver_scaling import tight_bytes, timed
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.search import Constraints, InfeasibleError, solve
from ipu_pipeline.planner.search.least_bytes import LeastBytes
from ipu_pipeline.planner.search.pipeline_search import search
from tests.later import every_second
from tests.planner.search.partition_oracle import (
    all_splits,
    brute_force,
    make_graph,
    make_machine,
    price_split,
    random_case,
    unit_costs,
)

SEEDS = st.integers(0, 2**32)
CASES = {"general": 200, "shared devices": 100, "pins": 100, "cuts and ties": 75, "pool": 75}


def check(graph, costs, machine, constraints):
    """Solver and oracle agree on the optimum, or both find nothing; the bound is tight."""
    best = brute_over_depths(graph, costs, machine, constraints)
    if best == inf:  # without the search for remedies, which test_infeasible.py covers
        with contextlib.suppress(PartitionError):
            assert not search(graph, costs, machine, constraints).partitions
        return
    found = solve(graph, costs, machine, constraints)
    assert isclose(found.objective, best, rel_tol=1e-9, abs_tol=1e-9)
    assert found.gap == 0.0
    assert found.lower_bound == found.objective
    again = dataclasses.replace(constraints, stage_devices=found.devices, num_stages=None)
    priced = solve(graph, costs, machine, again.with_stages(found.blocks))
    assert isclose(priced.objective, found.objective, rel_tol=1e-9, abs_tol=1e-9)
    assert priced.lower_bound <= found.objective * (1 + 1e-9)


def brute_over_depths(graph, costs, machine, constraints):
    names = [block.name for block in graph.blocks]
    num_devices = len(machine.devices)
    groups = graph.tied_groups if constraints.tied == "same_device" else ()
    pipelines = [constraints.stage_devices]
    if constraints.stage_devices is None:
        pipelines = [tuple(range(k)) for k in range(1, min(len(names), num_devices) + 1)]
        if groups:
            pipelines += [(*range(k), 0) for k in range(2, num_devices + 1) if k < len(names)]
    best = inf
    for devices in pipelines:
        depth = 1 + sum(a != b for a, b in pairwise(devices))
        least = 2 * depth - 1 if graph.training else depth
        if constraints.schedule == "popart" and constraints.num_microbatches < least:
            continue

        def allowed(stages, devices=devices):
            stage_of = {name: s for s, stage in enumerate(stages) for name in stage}
            return (
                all(stage_of[b] == s for b, s in constraints.pinned_stages.items())
                and all(devices[stage_of[b]] == d for b, d in constraints.pinned_devices.items())
                and all(
                    stage_of[b] == stage_of[names[max(names.index(b) - 1, 0)]]
                    for b in constraints.forbidden_cuts
                )
                and all(len({devices[stage_of[b]] for b in group}) == 1 for group in groups)
            )

        best = min(best, brute_force(graph, costs, machine, constraints, devices, allowed))
    return best


def common(rng, graph):
    options = {
        "schedule": rng.choice(["1f1b", "1f1b", "1f1b", "gpipe", "popart"]),
        "num_microbatches": rng.choice([1, 2, 4, 9]),
        "execution_order": rng.random() < 0.2,
    }
    if rng.random() < 0.2:
        options["update_s"] = {block.name: rng.randint(0, 9) for block in graph.blocks}
    return options


def topic(name):
    """Hypothesis settings of half a topic; derandomized so that a run can be repeated."""
    return settings(
        max_examples=CASES[name],
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@topic("general")
@pytest.mark.parametrize("half", every_second([0, 1]))
@given(seed=SEEDS)
def test_optimum_equals_brute_force(seed, half):
    graph, costs, machine, rng = random_case(2 * seed + half, max_blocks=6, chain=seed % 3 == 0)
    check(graph, costs, machine, Constraints(**common(rng, graph)))


@topic("shared devices")
@pytest.mark.parametrize("half", every_second([0, 1]))
@given(seed=SEEDS)
def test_optimum_with_shared_devices_equals_brute_force(seed, half):
    graph, costs, machine, rng = random_case(2 * seed + half, max_blocks=6, chain=seed % 2 == 0)
    depth = rng.randint(1, min(len(graph.blocks), 4))
    devices = tuple(rng.randrange(len(machine.devices)) for _ in range(depth))
    tied = rng.choice(["free", "same_device"])
    options = common(rng, graph)
    check(graph, costs, machine, Constraints(stage_devices=devices, tied=tied, **options))


@topic("pins")
@pytest.mark.parametrize("half", every_second([0, 1]))
@given(seed=SEEDS)
def test_optimum_with_pins_equals_brute_force(seed, half):
    graph, costs, machine, rng = random_case(2 * seed + half, max_blocks=6)
    names = [block.name for block in graph.blocks]
    pins = {"pinned_stages": {}, "pinned_devices": {}}
    for name in rng.sample(names, rng.randint(1, 2)):
        kind = rng.choice(list(pins))
        pins[kind][name] = rng.randrange(len(machine.devices))
    check(graph, costs, machine, Constraints(**pins, **common(rng, graph)))


@topic("cuts and ties")
@pytest.mark.parametrize("half", every_second([0, 1]))
@given(seed=SEEDS)
def test_optimum_with_ties_and_forbidden_cuts_equals_brute_force(seed, half):
    graph, costs, machine, rng = random_case(2 * seed + half, max_blocks=6, chain=seed % 2 == 0)
    names = [block.name for block in graph.blocks]
    tied = rng.choice(["same_device", "exchange", "free"])
    cuts = tuple(rng.sample(names, rng.randint(0, 1)))
    options = common(rng, graph)
    check(graph, costs, machine, Constraints(tied=tied, forbidden_cuts=cuts, **options))


@topic("pool")
@pytest.mark.parametrize("half", every_second([0, 1]))
@given(seed=SEEDS)
def test_optimum_with_one_memory_for_all_equals_brute_force(seed, half):
    graph, costs, machine, rng = random_case(2 * seed + half, max_blocks=5, chain=True)
    machine = dataclasses.replace(machine, shared_memory=True)
    check(graph, costs, machine, Constraints(**common(rng, graph)))


def test_transfers_cost_nothing_in_shared_memory():
    graph = make_graph(4, [(0, 1), (1, 2), (2, 3)])
    shared = make_machine(2, bandwidth=1.0, shared_memory=True)
    found = solve(graph, unit_costs(graph), shared, Constraints(num_stages=2))
    assert [stage.transfer_s for stage in found.stages] == [0.0, 0.0]


def test_a_relayed_value_is_paid_on_each_hop():
    graph = make_graph(3, [(0, 1), (0, 2), (1, 2)], sizes=[10, 1, 1])
    machine = make_machine(3, bandwidth=1.0)
    given = Constraints().with_stages([["b0"], ["b1"], ["b2"]])
    found = solve(graph, unit_costs(graph), machine, given)
    # 40 bytes of b0 and 4 of b1, forward and backward, charged to both ends of each hop.
    assert [stage.transfer_s for stage in found.stages] == [80.0, 80.0 + 88.0, 88.0]


def test_replicas_cost_an_all_reduce():
    graph = make_graph(
        4, [(0, 1), (1, 2), (2, 3)], sizes=[1] * 4, params=[(f"w{i}", (i,)) for i in range(4)]
    )
    machine = make_machine(4, bandwidth=10.0)
    pair, four = (
        solve(
            graph, unit_costs(graph), machine,
            Constraints(replicas=count, num_microbatches=64 // count),
        )
        for count in (2, 4)
    )  # fmt: skip
    ring_s = 2 * (4 - 1) / 4 * sum(one.num_bytes for one in graph.parameters) / 10.0
    assert four.objective == pytest.approx(16 * 4 * 3 + ring_s)
    assert pair.objective < four.objective
    assert (pair.replicas, four.replicas) == (2, 4)


def test_slow_board_links_are_avoided():
    graph = make_graph(6, [(i, i + 1) for i in range(5)], sizes=[50, 50, 50, 50, 1, 50])
    machine = make_machine(2, bandwidth=1e9, board_link=Link(10.0), devices_per_board=1)
    found = solve(graph, unit_costs(graph), machine, Constraints(num_stages=2, num_microbatches=2))
    assert found.blocks[0] == ("b0", "b1", "b2", "b3", "b4")


def test_a_tied_head_goes_back_to_the_first_device():
    graph = make_graph(6, [(i, i + 1) for i in range(5)], sizes=[1] * 6, params=[("tied", (0, 5))])
    machine = make_machine(2, bandwidth=1e9)
    constraints = Constraints(num_microbatches=8, tied="same_device")
    found = solve(graph, unit_costs(graph), machine, constraints)
    assert found.devices == (0, 1, 0)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "popart"])
def test_time_limit_gives_a_feasible_split_and_a_true_bound(schedule):
    graph = make_graph(24, [(p, c) for c in range(24) for p in (c - 1, c - 2) if p >= 0])
    machine = make_machine(4, bandwidth=300.0)
    costs = unit_costs(graph, [1 + (7 * i) % 5 for i in range(24)])
    exact = solve(graph, costs, machine, Constraints(
        num_stages=4, num_microbatches=16, schedule=schedule))  # fmt: skip
    limited = Constraints(num_stages=4, num_microbatches=16, schedule=schedule, time_limit_s=0.002)
    quick = solve(graph, costs, machine, limited)
    assert quick.lower_bound <= exact.objective * (1 + 1e-9)
    assert quick.objective >= exact.objective * (1 - 1e-9)
    assert quick.gap == pytest.approx(1 - quick.lower_bound / quick.objective)


def test_too_many_boundaries_fall_back_to_the_execution_order_with_a_true_bound():
    graph = make_graph(12, [(i, 11) for i in range(11)])
    machine = make_machine(3, bandwidth=1e9)
    exact = solve(graph, unit_costs(graph), machine, Constraints(num_stages=3))
    cut = solve(graph, unit_costs(graph), machine, Constraints(num_stages=3, max_ideals=100))
    assert cut.lower_bound <= exact.objective * (1 + 1e-12) <= cut.objective * (1 + 1e-9)


def test_nothing_found_within_the_limits_says_so():
    graph = make_graph(12, [(i, 11) for i in range(11)])
    costs = unit_costs(graph, weights=10, seconds=range(1, 13))
    machine = make_machine(2, memory=[30, 200])
    # In execution order b11 and its eleven inputs do not leave the first device small enough.
    pins = {"b9": 0, "b10": 0}
    constraints = Constraints(num_stages=2, max_ideals=100, pinned_stages=pins)
    with pytest.raises(InfeasibleError, match=r"none was ruled out, within time_limit_s=None .*: "):
        solve(graph, costs, machine, constraints)
    hasty = dataclasses.replace(constraints, time_limit_s=9.0)
    with pytest.raises(InfeasibleError, match=r"time_limit_s=9\.0 and max_ideals=100; raise them"):
        solve(graph, costs, machine, hasty)


def test_oracle_prices_what_the_solver_returns():
    graph, costs, machine, _ = random_case(11, chain=True)
    constraints = Constraints(num_microbatches=4)
    found = solve(graph, costs, machine, constraints)
    price = price_split(graph, costs, machine, constraints, found.blocks, found.devices)
    assert price == pytest.approx(found.objective)


def test_oracle_lists_every_split_of_a_chain():
    graph = make_graph(5, [(i, i + 1) for i in range(4)])
    assert len(list(all_splits(graph, 3))) == 6  # 2 of 4 cuts


def test_infeasible_is_a_partition_error():
    assert issubclass(InfeasibleError, PartitionError)


def test_where_the_whole_model_fits_no_stage_is_asked_for_least_bytes(monkeypatch):
    def asked(*_):
        raise AssertionError("a split of least bytes of a model that fits anywhere")

    monkeypatch.setattr(LeastBytes, "split", asked)
    lengths, devices = (12,), 4
    _, found = timed(lengths, devices)
    assert found.gap == 0.0
    with pytest.raises(AssertionError, match="least bytes"):
        timed(lengths, devices, tight_bytes(*lengths, devices))
