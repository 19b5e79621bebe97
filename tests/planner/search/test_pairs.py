"""Blocks priced as one, and menus that the caller narrows: the solver against brute force."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from math import inf, isclose

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.planner.options.cost_models import estimate
from ipu_pipeline.planner.search import Constraints, InfeasibleError, solve
from ipu_pipeline.planner.search.pipeline_search import search
from tests.later import every_second
from tests.planner.options.table_graph import machine as table_machine
from tests.planner.options.table_graph import table_graph
from tests.planner.search.partition_oracle import (
    brute_force,
    make_graph,
    make_machine,
    random_case,
    unit_costs,
)

CASES = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def with_menus(costs, rng):
    """Give some blocks slices, with and without recomputation."""
    blocks = {}
    for name, cost in costs.blocks.items():
        ways = list(cost.choices)
        for factor in rng.choice([(), (2,), (4, 8)]):
            plain = cost.choices[0]
            sliced = replace(
                plain, forward_s=plain.forward_s + factor, stash_bytes=plain.stash_bytes // 2,
                workspace_bytes=plain.workspace_bytes // factor, serialize_factor=factor,
            )  # fmt: skip
            ways.append(sliced)
            if rng.random() < 0.5:
                ways.append(
                    replace(sliced, backward_s=sliced.backward_s + sliced.forward_s,
                            stash_bytes=plain.stash_bytes // 5, recompute=True)
                )  # fmt: skip
        blocks[name] = replace(cost, choices=tuple(ways))
    return replace(costs, blocks=blocks)


def paired(costs, graph, rng):
    """Price some consumers together with their producers: the first carries the bytes."""
    pairs, used = [], set()
    for producer, consumer, _ in graph.edges():
        if rng.random() < 0.4 and not used & {producer, consumer}:
            used |= {producer, consumer}
            pairs.append((producer, consumer))
    return replace(costs, together=tuple(pairs))


def narrowed(costs, recompute, factors):
    """The oracle's own reading of ``recompute`` and ``serialize``: exact names only."""
    blocks = {}
    for name, cost in costs.blocks.items():
        ways = cost.choices
        if name in factors:
            ways = [way for way in ways if way.serialize_factor == max(1, factors[name])]
        if recompute is not None:
            wanted = [way for way in ways if way.recompute is (name in recompute)]
            ways = wanted or ways
        blocks[name] = BlockCost(tuple(ways), cost.weight_bytes)
    return replace(costs, blocks=blocks)


def best_of_all(graph, costs, machine, constraints):
    best = inf
    for depth in range(1, min(len(graph.blocks), len(machine.devices)) + 1):
        least = 2 * depth - 1 if graph.training else depth
        if constraints.schedule == "popart" and constraints.num_microbatches < least:
            continue

        def allowed(stages):
            stage_of = {name: s for s, stage in enumerate(stages) for name in stage}
            return all(len({stage_of[n] for n in group}) == 1 for group in costs.together)

        devices = tuple(range(depth))
        best = min(best, brute_force(graph, costs, machine, constraints, devices, allowed))
    return best


@CASES
@pytest.mark.parametrize("half", every_second([0, 1]))
@given(seed=st.integers(0, 2**32))
def test_optimum_equals_brute_force(seed, half):
    graph, costs, machine, rng = random_case(2 * seed + half, max_blocks=6, chain=seed % 3 == 0)
    costs = paired(with_menus(costs, rng), graph, rng)
    names = [block.name for block in graph.blocks]
    recompute = tuple(rng.sample(names, rng.randint(0, 2))) if rng.random() < 0.4 else None
    forced = {
        name: rng.choice([0, *{way.serialize_factor for way in costs.blocks[name].choices}])
        for name in rng.sample(names, rng.randint(0, 2))
    }
    constraints = Constraints(
        schedule=rng.choice(["1f1b", "1f1b", "gpipe", "popart"]),
        num_microbatches=rng.choice([1, 4, 9]),
        recompute="auto" if recompute is None else recompute,
        serialize=forced,
    )
    best = best_of_all(graph, narrowed(costs, recompute, forced), machine, constraints)
    if best == inf:
        with contextlib.suppress(PartitionError):
            assert not search(graph, costs, machine, constraints).partitions
        return
    found = solve(graph, costs, machine, constraints)
    assert isclose(found.objective, best, rel_tol=1e-9, abs_tol=1e-9)
    assert found.lower_bound == found.objective
    slices = {n: s.serialize.get(n, 1) for s in found.stages for n in s.blocks}
    assert all(slices[name] == max(1, factor) for name, factor in forced.items())
    for group in costs.together:
        assert len({i for i, stage in enumerate(found.blocks) if set(group) & set(stage)}) == 1
    priced = solve(graph, costs, machine, constraints.with_stages(found.blocks))
    assert isclose(priced.objective, found.objective, rel_tol=1e-9, abs_tol=1e-9)


