"""A tiny BERT, planned and compiled, and plain gradient accumulation to compare with."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.backends.local.executable import LocalExecutable
from tests.tiny_models import TINY


@cache
def planned(name: str, *, dropout: bool = False, **options: Any) -> ipp.Plan:
    """Return a plan for a tiny model and one microbatch of two samples."""
    return ipp.plan(*TINY[name].build(dropout=dropout), **options)


def compiled(
    *,
    num_stages: int = 2,
    microbatches: int = 4,
    learning_rate: float | None = 1e-3,
    dropout: bool = True,
    **options: Any,
) -> tuple[LocalExecutable, dict[str, Tensor]]:
    """Return an executable and a batch of ``2 * microbatches`` samples."""
    model, _ = TINY["bert-qa"].build(dropout=dropout)
    batch = TINY["bert-qa"].batch(batch_size=2 * microbatches, seed=3)
    # How losses weigh is measured at the first step, which takes longest: other files ask that.
    options = {"loss_weights": "samples", **options}
    plan = planned("bert-qa", dropout=dropout, num_stages=num_stages, microbatches=microbatches)
    optimizer = (
        None if learning_rate is None else torch.optim.AdamW(model.parameters(), lr=learning_rate)
    )
    executable = ipp.compile(model, plan, optimizer=optimizer, self_check=False, **options)
    assert isinstance(executable, LocalExecutable)
    return executable, batch


def eager_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of plain torch for the whole batch."""
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def assert_equals_eager(
    model: nn.Module, plan: ipp.Plan, batch: dict[str, Tensor], **options: Any
) -> None:
    """Compare loss and EVERY gradient of the plan's stages with plain torch."""
    expected_loss, expected = eager_gradients(model, batch)
    with ipp.compile(model, plan, self_check=False, **options) as executable:
        loss = executable.forward_backward(batch)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert set(found) == set(expected)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for fqn, gradient in expected.items():
        torch.testing.assert_close(found[fqn], gradient, rtol=0, atol=1e-6 * scale, msg=fqn)
