"""Recomputation changes no loss and no gradient: the same random numbers are drawn again."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import ipu_pipeline as ipp
from tests.later import now
from tests.stages.models import MICROBATCHES, built, gradients, serialized

pytestmark = pytest.mark.filterwarnings("ignore:the C.. kernels are not used")


class Calls:
    """Counts the forward passes of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize(
    ("name", "granularity", "factor"),
    now(
        [("gpt2 (tied)", "layer", 5), ("t5 (tied)", "sublayer", 1)],
        product(("gpt2 (tied)", "t5 (tied)"), ("layer", "sublayer"), (1, 5)),
    ),
)
def test_losses_and_gradients_with_dropout_stay_the_same(
    name: str, granularity: Any, factor: int
) -> None:
    model, example, batch, blocks = built(name, dropout=True)
    plan = ipp.plan(
        model, example, num_stages=2, microbatches=MICROBATCHES, granularity=granularity
    )
    plan = serialized(plan, dict.fromkeys(blocks, factor))
    runs = []
    for recompute in ("none", "all", ["*.1*"]):
        with ipp.compile(model, plan, recompute=recompute, self_check=False) as executable:
            runs.append((executable.forward_backward(batch), gradients(model)))
    reference_loss, reference = runs[0]
    for loss, found in runs[1:]:
        assert loss == reference_loss
        assert found.keys() == reference.keys()
        for fqn, gradient in reference.items():
            if factor == 1:
                assert torch.equal(found[fqn], gradient), fqn
            else:  # a fused loss adds up its gradients in another order
                torch.testing.assert_close(found[fqn], gradient, rtol=1e-5, atol=1e-7, msg=fqn)


def test_exactly_the_named_blocks_run_twice() -> None:
    model, example, batch, _ = built("gpt2 (tied)")
    plan = ipp.plan(model, example, num_stages=2, microbatches=MICROBATCHES)
    layers = [model.get_submodule(f"transformer.h.{index}") for index in range(4)]
    with ipp.compile(model, plan, recompute=["transformer.h.2"], self_check=False) as executable:
        executable.forward_backward(batch)
        calls = [Calls(layer) for layer in layers]
        executable.forward_backward(batch)
    assert [c.count for c in calls] == [MICROBATCHES, MICROBATCHES, 2 * MICROBATCHES, MICROBATCHES]


def test_recomputation_keeps_less() -> None:
    saved = []
    model, example, batch, _ = built("gpt2 (tied)")
    plan = ipp.plan(model, example, num_stages=1, microbatches=1)
    for recompute in ("none", "all"):
        packed = []
        with ipp.compile(model, plan, recompute=recompute, self_check=False) as executable:
            executable.forward_backward(batch)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, packed=packed: packed.append(t.numel()) or t, lambda t: t
            ):
                executable.forward_backward(batch)
        saved.append(sum(packed))
    assert saved[1] < saved[0]
