"""``plan`` captures a model once for the executable that follows it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.capture import captured as module
from ipu_pipeline.ir.machine import Device, Link, Machine
from tests.tiny_models import TINY

MACHINE = Machine("m", (Device("d", 10**9, {"float32": 1e9}, 1e9),) * 2, Link(1e9))


def planned(**options: Any) -> tuple[nn.Module, dict[str, Tensor], Any]:
    model, batch = TINY["bert-qa"].build()
    return model, batch, ipp.plan(model, batch, machine=MACHINE, num_stages=2, microbatches=2)


def trained(model: nn.Module, plan: Any, batch: dict[str, Tensor], **options: Any) -> int:
    """Return how often one step captured."""
    whole = {name: torch.cat([value, value]) for name, value in batch.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with mock.patch.object(module, "trace", side_effect=module.trace) as traced:
        executable = ipp.compile(model, plan, optimizer=optimizer, **options)
        executable.train_step(whole)
        executable.close()
    return traced.call_count


def test_one_capture_for_the_plan_and_the_first_executable() -> None:
    model, batch, plan = planned()
    assert trained(model, plan, batch) == 0
    assert trained(model, plan, batch) == 1  # programs are not shared between executables


def replace_parameter(model: nn.Module) -> None:
    model.qa_outputs.weight = nn.Parameter(model.qa_outputs.weight.detach().clone())


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "parameter": replace_parameter,
    "hook": lambda model: model.bert.register_forward_hook(lambda *_: None),
    "attribute": lambda model: setattr(model.bert.encoder, "kind", "other"),
    "config": lambda model: setattr(model.config, "layer_norm_eps", 1e-6),
    "frozen": lambda model: model.qa_outputs.requires_grad_(False),
    "module": lambda model: setattr(model.bert.encoder.layer[0].output, "dropout", nn.Dropout(0.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_again(change: str) -> None:
    model, batch, plan = planned()
    CHANGES[change](model)
    assert trained(model, plan, batch) == 1


def test_another_shape_or_precision_is_captured_again() -> None:
    model, batch, plan = planned()
    longer = {n: v[:, :8] if v.ndim > 1 else v.clamp(max=7) for n, v in batch.items()}
    assert trained(model, plan, longer) == 1
    model, batch, plan = planned()
    assert trained(model, plan, batch, precision="bf16") == 1


def test_a_kept_capture_goes_with_its_model() -> None:
    model, _, plan = planned()
    weight = weakref.ref(model.qa_outputs.weight)
    assert plan is not None
    del model
    gc.collect()  # the model
    gc.collect()  # what was kept for it
    assert weight() is None
