"""What contestants are made from: the model, its optimizer and batches."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks.suite.workloads import Workload
from ipu_pipeline.capture.from_config import from_config

Batch = Mapping[str, Tensor]
# All contestants have it: the strongest that torch has on a CPU.
adamw = partial(torch.optim.AdamW, lr=1e-5, fused=True)


@dataclass(frozen=True)
class Material:
    """What contestants are made from.

    Attributes:
        workload: What is trained.
        precision: ``float32`` or ``bf16``.
        model: Eager and our local target share one.
        example: One microbatch.
    """

    workload: Workload
    precision: str
    model: nn.Module
    example: Batch

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """One for all that share the model."""
        return adamw(self.model.parameters())

    @property
    def dtype(self) -> torch.dtype | None:
        """That of autocast."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context to compute a forward pass in."""
        return torch.autocast("cpu", self.dtype, enabled=self.dtype is not None)

    def microbatches(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Cut a batch."""
        size = self.workload.micro_batch
        count = len(next(iter(batch.values()))) // size
        return [{n: v[i * size : (i + 1) * size] for n, v in batch.items()} for i in range(count)]


def make_material(workload: Workload, precision: str) -> Material:
    """Build a model with the same weights every time, and one microbatch."""
    model, example = _build(workload, workload.micro_batch)
    return Material(workload, precision, model, example)


def make_batch(workload: Workload, microbatches: int) -> Batch:
    """Return the same batch every time; a smaller one is not a part of a larger one."""
    return _build(workload, workload.micro_batch * microbatches)[1]


def _build(workload: Workload, samples: int) -> tuple[nn.Module, dict[str, Tensor]]:
    config = AutoConfig.for_model(workload.model, **workload.config)
    return from_config(
        config, workload.task, batch_size=samples, seq_length=workload.sequence, device="cpu"
    )