@settings(CASES, max_examples=40)
@given(st.sampled_from([1, 2, 3]), st.sampled_from(["1f1b", "gpipe"]), st.floats(0.3, 1.2))
def test_menus_of_a_vocabulary_equal_brute_force(num_devices, schedule, share):
    graph = table_graph(vocab=20_000, tokens=2048, saved=2_000_000)
    costs = estimate(graph, table_machine())
    constraints = Constraints(num_microbatches=4, schedule=schedule)
    free = solve(graph, costs, table_machine(num_devices), constraints)
    memory = int(share * max(stage.memory_bytes for stage in free.stages))
    machine = table_machine(num_devices, memory)
    inner = replace(graph, tensors=tuple(t for t in graph.tensors if t.consumers))
    best = best_of_all(inner, costs, machine, constraints)
    found = next(iter(search(graph, costs, machine, constraints).partitions), None)
    assert (found is None) == (best == inf)
    if found is not None:
        assert isclose(found.objective, best, rel_tol=1e-9)
        assert all(stage.memory_bytes <= memory for stage in found.stages)


def test_memory_decides_between_whole_and_slices():
    graph = table_graph()
    costs = estimate(graph, table_machine())
    ample = solve(graph, costs, table_machine(1), Constraints())
    assert ample.stages[0].serialize == {}
    tight = table_machine(1, ample.stages[0].memory_bytes - 10**8)
    sliced = solve(graph, costs, tight, Constraints())
    assert "head" in sliced.stages[0].serialize
    assert sliced.objective > ample.objective
    assert "recompute or serialize to fit" in sliced.binding


CHAIN = make_graph(4, [(i, i + 1) for i in range(3)])


def test_patterns_choose_who_recomputes():
    ways = (BlockChoice(1, 2, 10), BlockChoice(1, 3, 1, recompute=True))
    costs = GraphCosts({b.name: BlockCost(ways, {}) for b in CHAIN.blocks}, "test")
    only = BlockCost(ways[:1], {})
    costs = replace(costs, blocks={**costs.blocks, "b3": only})
    found = solve(CHAIN, costs, make_machine(1), Constraints(recompute=("b[0-1]", "b3")))
    assert found.stages[0].recompute == ("b0", "b1")
    none = solve(CHAIN, costs, make_machine(1), Constraints(recompute=()))
    assert none.stages[0].recompute == ()


def test_the_last_pattern_counts():
    constraints = Constraints(serialize={"b*": 4, "b1": 0})
    assert constraints.factors(["b0", "b1", "c"]) == {"b0": 4, "b1": 1}


def test_too_many_stages_for_a_pair_are_refused_by_its_name():
    costs = replace(unit_costs(CHAIN), together=(("b2", "b3"),))
    fewer = solve(CHAIN, costs, make_machine(4), Constraints(num_stages=3))
    assert fewer.blocks[-1] == ("b2", "b3")
    with pytest.raises(InfeasibleError, match="no split keeps b2 and b3 in one stage, which run"):
        solve(CHAIN, costs, make_machine(4), Constraints(num_stages=4))


def test_a_given_split_that_separates_a_pair_is_refused():
    costs = replace(unit_costs(CHAIN), together=(("b2", "b3"),))
    stages = [["b0", "b1", "b2"], ["b3"]]
    with pytest.raises(PartitionError, match="no split satisfies the constraints"):
        solve(CHAIN, costs, make_machine(2), Constraints().with_stages(stages))


def test_a_pair_of_unknown_blocks_is_refused():
    costs = replace(unit_costs(CHAIN), together=(("b2", "x"),))
    with pytest.raises(PartitionError, match="together names x, which the graph does not have"):
        solve(CHAIN, costs, make_machine(2), Constraints())


def test_remedies_name_what_was_forced():
    ways = (BlockChoice(1, 2, 100), BlockChoice(1, 3, 1, recompute=True),
            BlockChoice(2, 2, 1, serialize_factor=2))  # fmt: skip
    costs = GraphCosts({b.name: BlockCost(ways, {}) for b in CHAIN.blocks}, "test")
    small = make_machine(1, memory=100)
    with pytest.raises(InfeasibleError, match="it fits if you allow recompute of every block"):
        solve(CHAIN, costs, small, Constraints(recompute=("b0",), allow_serialize=False))
    cut = GraphCosts({b.name: BlockCost(ways[::2], {}) for b in CHAIN.blocks}, "test")
    with pytest.raises(InfeasibleError, match="it fits if you drop serialize"):
        solve(CHAIN, cut, small, Constraints(serialize={"b3": 1, "b2": 1}))
