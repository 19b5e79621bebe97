"""Prices of serialized blocks, by hand: bytes exactly, seconds from the roofline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.ir.graph import Block, TensorSpec
from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.options.block_options import SLICE_BYTES, fused_factors
from ipu_pipeline.planner.options.cost_models import (
    estimate,
)
from ipu_pipeline.planner.options.tables import fused_heads, is_end
from tests.ir.plan_example import example_graph, example_machine
from tests.planner.options.table_graph import HIDDEN, TOKENS, VOCAB, machine, table_graph

DENSE, WIDE, ROWS = 4 * VOCAB * HIDDEN, 4 * TOKENS * VOCAB, 4 * TOKENS * HIDDEN


def menu(block: str, graph=None, **model: object) -> tuple[BlockChoice, ...]:
    costs = estimate(graph or table_graph(), machine(), **model)
    return costs.blocks[block].choices


def test_a_serialized_lookup_makes_no_dense_gradient() -> None:
    plain, sliced = menu("wte")
    assert (plain.serialize_factor, sliced.serialize_factor) == (1, 2)
    assert plain.workspace_bytes == ROWS + DENSE
    assert sliced.workspace_bytes == ROWS + TOKENS * (4 * HIDDEN + 8)
    assert sliced.stash_bytes == plain.stash_bytes
    assert plain.total_s < sliced.total_s < 1.01 * plain.total_s


def test_workspace_never_goes_below_the_rows_of_the_gradient() -> None:
    graph = table_graph()
    small = replace(graph["wte"], workspace_bytes=10)
    _, sliced = menu("wte", replace(graph, blocks=(small, *graph.blocks[1:])))
    assert sliced.workspace_bytes == TOKENS * (4 * HIDDEN + 8)


def test_lookups_recompute_and_serialize_where_both_save() -> None:
    graph = table_graph()
    keeps = replace(graph["wte"], saved_bytes=100)
    ways = menu("wte", replace(graph, blocks=(keeps, *graph.blocks[1:])))
    assert [(w.recompute, w.serialize_factor) for w in ways] == [
        (False, 1), (True, 1), (False, 2), (True, 2),
    ]  # fmt: skip


def test_frozen_tables_and_inference_have_nothing_to_save() -> None:
    graph = table_graph()
    frozen = tuple(replace(p, trainable=False) for p in graph.parameters)
    assert len(menu("wte", replace(graph, parameters=frozen))) == 1
    assert len(menu("wte", table_graph(training=False))) == 1
    costs = estimate(table_graph(training=False), machine())
    assert costs.together == ()


def test_a_fused_head_carries_the_bytes_of_both() -> None:
    graph = table_graph()
    costs = estimate(graph, machine())
    plain, *fused = costs.blocks["head"].choices
    assert costs.together == (("head", "loss"),)
    assert (plain.stash_bytes, plain.workspace_bytes) == (WIDE + 4, 2 * WIDE)
    assert [way.serialize_factor for way in fused] == [4, 8, 16]
    for way in fused:
        part = TOKENS // way.serialize_factor * VOCAB * 4
        assert part <= SLICE_BYTES
        assert (way.stash_bytes, way.workspace_bytes) == (4, part + DENSE + ROWS)
    (loss,) = costs.blocks["loss"].choices
    assert (loss.stash_bytes, loss.workspace_bytes) == (0, 0)


def test_a_fused_head_computes_the_logits_and_the_softmax_again() -> None:
    graph = table_graph()
    costs = estimate(graph, machine())
    plain, fused, *_ = costs.blocks["head"].choices
    loss = costs.blocks["loss"].plain
    view = 8 / 1e11
    product = plain.forward_s - view
    assert product == pytest.approx(2 * TOKENS * HIDDEN * VOCAB / 1e12)
    assert fused.forward_s == pytest.approx(plain.forward_s)  # bound by FLOPs, slices or not
    assert fused.backward_s == pytest.approx(plain.backward_s + plain.forward_s + loss.forward_s)


def test_alone_in_flight_a_fused_head_computes_nothing_twice() -> None:
    graph = table_graph(saved=3 * ROWS)
    several, alone, many = (menu("head", graph, loss_in_flight=n) for n in (None, 1, 2))
    assert several == many
    plain, again, fused, both, *_ = alone
    assert (plain, again) == several[:2]
    assert plain.total_s < fused.total_s < plain.total_s * (1 + 1e-5)
    assert both == several[3]  # recomputed, it holds nothing


def test_a_loss_that_is_not_the_end_may_have_several_in_flight() -> None:
    graph = table_graph()
    other = Block("aside", inputs=("h1",), outputs=("out",))
    out = TensorSpec("out", (4,), "float32", True, "aside")
    aside = replace(graph, blocks=(*graph.blocks, other), tensors=(*graph.tensors, out))
    assert is_end(graph, graph["loss"])
    assert not is_end(aside, aside["loss"])
    assert menu("head", aside, loss_in_flight=1) == menu("head", graph)


def test_thin_slices_read_the_table_again_and_again() -> None:
    graph = table_graph()
    factor = 1024
    ways = menu("head", graph, factors={"head": (factor,)})
    fused = next(way for way in ways if way.serialize_factor == factor)
    moved = 4 * (TOKENS * HIDDEN + HIDDEN * VOCAB + TOKENS * VOCAB) + (factor - 1) * DENSE
    assert fused.forward_s == pytest.approx(moved / 1e11 + 8 / 1e11)
    assert fused.backward_s > 3 * fused.forward_s


def test_what_the_head_keeps_besides_logits_may_be_recomputed() -> None:
    graph = table_graph(saved=3 * ROWS)
    ways = menu("head", graph)
    assert [(w.recompute, w.serialize_factor) for w in ways[:4]] == [
        (False, 1), (True, 1), (False, 4), (True, 4),
    ]  # fmt: skip
    plain, again, fused, both = ways[:4]
    assert again.stash_bytes == plain.stash_bytes - 2 * ROWS
    assert (fused.stash_bytes, both.stash_bytes) == (3 * ROWS + 4, ROWS + 4)
    assert both.workspace_bytes == fused.workspace_bytes + 3 * ROWS
    assert both.backward_s == pytest.approx(fused.backward_s + plain.forward_s)


@pytest.mark.parametrize(
    ("tokens", "factors"), [(1, ()), (2, (2,)), (600, (2, 4, 8)), (4096, (16, 32, 64))]
)
def test_no_slice_is_less_than_a_token(tokens: int, factors: tuple[int, ...]) -> None:
    (pair,) = fused_heads(table_graph(tokens=tokens))
    assert fused_factors(pair) == factors


def test_asked_for_factors_are_priced_for_small_tables_too() -> None:
    small = table_graph(vocab=100)
    factors = {"wte": (5, 1), "head": (3,), "layer": (0, 2), "loss": (2,)}
    costs = estimate(small, machine(), factors=factors)
    offered = {n: {w.serialize_factor for w in c.choices} for n, c in costs.blocks.items()}
    assert offered == {"wte": {1, 5}, "head": {1, 2, 3, 4, 8}, "layer": {1, 2}, "loss": {1}}
    assert costs.together == (("head", "loss"),)


def test_a_projection_that_is_not_fused_only_gets_slower() -> None:
    graph = replace(table_graph(), results=("logits",))
    plain, sliced = menu("head", graph, factors={"head": (64,)})
    assert (sliced.stash_bytes, sliced.workspace_bytes) == (
        plain.stash_bytes,
        plain.workspace_bytes,
    )
    assert sliced.forward_s > plain.forward_s
    inference = table_graph(training=False)
    whole, cut = menu("head", inference, factors={"head": (64,)})
    assert cut.forward_s > whole.forward_s
    assert cut.backward_s == whole.backward_s


def test_measured_times_get_the_same_menus() -> None:
    graph = table_graph()
    times = {block.name: (0.25, 0.5) for block in graph.blocks}
    costs = estimate(graph, machine(), measured_s=times, factors={"head": (3,)})
    counted = estimate(graph, machine(), factors={"head": (3,)})
    assert costs.together == counted.together
    for name, cost in costs.blocks.items():
        bytes_of = [(w.stash_bytes, w.workspace_bytes, w.serialize_factor) for w in cost.choices]
        assert bytes_of == [
            (w.stash_bytes, w.workspace_bytes, w.serialize_factor)
            for w in counted.blocks[name].choices
        ]
    fused = costs.blocks["head"].choices[2]
    assert fused.backward_s == pytest.approx(0.5 + 0.25 + 0.25, rel=1e-3)


def test_models_without_large_tables_have_the_menus_they_had() -> None:
    costs = estimate(example_graph(), example_machine())
    assert costs.together == ()
    assert {w.serialize_factor for c in costs.blocks.values() for w in c.choices} == {1}
