"""Splits with a vocabulary spread over stages, against everything that could be tried."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import inf, isclose

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import Block, ParameterSpec, TensorSpec
from ipu_pipeline.ir.machine import Link
from ipu_pipeline.ir.plan import ModelIdentity
from ipu_pipeline.planner.backend import Workload, backend_of
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, VocabularyChunks
from ipu_pipeline.planner.price import make_plan
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind, step_seconds
from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.search import Constraints
from ipu_pipeline.planner.search.pipeline_search import search
from ipu_pipeline.planner.search.spread import balanced_rows, steady_counts
from tests.planner.options.table_graph import machine as table_machine
from tests.planner.options.table_graph import table_graph
from tests.planner.search.partition_oracle import (
    all_splits,
    memory_pools,
    random_case,
    stage_menu,
    transfers,
)
from tests.planner.search.partition_oracle import (
    step_seconds as closed_form,
)

SEEDS = st.integers(0, 2**32)


def cases(number):
    return settings(
        max_examples=number, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def spread_case(seed):
    """A random model with a few chunks of rows behind it, and limits."""
    graph, costs, machine, rng = random_case(seed, max_blocks=4, chain=seed % 2 == 0)
    graph, machine = replace(graph, training=True), replace(machine, shared_memory=False)
    names = tuple(f"rows{number}" for number in range(rng.randint(1, 3)))
    order = tuple(
        TensorSpec(f"{name} done", (0,), "float32", False, name, (behind,))
        for name, behind in itertools.pairwise(names)
    )
    choice = BlockChoice(
        0.0, rng.randint(1, 5), 0, rng.choice([0, 40]), fixed_bytes=rng.choice([0, 50])
    )
    held = rng.choice([0, 60])
    chunk = {name: BlockCost((choice,), {name: held}) for name in names}
    entry_s = float(rng.choice([0, 0, 1, 2]))
    graph = replace(
        graph, blocks=(*graph.blocks, *map(Block, names)), tensors=(*graph.tensors, *order)
    )
    costs = replace(
        costs, blocks={**costs.blocks, **chunk}, chunks=VocabularyChunks(names, entry_s)
    )
    limits = Constraints(
        num_microbatches=rng.choice([1, 2, 4, 9]),
        schedule=rng.choice(["1f1b", "1f1b", "gpipe"]),
        execution_order=rng.random() < 0.3,
        max_stages=3,
    )
    return graph, costs, machine, limits


def least_of_all(graph, costs, machine, limits):
    """Least step over all splits, sharings of the chunks and options."""
    chunks, real = set(costs.chunks.names), [b.name for b in graph.blocks]
    real = [name for name in real if name not in chunks]
    best = inf
    for depth in range(1, min(3, len(machine.devices), len(real)) + 1):
        for stages in all_splits(graph, depth):
            ordered = [name for stage in stages for name in stage if name not in chunks]
            if limits.execution_order and ordered != real:
                continue
            if all(set(stage) - chunks for stage in stages):
                best = min(best, price(graph, costs, machine, limits, stages, chunks))
    return best


def price(graph, costs, machine, limits, stages, chunks):
    """Least step of one split; every stage keeps one microbatch more than without chunks."""
    depth, count = len(stages), limits.num_microbatches
    devices = list(range(depth))
    send_f, send_b, held = transfers(graph, machine, stages, devices)
    pools, room, weights = memory_pools(costs, machine, stages, devices)
    menus = []
    for s, stage in enumerate(stages):
        kept = min(count, depth - s + 1) if limits.schedule == "1f1b" else count
        menus.append(stage_menu(costs, stage, costs.speed(s), kept, held[s]))
    entry_s = [
        costs.chunks.entry_s / costs.speed(s) if chunks & set(stage) else 0.0
        for s, stage in enumerate(stages)
    ]
    for s, stage in enumerate(stages):
        weights[pools[s]] += sum(costs.blocks[name].plain.fixed_bytes for name in stage)
    best = inf
    for ways in itertools.product(*menus):
        if any(weights[pools[s]] + way[2] > room[pools[s]] for s, way in enumerate(ways)):
            continue
        forward = [way[0] + send_f[s] for s, way in enumerate(ways)]
        backward = [way[1] + send_b[s] + entry_s[s] for s, way in enumerate(ways)]
        seconds = closed_form(limits.schedule, count, devices, forward, backward, training=True)
        best = min(best, seconds)
    return best


def check_optimum(seed):
    graph, costs, machine, limits = spread_case(seed)
    best, found = least_of_all(graph, costs, machine, limits), search(graph, costs, machine, limits)
    if best == inf:
        assert not found.partitions
        return
    assert isclose(found.partitions[0].objective, best, rel_tol=1e-9, abs_tol=1e-9)
    assert isclose(found.lower_bound, best, rel_tol=1e-9, abs_tol=1e-9)


@cases(200)
@given(SEEDS)
def test_shares_of_rows_equal_brute_force(seed: int) -> None:
    check_optimum(seed)


@pytest.mark.acceptance
@cases(2000)
@given(st.integers(2**32, 2**33))
def test_shares_of_rows_equal_brute_force_in_many_cases(seed: int) -> None:
    check_optimum(seed)


@cases(200)
@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from([1.0, 1.0, 0.5])), min_size=1, max_size=4
    ),
    st.integers(0, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 9),
)  # fmt: skip
def test_no_whole_rows_are_shared_better(
    devices: list[tuple[int, float]], entry_s: int, row_s: int, size: int, count: int
) -> None:
    loads, speeds = [float(load) for load, _ in devices], [speed for _, speed in devices]

    def step(rows):
        after = [
            load + (entry_s + own * row_s) / speed if own else load
            for load, speed, own in zip(loads, speeds, rows, strict=True)
        ]
        return (count - 1) * max(after) + sum(after)

    found = balanced_rows(loads, speeds, entry_s, row_s, size, count)
    assert isclose(sum(found), size)
    if len(set(speeds)) > 1:
        return  # a fast device alone may have a smaller sum: the busiest one counts first
    for cuts in itertools.combinations_with_replacement(range(size + 1), len(loads) - 1):
        rows = [b - a for a, b in itertools.pairwise((0, *cuts, size))]
        assert step(found) <= step(rows) * (1 + 1e-9)


@cases(100)
@given(st.integers(2, 5), st.integers(1, 24), st.randoms(use_true_random=False))
def test_the_mean_of_paths_is_below_every_replay(depth: int, count: int, rng) -> None:
    kind = schedule_kind("1f1b")
    shape = PipelineShape.of(depth, count, spread=range(depth))
    prices = [
        StagePrice(rng.random(), 2 * rng.random(), 0.0, 0.0, softmax_s=s, rows_s=s / 2)
        for s in (rng.random() for _ in range(depth))
    ]
    passes, rows = steady_counts(shape)
    bound = passes * sum(p.forward_s + p.backward_s for p in prices)
    bound += rows * sum(p.softmax_s + p.rows_s for p in prices)
    assert bound <= step_seconds(kind, shape, prices) * (1 + 1e-9)


# -- a whole search --------------------------------------------------------------------------------


def chain_graph(num_layers: int, vocab: int, tokens: int = 1024):
    """The graph of one layer with more of them."""
    graph = table_graph(vocab=vocab, tokens=tokens)
    wte, layer, head, loss = graph.blocks
    hidden = graph.tensors[0].shape
    names = [f"layer{n}" for n in range(num_layers)]
    layers = [
        replace(layer, name=name, module=name, parameters=(f"{name}.weight",),
                inputs=(f"h{n}",), outputs=(f"h{n + 1}",))
        for n, name in enumerate(names)
    ]  # fmt: skip
    ends = ["wte", *names, "head"]
    tensors = [
        TensorSpec(f"h{n}", hidden, "float32", True, made, (read,))
        for n, (made, read) in enumerate(itertools.pairwise(ends))
    ]
    kept = [p for p in graph.parameters if p.fqn != "layer.weight"]
    own = [ParameterSpec(f"{name}.weight", (64, 64), "float32", blocks=(name,)) for name in names]
    return replace(
        graph,
        blocks=(wte, *layers, replace(head, inputs=(f"h{num_layers}",)), loss),
        tensors=(*tensors, *graph.tensors[2:]),
        parameters=(*kept, *own),
    )


def planned(graph, machine, **limits):
    options = {"num_stages": 4, "num_microbatches": 16, "schedule": "1f1b"} | limits
    work = Workload(graph, machine, options["schedule"], 16)
    split, _ = backend_of(machine).search(work, Constraints(**options), any_replicas=False)
    return make_plan(ModelIdentity("M", {}), work, split)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved", "zbv"])
def test_spreading_is_chosen_where_it_pays(schedule: str) -> None:
    devices = table_machine(4)
    stages = None if schedule in ("interleaved", "zbv") else 4
    large = planned(chain_graph(12, 50_000), devices, schedule=schedule, num_stages=stages,
                    vocabulary="auto")  # fmt: skip
    whole = planned(chain_graph(12, 50_000), devices, schedule=schedule, num_stages=stages)
    assert large.vocabulary is not None
    assert large.stages[-1].blocks[-2:] == ("head", "loss")
    assert large.objective_s < 0.4 * whole.objective_s
    assert large.lower_bound_s > 0.7 * large.objective_s
    slow = replace(devices, link=Link(1e8, 1e-3))
    small = planned(chain_graph(12, 100), slow, schedule=schedule, num_stages=stages,
                    vocabulary="auto")  # fmt: skip
    assert small.vocabulary is None


@pytest.mark.parametrize(("schedule", "gap"), [("1f1b", 0.3), ("interleaved", 0.4)])
def test_the_bound_holds_for_every_sharing(schedule: str, gap: float) -> None:
    """Over a slow link, where each share pays for its messages."""
    graph, slow = chain_graph(6, 20_000), replace(table_machine(4), link=Link(1e9, 1e-5))
    limits = {"schedule": schedule, "num_stages": 4 if schedule == "1f1b" else None}
    best = planned(graph, slow, **limits, vocabulary="auto")
    assert best.vocabulary is not None
    assert best.gap < gap
    for number in range(3):
        shares = tuple(float(stage % 4 >= number) for stage in range(best.num_stages))
        other = planned(graph, slow, **{**limits, "num_stages": len(shares)}, vocabulary=shares)
        assert other.objective_s >= max(best.lower_bound_s, other.lower_bound_s)


def test_shares_are_kept_as_asked() -> None:
    made = planned(chain_graph(12, 50_000), table_machine(4), vocabulary=(1, 1, 0, 2))
    assert made.vocabulary.rows == ((0, 0, 12_500), (1, 12_500, 25_000), (3, 25_000, 50_000))
    assert made.stages[2].vocabulary_s == 0.0
    assert made.stages[3].vocabulary_s > 1.9 * made.stages[0].vocabulary_s


def test_what_fits_no_device_whole_is_spread() -> None:
    graph = chain_graph(12, 50_000, tokens=65)
    table = 4 * 4 * 50_000 * 64  # weights, gradient and state
    tight = table_machine(4, memory=table)
    with pytest.raises(PartitionError):
        planned(graph, tight)
    made = planned(graph, tight, vocabulary="auto")
    assert made.vocabulary is not None
    assert not made.misfits
    assert max(stage.memory_bytes for stage in made.stages) <= table


def test_what_fits_nowhere() -> None:
    with pytest.raises(PartitionError, match="no split with a vocabulary that is spread"):
        planned(chain_graph(4, 50_000), table_machine(4, memory=10**6), vocabulary="even")
