"""Batches of every size: which microbatches a replica runs, in which runs of torch's schedule.

A batch is cut as the local target cuts it: full microbatches, and perhaps a short last one. Torch
fixes the shapes of a run, so the short one is a run of its own. Losses are weighted alike,
random numbers are keyed by the position in the batch: both targets compute the same thing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import schedule_for
from ipu_pipeline.backends.cluster.module import Crossings, StageModule, StepInputs, crossings
from ipu_pipeline.backends.cluster.pipeline import TrainingPipeline
from ipu_pipeline.backends.cluster.ranks.rendezvous import gather_over
from ipu_pipeline.capture.batch_axes import Axes
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.executable import EvalResult, join
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.variants import LRUCache

# One shape has a pipeline per number of microbatches; each keeps the buffers of its messages.
MAX_PIPELINES = 16
# Shape and dtype of outputs, by name.
_Described = dict[str, tuple[list[int], str]]
logger = logging.getLogger(__name__)


class Pipelines:
    """The pipelines of this process, made on demand for a shape and a number of microbatches.

    ``schedule`` names that of whole batches; ``limit`` pipelines are kept.
    """

    def __init__(self, schedule: str, groups: Groups, limit: int = MAX_PIPELINES) -> None:
        self._schedule = schedule
        self._groups = groups
        # The key's stages are kept with the pipeline, so that their id stays theirs.
        self._made = LRUCache[tuple[int, int], tuple[Sequence[Stage], TrainingPipeline]](limit)
        self._said = False

    def __len__(self) -> int:
        return len(self._made)

    def run(
        self,
        pairs: Sequence[tuple[Microbatch, Sequence[Stage]]],
        inputs: StepInputs,
        loss_scaling: float,
    ) -> dict[int, float]:
        """Run the forward and backward passes of this replica's microbatches.

        Args:
            pairs: Each with its stages.
            inputs: Seed, step and precision.
            loss_scaling: Factor of the loss before the backward pass.

        Returns:
            On the rank of the loss, that of every microbatch of this replica, by its index.
        """
        losses: dict[int, float] = {}
        for _, found in groupby(pairs, lambda pair: id(pair[1])):
            run_parts, run_stages = zip(*found, strict=True)
            run = replace(inputs, microbatches=run_parts)
            own, number = run_stages[0], len(run_parts)
            pipeline = self._made.get((id(own), number), partial(self._make, own, number))[1]
            losses |= pipeline.run(run, loss_scaling)
        return losses

    def drop(self, stages: Sequence[Stage]) -> None:
        """Forget the pipelines of stages that the cache has forgotten."""
        self._made.drop_where(lambda key: key[0] == id(stages))

    def clear(self) -> None:
        """Forget all pipelines."""
        self._made.drop_where(lambda _: True)

    def _make(
        self, stages: Sequence[Stage], num_microbatches: int
    ) -> tuple[Sequence[Stage], TrainingPipeline]:
        layout = self._groups.layout
        schedule = schedule_for(
            self._schedule, layout.num_stages, layout.num_ranks, num_microbatches
        )
        if schedule != self._schedule and not self._said and layout.position == 0:
            self._said = True
            logger.warning(
                "schedule %s cannot run a number of microbatches that a short batch has (%d); it "
                "runs with %s then, which computes the same",
                self._schedule,
                num_microbatches,
                schedule,
            )
        return stages, TrainingPipeline(
            stages, schedule=schedule, num_microbatches=num_microbatches, groups=self._groups
        )


# ---- evaluation ------------------------------------------------------------------------


def evaluate(
    stages: Sequence[Sequence[Stage]], inputs: StepInputs, groups: Groups
) -> list[dict[str, Tensor]]:
    """Run every microbatch forward through the pipeline; return what this rank has found of each.

    Torch's schedules want microbatches of one shape and a loss; an evaluation batch has neither
    for sure. Every stage runs all microbatches before the next one of its rank starts, so that
    messages between two ranks are sent and received in the same order.

    ``stages`` are ``[microbatch][stage]``, ``inputs`` have the whole batch, which every replica
    evaluates.
    """
    microbatches, layout = inputs.microbatches, groups.layout
    passed: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    results: list[dict[str, Tensor]] = [{} for _ in microbatches]
    sends: list[Any] = []
    for index in layout.own_stages:
        for position, found in enumerate(stages):
            crossing = crossings(found)
            sent = crossing.names[index] if index < layout.num_stages - 1 else ()
            module = StageModule(
                found[index], crossing.into(index), sent, inputs, groups.vocabulary
            )
            received = passed.pop((index, position), None)
            if received is None:
                received = _receive(module, crossing, groups)
            with groups.waiter.activity.during("evaluation", module.stage, position):
                outputs = module(*received, microbatch=torch.tensor([position]))
            results[position] = results[position] | module.results[position]
            target = layout.positions[index + 1] if sent else layout.position
            if sent and target == layout.position:
                passed[index + 1, position] = outputs
            for value in outputs if target != layout.position else ():
                work = dist.isend(_wire(value), group=groups.pipeline, group_dst=target)
                assert work is not None
                sends.append((work, value))
    for work, _ in sends:
        groups.waiter.run(work.wait)
    return results


def _receive(module: StageModule, crossing: Crossings, groups: Groups) -> tuple[Tensor, ...]:
    index = module.stage.index
    source = groups.layout.positions[index - 1] if index else 0
    values = []
    for described in crossing.tensors(module.received, grad=False):
        value = torch.empty_like(described, device=groups.device)
        work = dist.irecv(_wire(value), group=groups.pipeline, group_src=source)
        assert work is not None
        groups.waiter.run(work.wait)
        values.append(value)
    return tuple(values)


def _wire(value: Tensor) -> Tensor:
    return value.view(torch.uint8) if value.dtype == torch.bool else value


def shared(
    microbatches: Sequence[Microbatch],
    results: Sequence[dict[str, Tensor]],
    groups: Groups,
    axes: Axes,
    order: Sequence[str],
) -> EvalResult:
    """Join the microbatches and give every rank of the pipeline all results, in their order."""
    here = join(microbatches, results, axes)
    joined = dict(here.outputs)
    if here.loss is not None:
        joined["loss"] = torch.tensor(here.loss, dtype=torch.float64, device=groups.device)
    own = {
        name: (list(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in joined.items()
    }
    described = groups.waiter.run(
        lambda: gather_over(groups.pipeline, own, _Described, groups.device)
    )
    outputs = {}
    for position, names in enumerate(described):
        for name, (shape, dtype) in names.items():
            value = joined.get(name)
            if value is None:
                value = torch.empty(shape, dtype=getattr(torch, dtype), device=groups.device)
            groups.from_position(value, position)
            outputs[name] = value
    loss = outputs.pop("loss", None)
    sorted_outputs = {name: outputs[name] for name in order if name in outputs}
    return EvalResult(None if loss is None else float(loss), sorted_outputs).nested()
