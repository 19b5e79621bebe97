"""The ways to train that are compared; each one steps the same model and batch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from statistics import fmean
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig

import ipu_pipeline as ipp
from benchmarks.distributed_overhead import Raw
from benchmarks.processes import everyones, from_first
from benchmarks.suite.workloads import MANY_PROCESSES, Contestant, Workload
from ipu_pipeline.capture.from_config import from_config

Batch = Mapping[str, Tensor]
COMPILERS = ("c++", "g++", "clang++")
# Contestants wait while the others step; the watch of our target must not take that for a fault.
IDLE_S = 24 * 3600.0
# All contestants have it: the strongest that torch has on a CPU.
adamw = partial(torch.optim.AdamW, lr=1e-5, fused=True)


class UnavailableError(Exception):
    """A contestant cannot run on this machine; says why."""


class Trained(Protocol):
    """A model that a contestant trains. Batches hold whole microbatches."""

    def loss(self, batch: Batch) -> float:
        """Return the loss without dropout; nothing is trained."""
        ...

    def step(self, batch: Batch) -> object:
        """Run one optimizer step."""
        ...


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


class Eager:
    """transformers with gradient accumulation."""

    def __init__(self, material: Material, forward: nn.Module | None = None) -> None:
        self._material = material
        self._model = material.model
        self._forward = material.model if forward is None else forward
        self._optimizer = material.optimizer

    def loss(self, batch: Batch) -> float:
        """Return the loss without dropout."""
        with _evaluating(self._model), torch.no_grad(), self._material.autocast():
            return fmean(
                float(self._forward(**part).loss) for part in self._material.microbatches(batch)
            )

    def step(self, batch: Batch) -> None:
        """Run one optimizer step."""
        parts = self._material.microbatches(batch)
        for part in parts:
            with self._material.autocast():
                loss = self._forward(**part).loss / len(parts)
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class Ours:
    """Our local or distributed target."""

    def __init__(self, material: Material, contestant: Contestant) -> None:
        def plan() -> Any:
            return ipp.plan(
                material.model,
                material.example,
                num_stages=contestant.stages,
                microbatches=material.workload.microbatches,
            )

        many = contestant.kind == "distributed"
        self._executable = ipp.compile(
            material.model,
            from_first(plan) if many else plan(),
            target=contestant.kind,
            optimizer=material.optimizer,
            precision=material.precision,
            schedule=contestant.schedule,
            self_check=False,
            stall_timeout_s=IDLE_S,
        )

    def loss(self, batch: Batch) -> float:
        """Return the loss without dropout."""
        loss = self._executable.eval_step(batch).loss
        assert loss is not None
        return loss

    def step(self, batch: Batch) -> None:
        """Run one optimizer step."""
        self._executable.train_step(batch)


class Parallel:
    """DistributedDataParallel: every process has the whole model and a share of the batch."""

    def __init__(self, material: Material) -> None:
        self._material = material
        self._model = DistributedDataParallel(material.model, gradient_as_bucket_view=True)
        self._optimizer = adamw(self._model.parameters())

    def _own(self, batch: Batch) -> list[dict[str, Tensor]]:
        return self._material.microbatches(batch)[dist.get_rank() :: dist.get_world_size()]

    def loss(self, batch: Batch) -> float:
        """Return the loss without dropout."""
        model = self._model.module
        with _evaluating(model), torch.no_grad(), self._material.autocast():
            return fmean(everyones(fmean(float(model(**p).loss) for p in self._own(batch))))

    def step(self, batch: Batch) -> None:
        """Run one optimizer step; gradients are exchanged in the last backward pass."""
        *others, last = self._own(batch)
        share = 1 / (len(others) + 1)
        with self._model.no_sync():
            for part in others:
                self._backward(part, share)
        self._backward(last, share)
        self._optimizer.step()
        # Zeroed in place: they are views of what is exchanged.
        self._optimizer.zero_grad(set_to_none=False)

    def _backward(self, part: Batch, share: float) -> None:
        with self._material.autocast():
            loss = self._model(**part).loss * share
        loss.backward()


class RawPipeline:
    """torch.distributed.pipelining over an even split of a BERT."""

    def __init__(self, material: Material, contestant: Contestant) -> None:
        model: Any = material.model
        if not hasattr(model, "bert"):
            raise UnavailableError(
                f"stages by hand are written for BERT, not {type(model).__name__}"
            )
        layers = [f"bert.encoder.layer.{i}" for i in range(len(model.bert.encoder.layer))]
        stages = even_split(layers, contestant.stages)
        stages[0].insert(0, "bert.embeddings")
        stages[-1].append("qa_outputs")
        self._micro_batch = material.workload.micro_batch
        self._raw = Raw(model, stages, contestant.schedule or "1f1b", adamw, material.dtype)

    def _count(self, batch: Batch) -> int:
        return len(batch["input_ids"]) // self._micro_batch

    def loss(self, batch: Batch) -> float:
        """Return the loss without dropout."""
        with _evaluating(self._raw.modules):
            found = self._raw.forward_backward(dict(batch), self._count(batch))
        self._raw.modules.zero_grad(set_to_none=True)
        return sum(everyones(found))

    def step(self, batch: Batch) -> None:
        """Run one optimizer step."""
        self._raw.step(dict(batch), self._count(batch))


def even_split(names: Sequence[str], parts: int) -> list[list[str]]:
    """Cut names into consecutive parts whose lengths differ by at most 1."""
    ends = [round(len(names) * part / parts) for part in range(parts + 1)]
    return [list(names[a:b]) for a, b in pairwise(ends)]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def make(contestant: Contestant, workload: Workload, precision: str, shared: Material) -> Trained:
    """Make a contestant in this process; of those with several, every process calls this.

    Raises:
        UnavailableError: It cannot run here.
    """
    several = contestant.kind in MANY_PROCESSES
    material = make_material(workload, precision) if several else shared
    if contestant.kind == "eager":
        return Eager(material)
    if contestant.kind == "compiled":
        if not any(map(shutil.which, COMPILERS)):
            raise UnavailableError(f"torch.compile needs a C++ compiler: {', '.join(COMPILERS)}")
        # What our capture does to modules and takes back still makes torch compile them again.
        own = make_material(workload, precision)
        return Eager(own, torch.compile(own.model))
    if contestant.kind == "ddp":
        return Parallel(material)
    if contestant.kind == "raw":
        return RawPipeline(material, contestant)
    return Ours(material, contestant)
