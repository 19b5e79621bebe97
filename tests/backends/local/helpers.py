"""A tiny BERT for question answering, planned and compiled, for tests of the local target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ipu_pipeline as ipp
from ipu_pipeline.backends.local.executable import LocalExecutable
from tests.tiny_models import TINY


def compiled(
    *,
    num_stages: int = 2,
    microbatches: int = 4,
    learning_rate: float | None = 1e-3,
    dropout: bool = True,
    **options: Any,
) -> tuple[LocalExecutable, dict[str, Tensor]]:
    """Return an executable and a batch of ``2 * microbatches`` samples."""
    model, example = TINY["bert-qa"].build(dropout=dropout)
    _, batch = TINY["bert-qa"].build(batch_size=2 * microbatches, seed=3)
    plan = ipp.plan(model, example, num_stages=num_stages, microbatches=microbatches)
    optimizer = (
        None if learning_rate is None else torch.optim.AdamW(model.parameters(), lr=learning_rate)
    )
    executable = ipp.compile(model, plan, optimizer=optimizer, self_check=False, **options)
    assert isinstance(executable, LocalExecutable)
    return executable, batch
