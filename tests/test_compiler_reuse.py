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
from tests.later import now
from tests.tiny_models import TINY

MACHINE = Machine("m", (Device("d", 10**9, {"float32": 1e9}, 1e9),) * 2, Link(1e9))


def planned(**options: Any) -> tuple[nn.Module, dict[str, Tensor], Any]:
    model, batch = TINY["bert-qa"].build()
    return model, batch, ipp.plan(model, batch, machine=MACHINE, num_stages=2, microbatches=2)


def trained(model: nn.Module, plan: Any, batch: dict[str, Tensor], **options: Any) -> int:
    """Return how often one step captured; weights that are given need no measurement."""
    whole = {name: torch.cat([value, value]) for name, value in batch.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with mock.patch.object(module, "trace_once", side_effect=module.trace_once) as traced:
        executable = ipp.compile(
            model, plan, optimizer=optimizer, loss_weights="samples", **options
        )
        executable.train_step(whole)
        executable.close()
    return traced.call_count


def test_one_capture_for_the_plan_and_the_first_executable() -> None:
    model, batch, plan = planned()
    assert trained(model, plan, batch) == 0
    assert trained(model, plan, batch) == 1  # programs are not shared between executables


def replace_parameter(model: nn.Module) -> None:
    model.qa_outputs.weight = nn.Parameter(model.qa_outputs.weight.detach().clone())


def replace_layer(model: nn.Module) -> None:
    torch.manual_seed(5)
    layers = model.bert.encoder.layer
    layers[0] = type(layers[0])(model.config)


# Whether another capture is needed, or the kept one computes the changed model's loss.
CHANGES: dict[str, tuple[Callable[[nn.Module], Any], int]] = {
    "parameter": (replace_parameter, 0),
    "hook": (lambda model: model.bert.register_forward_hook(lambda *_: None), 0),
    "attribute": (lambda model: setattr(model.bert.encoder, "kind", "other"), 0),
    "frozen": (lambda model: model.qa_outputs.requires_grad_(False), 1),
    "dropout": (
        lambda model: setattr(model.bert.encoder.layer[0].output, "dropout", nn.Dropout(0.0)),
        0,
    ),
    "layer": (replace_layer, 1),
}


@pytest.mark.parametrize("change", now(("parameter", "hook", "frozen", "layer"), CHANGES))
def test_a_changed_model_is_computed_as_it_is_now(change: str) -> None:
    model, batch, plan = planned()
    how, captures = CHANGES[change]
    how(model)
    assert trained(model, plan, batch) == captures
    model, batch, plan = planned()
    how(model)
    whole = {name: torch.cat([value, value]) for name, value in batch.items()}
    with ipp.compile(model, plan) as executable:
        assert executable.forward_backward(whole) == pytest.approx(model(**whole).loss.item())


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
