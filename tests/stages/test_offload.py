"""Activations that wait in host memory: the same bits, the weights stay, CPUs refuse it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import ipu_pipeline as ipp
from ipu_pipeline.backends.local import executable
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import plan_from_json
from ipu_pipeline.planner.passes.manager import PassManager
from ipu_pipeline.stages import block_runs
from ipu_pipeline.stages.block_runs import offloaded_blocks
from tests.tiny_models import TINY


def gradients(model: Any, plan: ipp.Plan, batch: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    with ipp.compile(model, plan, self_check=False, **options) as made:
        made.forward_backward(batch)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_what_waits_elsewhere_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = TINY["bert-qa"].build(dropout=True)
    plan = ipp.plan(model, example, num_stages=2, microbatches=2)
    batch = TINY["bert-qa"].batch(batch_size=4, seed=3)
    expected = gradients(model, plan, batch)
    # On a CPU host memory is where everything is: let copies of it be elsewhere.
    monkeypatch.setattr(
        executable,
        "offloaded_blocks",
        lambda wish, plan, _: offloaded_blocks(wish, plan, torch.device("cuda")),
    )
    monkeypatch.setattr(block_runs, "_is_on_host", lambda tensor: False)
    hooks, kept = torch.autograd.graph.saved_tensors_hooks, [0, 0]

    def noted(pack: Any, unpack: Any) -> Any:
        def counted(tensor: Tensor) -> Any:
            packed = pack(tensor)
            kept[isinstance(packed, tuple)] += tensor.numel()
            return packed

        return hooks(counted, unpack)

    sums = []
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", noted)
    for recompute in ("none", "all"):
        kept[:] = [0, 0]
        found = gradients(model, plan, batch, recompute=recompute, offload_activations="all")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        sums.append(list(kept))
    offloads = PassManager.parse("offload{blocks=[bert.encoder.layer.1]}").run(plan)
    assert "offloaded: bert.encoder.layer.1 (stage" in offloads.explain()
    assert offloads.digest() != plan.digest()
    again = plan_from_json(json.loads(json.dumps(offloads.to_json())), "the plan")
    assert again == offloads
    kept[:] = [0, 0]
    found = gradients(model, again, batch, recompute="none")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert 0 < kept[1] < sums[0][1] / 2  # one of the blocks
    assert sums[0][0] > 0  # weights stayed
    assert 0 < sums[1][1] < sums[0][1] / 2  # of a recomputed block only its inputs wait


def test_it_is_for_accelerators_and_names_blocks() -> None:
    model, example = TINY["bert-qa"].build()
    plan = ipp.plan(model, example, num_stages=2, microbatches=2)
    with pytest.raises(LoweringError, match="to host memory, and on a CPU it is there; leave it"):
        ipp.compile(model, plan, offload_activations=["bert.encoder.layer.0"])
    with ipp.compile(model, plan, offload_activations="none"):
        pass
    plan = PassManager.parse("offload{blocks=all}").run(plan)
    with pytest.raises(
        LoweringError, match=r"leave it out \(also of the plan: 'offload{blocks=none"
    ):
        ipp.compile(model, plan)
    with ipp.compile(model, plan, offload_activations="none"):
        pass
    with pytest.raises(ValueError, match="offload_activations 'some' is unknown"):
        ipp.ExecutionOptions(offload_activations="some")
