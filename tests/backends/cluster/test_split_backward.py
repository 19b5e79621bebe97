"""Stages whose backward pass torch cannot split are found before they are trusted."""

from __future__ import annotations

import pytest
import torch

from ipu_pipeline.backends.cluster.module import StageModule, StepInputs, crossings
from ipu_pipeline.backends.cluster.pipeline import can_split_backward
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.stages.batch import split_batch
from ipu_pipeline.stages.captures import StageCache
from tests.backends.cluster.jobs import built


def tried(name: str, *, recompute: bool = False) -> list[bool]:
    """Whether the backward pass of each of four stages can be split."""
    model, plan, batch = built(name, num_stages=4)
    parts = split_batch(batch, plan.num_microbatches)
    names = frozenset(plan.stage_of) if recompute else frozenset()
    cache = StageCache(model, plan, "float32", recompute=names, self_check=False)
    stages = cache.prepare(parts[:1])[0][0]
    crossing = crossings(stages)
    found = []
    for stage in stages:
        sent = (*crossing.names, (stages[-1].results["loss"],))[stage.index]
        module = StageModule(stage, crossing.into(stage.index), sent, StepInputs(parts))
        received = crossing.tensors(module.received, grad=True)
        found.append(can_split_backward(module, received))
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


@pytest.mark.parametrize("name", ["bert-qa", "gpt2-lm"])
def test_plain_stages_can_be_split(name: str) -> None:
    assert tried(name) == [True] * 4


def test_t5s_position_bias_cannot() -> None:
    assert False in tried("t5")


def test_recomputed_stages_are_not_tried() -> None:
    assert tried("bert-qa", recompute=True) == [True, False, False, False]


def test_values_for_later_stages_are_relayed() -> None:
    # Of given speed: another split may have nothing to relay.
    device = Device("cpu", 4 * 10**9, {"float32": 1e11}, 1e10)
    machine = Machine("given", (device,) * 4, Link(1e10), shared_memory=True)
    model, plan, batch = built("lxmert-qa", num_stages=4, machine=machine)
    part = split_batch(batch, plan.num_microbatches)[0]
    cache = StageCache(model, plan, "float32", recompute=frozenset(), self_check=False)
    stages = cache.prepare([part])[0][0]
    crossing = crossings(stages)
    relayed = set(crossing.names[0]) & set(crossing.names[1])
    assert relayed - set(stages[1].receives) or relayed - set(stages[1].sends)
    for described in crossing.tensors(crossing.names[0], grad=True):
        assert described.is_meta
        assert described.dtype == torch.float32
