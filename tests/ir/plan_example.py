"""A hand-written graph and plan of three blocks, small enough to read."""

from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord, ParameterSpec, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage

BLOCKS = ("embed", "layer.0", "layer.1", "head")


def example_machine(num_devices: int = 2) -> Machine:
    devices = tuple(
        Device(f"d{index}", 10**9, {"float32": 1e9, "float16": 4e9}, 1e8)
        for index in range(num_devices)
    )
    return Machine("toy", devices, Link(1e6, 1e-3))


def example_graph(*, training: bool = True) -> BlockGraph:
    matmul = OpRecord("aten.mm", "matmul", "float32", ((4, 8), (8, 8)), 512, 384, count=2)
    return BlockGraph(
        model_class="Toy",
        blocks=(
            Block("embed", "embedding", "embed", ("embed.weight",), (), ("e",)),
            Block(
                "layer.0", "layer", "layer.0", ("layer.0.weight",), ("e",), ("h0",),
                forward_ops=(matmul,), backward_ops=(replace(matmul, count=4),), saved_bytes=4096,
                workspace_bytes=128,
            ),
            Block("layer.1", "layer", "layer.1", ("layer.1.weight",), ("h0",), ("h1",)),
            Block("head", "head", None, ("embed.weight",), ("h1", "e"), ("loss_value",)),
        ),
        tensors=(
            TensorSpec("e", (4, 8), "float32", True, "embed", ("layer.0", "head")),
            TensorSpec("h0", (4, 8), "float32", True, "layer.0", ("layer.1",)),
            TensorSpec("h1", (4, 8), "bfloat16", True, "layer.1", ("head",)),
            TensorSpec("loss_value", (), "float32", True, "head"),
        ),
        inputs=(TensorSpec("ids", (4, 3), "int64"),),
        parameters=(
            ParameterSpec("embed.weight", (10, 8), "float32", True, ("head.weight",),
                          ("embed", "head")),
            ParameterSpec("layer.0.weight", (8, 8), "float32", False, (), ("layer.0",)),
            ParameterSpec("layer.1.weight", (8, 8), "float16", True, (), ("layer.1",)),
        ),
        results=("loss_value",),
        training=training,
    )  # fmt: skip


def example_plan() -> Plan:
    graph = example_graph()
    made = Plan(
        model=ModelIdentity(
            "Toy", {"embed.weight": "10x8 float32", "layer.0.weight": "8x8 float32"}
        ),
        machine=example_machine(),
        stages=(
            PlannedStage(0, ("embed", "layer.0"), ("layer.0",), {}, 0.001, 0.002, 0.0005, 5000, 2),
            PlannedStage(1, ("layer.1", "head"), (), {}, 0.002, 0.003, 0.0, 7000, 1),
        ),
        graph=graph,
        num_microbatches=4,
        objective_s=0.030,
        lower_bound_s=0.027,
        binding="the second stage",
    )  # fmt: skip
    return replace(made, decision_digest=made.digest())
