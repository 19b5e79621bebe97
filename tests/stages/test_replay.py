"""A block that is computed again starts from what its first pass started from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.capture.captured import capture
from ipu_pipeline.stages.block_runs import ReplayedBlock
from tests.stages.models import MICROBATCHES, built, serialized
from tests.stateful import PROGRAMS, assert_alike, batch, planned, trained, trained_plainly


def passes_of(name: str) -> tuple[Any, ReplayedBlock, Any]:
    model = PROGRAMS[name]()
    program = capture(model, batch(samples=2), self_check=False).programs[0]
    return model.layers[0], ReplayedBlock(program), program.module


@pytest.mark.parametrize("name", ["Scaled", "Replacing", "BatchNorm", "SpectralNorm"])
def test_a_replay_gives_the_first_result_and_leaves_the_newest_state(name: str) -> None:
    layer, block, module = passes_of(name)
    inputs = [batch(seed)["x"] for seed in range(3)]
    with torch.no_grad():
        calls = [block.passes(module) for _ in inputs]
        first = [call(x) for call, x in zip(calls, inputs, strict=True)]
        newest = {n: t.clone() for n, t in layer.named_buffers()}, layer.calls, list(layer.seen)
        again = [call(x) for call, x in reversed(list(zip(calls, inputs, strict=True)))]
    for one, other in zip(first, reversed(again), strict=True):
        assert torch.equal(one[0], other[0])
    assert all(torch.equal(t, newest[0][n]) for n, t in layer.named_buffers())
    assert (layer.calls, layer.seen) == newest[1:]


def test_tensors_that_nobody_changes_are_copied_once() -> None:
    layer, block, module = passes_of("Seldom")
    copies = []
    for _ in range(4):
        block.passes(module)(batch()["x"])
        copies += [copy for tensor, _, copy in block._copies.values() if tensor is layer.kept]
    assert len(copies) == 3  # at the third pass it was changed, and is saved by every pass since
    assert copies[0] is copies[1] is copies[2]


def test_the_plans_own_choice_of_recomputation() -> None:
    model = PROGRAMS["BatchNorm"]()
    plan = planned(model, 2)
    chosen = replace(plan.stages[0], recompute=plan.stages[0].blocks)
    plan = replace(plan, stages=(chosen, *plan.stages[1:]))
    assert_alike(trained(model, plan), trained_plainly(PROGRAMS["BatchNorm"]()))


@pytest.mark.filterwarnings("ignore:the C.. kernels are not used")
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_serialized_blocks_count_once(recompute: str) -> None:
    model, example, whole, blocks = built("gpt2 (tied)")
    for block in (model.transformer.wte, model.transformer.h[1]):
        block.register_buffer("calls", torch.zeros(()), persistent=False)
        block.register_forward_hook(lambda module, *_: module.calls.add_(1) and None)
    plan = ipp.plan(model, example, num_stages=2, microbatches=MICROBATCHES)
    plan = serialized(plan, dict.fromkeys(blocks, 5))
    with ipp.compile(model, plan, recompute=recompute, self_check=False) as executable:
        executable.forward_backward(whole)
    assert model.transformer.wte.calls == model.transformer.h[1].calls == MICROBATCHES
