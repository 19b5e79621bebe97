from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.graph import BlockGraph, ParameterSpec, TensorSpec, tensor_bytes
from tests.ir.plan_example import example_graph


def test_json_holds_the_whole_graph() -> None:
    graph = example_graph()
    assert BlockGraph.from_json(json.loads(json.dumps(graph.to_json())), "file") == graph


def test_edges_name_producer_consumer_and_tensor() -> None:
    found = [(source, sink, spec.name) for source, sink, spec in example_graph().edges()]
    assert found == [
        ("embed", "layer.0", "e"),
        ("embed", "head", "e"),
        ("layer.0", "layer.1", "h0"),
        ("layer.1", "head", "h1"),
    ]


def test_tied_groups_are_blocks_in_execution_order_without_repeats() -> None:
    graph = example_graph()
    second = ParameterSpec("other", (2,), "float32", blocks=("layer.0", "layer.1"))
    same = ParameterSpec("bias", (2,), "float32", blocks=("embed", "head"))
    tied = replace(graph, parameters=(second, *graph.parameters, same))
    assert tied.tied_groups == (("embed", "head"), ("layer.0", "layer.1"))


def test_bytes_and_flops_add_up() -> None:
    graph = example_graph()
    layer = graph["layer.0"]
    assert (layer.forward_flops, layer.backward_flops) == (1024, 2048)
    assert graph.parameter_bytes(graph["embed"]) == 320
    assert graph.tensor_by_name["h1"].num_bytes == 64
    assert graph.micro_batch_size == 4
    assert replace(graph, inputs=()).micro_batch_size == 0
    assert replace(graph, inputs=(TensorSpec("t", (), "float32"),)).micro_batch_size == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [((2, 3), "float32", 24), ((), "int64", 8), ((5,), "bool", 5), ((0, 4), "float16", 0)],
)
def test_tensor_bytes(shape: tuple[int, ...], dtype: str, expected: int) -> None:
    assert tensor_bytes(shape, dtype) == expected


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'float5'; known: bfloat16, bool"):
        tensor_bytes((2,), "float5")


def test_unknown_block_names_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no block 'layer.7'; blocks: embed, layer.0"):
        example_graph()["layer.7"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "expected an object with fields, got list"),
        ({}, "blocks and operations do not match: 'blocks'"),
        ({"blocks": []}, "missing field 'model_class'"),
    ],
)
def test_other_data_is_refused(raw: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        BlockGraph.from_json(raw, "file")


def test_operations_are_not_counted_from_the_end() -> None:
    raw = example_graph().to_json()
    raw["blocks"][0]["forward_ops"] = -1
    with pytest.raises(PlanError, match="do not match: -1 is no position in operations"):
        BlockGraph.from_json(raw, "file")


def test_an_unknown_field_is_refused() -> None:
    raw = example_graph().to_json()
    raw["blocks"][0]["colour"] = "red"
    with pytest.raises(PlanError, match="colour"):
        BlockGraph.from_json(raw, "file")
