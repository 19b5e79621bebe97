"""Which matrix is a block's table, and which head can be fused with the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.ir.graph import OpRecord
from ipu_pipeline.planner.options.cost_models import estimate
from ipu_pipeline.planner.options.tables import (
    fused_heads,
    looked_up,
    products_with,
    table_of,
    table_rows,
)
from tests.planner.options.table_graph import HIDDEN, TOKENS, VOCAB, machine, table_graph


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [([(30522, 768), (768,)], 30522), ([(768, 768)], 0), ([(4096, 1024)], 4096), ([(2, 768)], 0)],
)
def test_tables_are_tall(shapes: list[tuple[int, ...]], rows: int) -> None:
    assert table_rows(shapes) == rows


def test_the_table_is_what_is_looked_up_or_projected_on() -> None:
    graph = table_graph()
    lookup, head = table_of(graph, graph["wte"]), table_of(graph, graph["head"])
    assert lookup is not None
    assert head is not None
    assert (lookup.rows, lookup.width, lookup.use, lookup.is_large) == (
        VOCAB,
        HIDDEN,
        "lookup",
        True,
    )
    assert (head.parameter, head.use, head.num_bytes) == (
        "head.weight",
        "projection",
        VOCAB * HIDDEN * 4,
    )
    assert looked_up(graph["wte"], lookup) == TOKENS
    assert len(products_with(graph["head"].forward_ops, head)) == 1
    assert table_of(graph, graph["loss"]) is None
    layer = table_of(graph, graph["layer"])
    assert layer is not None
    assert not layer.is_large


def test_a_matrix_that_is_not_transposed_is_no_table() -> None:
    graph = table_graph()
    parameter = replace(graph.parameter_by_fqn["head.weight"], shape=(HIDDEN, VOCAB))
    others = tuple(p for p in graph.parameters if p.fqn != "head.weight")
    turned = replace(graph, parameters=(*others, parameter))
    assert table_of(turned, turned["head"]) is None


def test_of_equal_tables_the_trained_one_counts() -> None:
    graph = changed("head", parameters=("frozen", "head.weight"))
    frozen = replace(graph.parameter_by_fqn["head.weight"], fqn="frozen", trainable=False)
    table = table_of(replace(graph, parameters=(frozen, *graph.parameters)), graph["head"])
    assert table is not None
    assert table.parameter == "head.weight"


def test_head_and_loss_are_found() -> None:
    graph = table_graph()
    (pair,) = fused_heads(graph)
    assert (pair.head.name, pair.loss.name, pair.tokens) == ("head", "loss", TOKENS)


def changed(block: str, **fields: object):
    graph = table_graph()
    blocks = tuple(replace(b, **fields) if b.name == block else b for b in graph.blocks)
    return replace(graph, blocks=blocks)


def test_logits_may_be_copied_scaled_and_capped_but_nothing_else() -> None:
    head = table_graph()["head"]
    logits = ((TOKENS, VOCAB),)
    for name, kind, fits in (
        ("clone", "copy", True), ("mul", "vector", True), ("tanh", "vector", True),
        ("sigmoid", "vector", False), ("_softmax", "softmax", False),
    ):  # fmt: skip
        op = OpRecord(f"aten.{name}", kind, "float32", logits, 0, 100)  # type: ignore[arg-type]
        found = fused_heads(changed("head", forward_ops=(*head.forward_ops, op)))
        assert bool(found) == fits


def test_a_cap_keeps_logits_only_where_it_is_not_fused() -> None:
    cap = OpRecord("aten.tanh", "vector", "float32", ((TOKENS, VOCAB),), 0, 100)
    wide = 4 * TOKENS * VOCAB
    operations = (*table_graph()["head"].forward_ops, cap)
    graph = changed("head", forward_ops=operations, saved_bytes=wide + 100)
    (pair,) = fused_heads(graph)
    assert pair.saved_logits_bytes == wide
    plain, fused = (
        next(w for w in estimate(graph, machine()).blocks["head"].choices
             if (w.serialize_factor > 1) == cut and not w.recompute)
        for cut in (False, True)
    )  # fmt: skip
    assert (plain.stash_bytes, fused.stash_bytes) == (2 * wide + 104, 104)


def test_what_prevents_fusing() -> None:
    graph = table_graph()
    logits = graph.tensor_by_name["logits"]
    rest = tuple(t for t in graph.tensors if t.name != "logits")
    assert not fused_heads(replace(graph, results=("logits",)))
    assert not fused_heads(replace(graph, training=False))
    assert not fused_heads(changed("loss", kind="head", name="end"))
    assert not fused_heads(changed("loss", forward_ops=()))
    wide = replace(logits, shape=(VOCAB, TOKENS))
    assert not fused_heads(replace(graph, tensors=(*rest, wide)))
    shared = replace(logits, consumers=("layer", "loss"))
    assert not fused_heads(replace(graph, tensors=(*rest, shared)))
    outside = replace(logits, producer=None)
    assert not fused_heads(replace(graph, tensors=(*rest, outside)))
    assert not fused_heads(replace(graph, tensors=(*rest, replace(logits, producer="wte"))))


def test_a_small_table_counts_only_when_its_block_is_named() -> None:
    small = table_graph(vocab=100)
    assert not fused_heads(small)
    assert len(fused_heads(small, ("head",))) == 1
