"""Pricing a plan exactly as it is annotated, split tables included."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage
from ipu_pipeline.planner.price import counted_costs, price, workload_of
from ipu_pipeline.planner.search.given_split import price_stages
from tests.planner.options.table_graph import HIDDEN, TOKENS, VOCAB, machine, table_graph

TABLE = 16 * VOCAB * HIDDEN  # weight, gradient, and two moments


def plan_of(*stages: tuple[str, ...], recompute=(), serialize=(), held=()) -> Plan:
    sliced = dict(serialize)
    return Plan(
        model=ModelIdentity("Tables", {}),
        machine=machine(len(stages)),
        stages=tuple(
            PlannedStage(
                index, names, tuple(n for n in names if n in recompute),
                {n: sliced[n] for n in names if n in sliced},
                table_slices=dict(held).get(index, {}),
            )
            for index, names in enumerate(stages)
        ),
        graph=table_graph(), num_microbatches=4, replicas=1,
    )  # fmt: skip


def priced(plan: Plan, graph=None):
    plan = replace(plan, graph=graph or plan.graph)
    return price_stages(plan, counted_costs(workload_of(plan))).split


def test_nothing_is_left_to_choose() -> None:
    names = ("wte", "layer", "head", "loss")
    plain = priced(plan_of(names))
    assert (plain.stages[0].recompute, plain.stages[0].serialize) == ((), {})
    cut = priced(plan_of(names, recompute=("layer",), serialize={"head": 32, "wte": 3}))
    assert cut.stages[0].recompute == ("layer",)
    assert cut.stages[0].serialize == {"head": 32, "wte": 3}
    assert cut.stages[0].memory_bytes < plain.stages[0].memory_bytes
    assert cut.stages[0].backward_s > plain.stages[0].backward_s
    assert cut.num_microbatches == 4


def test_a_head_apart_from_the_loss_is_cut_but_not_fused() -> None:
    apart = priced(plan_of(("wte", "layer", "head"), ("loss",), serialize={"head": 64}))
    fused = priced(plan_of(("wte", "layer"), ("head", "loss"), serialize={"head": 64}))
    assert apart.stages[1].memory_bytes > 4 * TOKENS * VOCAB
    assert sum(s.memory_bytes for s in fused.stages) < sum(s.memory_bytes for s in apart.stages)


def test_a_plan_that_does_not_fit_names_device_and_bytes() -> None:
    plan = plan_of(("wte", "layer", "head", "loss"))
    assert price(plan).misfits == ()
    (text,) = price(replace(plan, machine=machine(1, 4 * 10**8))).misfits
    assert re.fullmatch(r"d0 needs [\d.]+ MB of 400.0 MB; the fullest stage is 0 with .*MB", text)


def seq_graph():
    """As an encoder-decoder: what runs first does not need the table."""
    graph = table_graph()
    layer, wte = graph["layer"], graph["wte"]
    first = replace(layer, name="first", inputs=(), outputs=(), parameters=())
    return replace(graph, blocks=(first, wte, *graph.blocks[1:]))


def test_slices_move_bytes_and_partial_sums_cross() -> None:
    graph = seq_graph()
    stages = (("first",), ("wte", "layer", "head", "loss"))
    whole = priced(plan_of(*stages, serialize={"wte": 4}), graph)
    held = {0: {"wte": (0, 1)}, 1: {"wte": (1, 4)}}
    split = priced(plan_of(*stages, serialize={"wte": 4}, held=held), graph)
    sums = 4 * TOKENS * HIDDEN
    assert split.stages[0].memory_bytes == whole.stages[0].memory_bytes + TABLE // 4
    moved = whole.stages[1].memory_bytes - split.stages[1].memory_bytes
    assert moved == TABLE - TABLE * 3 // 4 - sums  # the sums that arrive are kept
    assert whole.stages[0].transfer_s == 0
    assert split.stages[0].transfer_s == pytest.approx(2 * sums / 1e10)


def test_a_stage_that_needs_the_whole_table_anyway_holds_it_once() -> None:
    graph = seq_graph()
    tied = tuple(
        replace(block, parameters=("wte.weight",)) if block.name in ("head", "first") else block
        for block in graph.blocks
    )
    graph = replace(graph, blocks=tied)
    stages = (("first",), ("wte", "layer", "head", "loss"))
    held = {0: {"wte": (0, 2)}, 1: {"wte": (2, 4)}}
    whole = priced(plan_of(*stages, serialize={"wte": 4}), graph)
    split = priced(plan_of(*stages, serialize={"wte": 4}, held=held), graph)
    assert split.stages[0].memory_bytes == whole.stages[0].memory_bytes
    assert split.stages[1].memory_bytes == whole.stages[1].memory_bytes + 4 * TOKENS * HIDDEN


def test_slices_of_a_block_without_table_are_refused() -> None:
    plan = plan_of(("wte", "layer"), ("head", "loss"), held={0: {"loss": (0, 1)}})
    with pytest.raises(PartitionError, match="stage 0 holds slices of 'loss', which has no table"):
        priced(plan)
