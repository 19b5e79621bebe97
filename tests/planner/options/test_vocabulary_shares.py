"""Shares of a vocabulary as blocks: together they are the whole, and each costs its part."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

import ipu_pipeline as ipp
from ipu_pipeline.errors import PartitionError, PlanError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.options.cost_models import estimate
from ipu_pipeline.planner.options.vocabulary_shares import PUT_OFF, VocabularyShares, with_shares
from tests.planner.options.table_graph import HIDDEN, TOKENS, VOCAB, machine, table_graph
from tests.tiny_models import TINY

CUTS = (0, 10_000, 35_000, VOCAB)
HIDDEN_BYTES = 4 * TOKENS * HIDDEN


def tied(graph: BlockGraph) -> BlockGraph:
    """The lookup reads the head's table."""
    blocks = tuple(
        replace(b, parameters=("wte.weight",)) if b.name == "head" else b for b in graph.blocks
    )
    parameters = tuple(
        replace(p, blocks=("wte", "head")) if p.fqn == "wte.weight" else p
        for p in graph.parameters
        if p.fqn != "head.weight"
    )
    return replace(graph, blocks=blocks, parameters=parameters)


def test_shares_together_are_the_whole() -> None:
    whole = table_graph()
    graph, shares = VocabularyShares(whole).shared(list(pairwise(CUTS)))
    for what in ("forward_flops", "backward_flops"):
        assert sum(getattr(b, what) for b in graph.blocks) == sum(
            getattr(b, what) for b in whole.blocks
        )
    assert sum(p.num_bytes for p in graph.parameters) == sum(p.num_bytes for p in whole.parameters)
    assert [graph[name].forward_flops for name in ("head", "loss")] == [0, 0]
    assert [len(share.names) for share in shares] == [4, 4, 4]
    assert not any(graph[name].inputs for share in shares for name in share.names)
    (largest,) = [op for op in graph["head[10000:35000]"].forward_ops if op.flops]
    assert largest.shapes == ((TOKENS, HIDDEN), (HIDDEN, 25_000))
    again = BlockGraph.from_json(graph.to_json(), "graph")
    assert {consumer for _, consumer, _ in again.edges()} == {"layer", "head", "loss"}


def test_a_share_keeps_the_softmax_of_its_rows() -> None:
    graph, (share,) = VocabularyShares(table_graph()).shared([(0, 1000)])
    block = graph[share.softmax[0]]
    assert block.saved_bytes == 0
    assert block.workspace_bytes == (
        PUT_OFF * (4 * TOKENS * 1000 + HIDDEN_BYTES) + HIDDEN_BYTES + 4 * 1000 * HIDDEN
    )


def test_a_tied_table_is_held_once_by_a_share() -> None:
    spread = VocabularyShares(tied(table_graph()))
    graph, (share, _) = spread.shared([(0, 20_000), (20_000, VOCAB)])
    costs = estimate(graph, machine())
    held: dict[str, int] = {}
    for name in share.names:
        held |= costs.blocks[name].weight_bytes
    assert held == {"wte.weight[0:20000]": 4 * 4 * 20_000 * HIDDEN}
    assert costs.blocks["wte"].weight_bytes == {}


def test_in_one_memory_lookups_stay_whole() -> None:
    graph, (share,) = VocabularyShares(tied(table_graph()), with_lookups=False).shared([(0, VOCAB)])
    assert share.rows == ("head[0:50000].rows",)
    assert graph["wte"].parameters == ("wte.weight",)
    assert graph["wte"].forward_ops == table_graph()["wte"].forward_ops


def test_messages_of_a_share() -> None:
    spread, link = VocabularyShares(table_graph()), Link(1e9, 1e-3)
    hops = 3 * (1e-3 + HIDDEN_BYTES / 1e9)
    softmax_s, rows_s = spread.message_s(link)
    assert softmax_s == pytest.approx(hops + 1e-3 + 8 * TOKENS / 1e9)
    assert rows_s == pytest.approx(hops)
    assert spread.message_s(link, 0.5) == (softmax_s / 2, rows_s / 2)
    assert spread.message_s(None) == (0.0, 0.0)


def test_measured_seconds_are_shared_out() -> None:
    spread = VocabularyShares(table_graph())
    measured = {"wte": (1.0, 2.0), "layer": (3.0, 3.0), "head": (8.0, 16.0), "loss": (2.0, 4.0)}
    found = spread.measured(measured, [(0, 25_000), (25_000, VOCAB)])
    assert found["head[0:25000]"] == (4.0, 4.0)
    assert found["head[0:25000].rows"] == (0.0, 4.0)
    assert found["loss[25000:50000]"] == (1.0, 2.0)
    assert found["wte[0:25000]"] == (1.0, 1.0)
    assert found["layer"] == (3.0, 3.0)
    assert found["head"] == found["loss"] == found["wte"] == (0.0, 0.0)
    assert spread.measured({}, [(0, VOCAB)]) == {}


@pytest.mark.parametrize("name", ["gpt2-lm", "bert-mlm", "t5"])
def test_stages_hold_what_the_whole_model_has(name: str) -> None:
    model, batch = TINY[name].build(device="meta")
    made = ipp.plan(model, batch, machine="a100-80g-x8", num_stages=2, vocabulary="even")
    spread, shares = with_shares(made)
    assert sorted(shares) == [0, 1]
    whole = {p.fqn: p.numel for p in made.graph.parameters}
    assert sum(p.numel for p in spread.graph.parameters) == sum(whole.values())
    assert all(stage.vocabulary_s > 0 for stage in made.stages)
    assert with_shares(replace(made, vocabulary=None))[1] == {}


def test_ranks_that_share_products_keep_whole_tables() -> None:
    model, batch = TINY["llama"].build(device="meta")
    run: dict[str, Any] = {
        "machine": "a100-80g-x4",
        "num_stages": 2,
        "replicas": 1,
        "settings": {"tp": 2},
    }
    assert ipp.plan(model, batch, vocabulary="auto", **run).vocabulary is None
    with pytest.raises(PartitionError, match=r"tensor parallelism \(tp 2\) cuts tables"):
        ipp.plan(model, batch, vocabulary="even", **run)
    with pytest.raises(
        PartitionError, match=r"the machine offers 2 \(a100-80g-x4, 2 GPUs for each"
    ):
        ipp.plan(model, batch, **{**run, "num_stages": 3})


def test_a_precision_that_the_devices_do_not_have() -> None:
    model, batch = TINY["llama"].build(device="meta")
    for precision in ("float8", "float4"):
        with pytest.raises(PlanError, match=rf"{precision}, in which .* use bfloat16, float16"):
            ipp.plan(model, batch, machine="a100-80g-x2", settings={"precision": precision})
