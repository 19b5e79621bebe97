"""A hand-written plan with two lookups, layers, a projection and the loss, in three stages."""

from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord, ParameterSpec, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage

NAMES = ("enc.embed", "enc.layer.0", "enc.layer.1", "dec.embed", "dec.layer.0", "dec.layer.1",
         "head", "loss")  # fmt: skip
WIDTH = 64
TABLES = {
    "enc.embed": ("shared.weight", 50_000, WIDTH, "gather"),
    "dec.embed": ("shared.weight", 50_000, WIDTH, "gather"),
    "enc.layer.1": ("enc.layer.1.wide.weight", 4096, 1024, "matmul"),
    "dec.layer.0": ("dec.layer.0.weight", 64, 64, "matmul"),
    "head": ("head.weight", 50_000, WIDTH, "matmul"),
}


def _block(index: int, name: str) -> Block:
    table, ops, parameters = TABLES.get(name), (), ()
    if table is not None:
        fqn, rows, width, kind = table
        shapes = ((rows, width), (4, 3)) if kind == "gather" else ((4, width), (width, rows))
        named = "aten.embedding" if kind == "gather" else "aten.mm"
        ops = (OpRecord(named, kind, "float32", shapes, 2 * 4 * width * rows, 8 * rows),)
        parameters = (fqn,)
    return Block(
        name,
        "layer" if "layer" in name else "embedding" if "embed" in name else "head",
        name,
        parameters,
        (f"t{index - 1}",) if index else (),
        (f"t{index}",),
        ops,
        ops,
        0 if name == "loss" else 4096,
    )


def table_graph() -> BlockGraph:
    tensors = tuple(
        TensorSpec(f"t{i}", (4, WIDTH), "float32", True, name, NAMES[i + 1 : i + 2])
        for i, name in enumerate(NAMES)
    )
    users: dict[str, list[str]] = {}
    for name, (fqn, *_) in TABLES.items():
        users.setdefault(fqn, []).append(name)
    shapes = {fqn: (rows, width) for fqn, rows, width, _ in TABLES.values()}
    return BlockGraph(
        "Seq",
        tuple(_block(index, name) for index, name in enumerate(NAMES)),
        tensors,
        (TensorSpec("ids", (4, 3), "int64"),),
        tuple(
            ParameterSpec(fqn, shapes[fqn], "float32", blocks=tuple(names))
            for fqn, names in users.items()
        ),
        ("t7",),
    )


def table_plan() -> Plan:
    devices = tuple(Device(f"d{index}", 10**9, {"float32": 1e9}, 1e8) for index in range(3))
    stages = (NAMES[:3], NAMES[3:5], NAMES[5:])
    made = Plan(
        model=ModelIdentity("Seq", {"shared.weight": "50000x64 float32"}),
        machine=Machine("three", devices, Link(1e6, 1e-3)),
        stages=tuple(
            PlannedStage(index, names, (), {}, 0.001, 0.002, 0.0005, 5000, 3 - index)
            for index, names in enumerate(stages)
        ),
        graph=table_graph(),
        num_microbatches=4,
        objective_s=0.030,
        lower_bound_s=0.027,
    )
    return replace(made, decision_digest=made.digest())


def before_and_after(before: Plan, text: str, after: Plan) -> str:
    """What the golden files of passes hold."""
    return f"{before.explain()}\n\n{text}\n\n{after.explain()}\n"
