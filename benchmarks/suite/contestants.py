"""The ways to train that are compared; each one steps the same model and batch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ipu_pipeline as ipp
from benchmarks.processes import everyones, from_first
from benchmarks.raw_pipeline import Raw
from benchmarks.suite.material import Batch, Material, adamw, make_material
from benchmarks.suite.workloads import MANY_PROCESSES, Contestant, Workload
from ipu_pipeline.planner.backend import find_machine
from ipu_pipeline.stages.training import in_evaluation

COMPILERS = ("c++", "g++", "clang++")
# Contestants wait while the others step; the watch of our target must not take that for a fault.
IDLE_S = 24 * 3600.0


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


class Eager:
    """transformers with gradient accumulation."""

    def __init__(self, material: Material, forward: nn.Module | None = None) -> None:
        self._material = material
        self._model = material.model
        self._forward = material.model if forward is None else forward
        self._optimizer = material.optimizer

    def loss(self, batch: Batch) -> float:
        """Return the loss without dropout."""
        with in_evaluation(self._model), torch.no_grad(), self._material.autocast():
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
                machine=find_machine("local", contestant.stages * contestant.replicas),
                num_stages=contestant.stages,
                microbatches=material.workload.microbatches // contestant.replicas,
                replicas=contestant.replicas,
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
        with in_evaluation(model), torch.no_grad(), self._material.autocast():
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
        with in_evaluation(self._raw.modules):
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
        # Apart, so that nothing our capture does to modules can make torch compile them again.
        own = make_material(workload, precision)
        return Eager(own, torch.compile(own.model))
    if contestant.kind == "ddp":
        return Parallel(material)
    if contestant.kind == "raw":
        return RawPipeline(material, contestant)
    return Ours(material, contestant)
