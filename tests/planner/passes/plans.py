"""A hand-written plan with two lookups, layers, a projection and the loss, in three stages."""

from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.ir.graph import TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedBlock, PlannedStage, PlannedTable

NAMES = ("enc.embed", "enc.layer.0", "enc.layer.1", "dec.embed", "dec.layer.0", "dec.layer.1",
         "head", "loss")  # fmt: skip
LOOKUP = PlannedTable("shared.weight", 50_000, 64, "lookup", large=True)
TABLES = {
    "enc.embed": LOOKUP,
    "dec.embed": LOOKUP,
    "enc.layer.1": PlannedTable("enc.layer.1.wide.weight", 4096, 1024, "projection", large=True),
    "dec.layer.0": PlannedTable("dec.layer.0.weight", 64, 64, "projection", large=False),
    "head": PlannedTable("head.weight", 50_000, 64, "projection", large=True),
}


def table_plan() -> Plan:
    blocks = tuple(
        PlannedBlock(
            name, "layer" if "layer" in name else "embedding" if "embed" in name else "head",
            80, 320, 1_500_000, 0.001, 0.002, 0 if name == "loss" else 4096, TABLES.get(name),
        )
        for name in NAMES
    )  # fmt: skip
    tensors = tuple(
        TensorSpec(f"t{i}", (4, 64), "float32", True, name, (NAMES[i + 1],))
        for i, name in enumerate(NAMES[:-1])
    )
    devices = tuple(Device(f"d{index}", 10**9, {"float32": 1e9}, 1e8) for index in range(3))
    stages = (NAMES[:3], NAMES[3:5], NAMES[5:])
    made = Plan(
        model=ModelIdentity("Seq", {"shared.weight": "50000x64 float32"}),
        machine=Machine("three", devices, Link(1e6, 1e-3)),
        stages=tuple(
            PlannedStage(index, names, (), {}, 0.001, 0.002, 0.0005, 5000, 3 - index)
            for index, names in enumerate(stages)
        ),
        blocks=blocks,
        tensors=tensors,
        inputs=(TensorSpec("ids", (4, 3), "int64"),),
        num_microbatches=4,
        objective_s=0.030,
        lower_bound_s=0.027,
    )
    return replace(made, decision_digest=made.digest())


def before_and_after(before: Plan, text: str, after: Plan) -> str:
    """What the golden files of passes hold."""
    return f"{before.explain()}\n\n{text}\n\n{after.explain()}\n"
