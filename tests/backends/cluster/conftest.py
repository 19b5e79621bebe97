"""Plans for the tests of the cluster backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory) -> Path:
    """Two stages of a tiny BERT."""
    from tests.backends.cluster.jobs import built

    path = tmp_path_factory.mktemp("plans") / "plan.json"
    built("bert-qa", num_stages=2)[1].save(path)
    return path


@pytest.fixture
def make_plan():
    def make(num_stages: int, replicas: int = 1, schedule: str = "1f1b", microbatches: int = 8):
        device = Device("cpu", 10**9, {"float32": 1e9}, 1e9)
        names = [f"layer.{index}" for index in range(num_stages)]
        return Plan(
            ModelIdentity("Tiny", {}),
            Machine("local", (device,) * num_stages, Link(1e9)),
            tuple(PlannedStage(index, (name,)) for index, name in enumerate(names)),
            BlockGraph(
                "Tiny",
                tuple(Block(name, "layer") for name in names),
                inputs=(TensorSpec("input_ids", (2, 16), "int64"),),
            ),
            num_microbatches=microbatches,
            replicas=replicas,
            schedule=schedule,
        )

    return make
