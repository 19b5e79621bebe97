"""Torch's stages and schedule for one shape of microbatch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as torch_pipelining
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.module import Crossings, StageModule, StepInputs, crossings
from ipu_pipeline.backends.cluster.schedules import torch_schedule
from ipu_pipeline.backends.cluster.split_backward import can_split_backward
from ipu_pipeline.backends.cluster.waiting import Waiter
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.stage import Stage

logger = logging.getLogger(__name__)


class _NotedStage(PipelineStage):
    """Torch's stage; it notes what it is doing, and its waits can be given up."""

    def __init__(self, module: StageModule, waiter: Waiter, **arguments: Any) -> None:
        super().__init__(module, module.stage.index, **arguments)
        self._waiter = waiter
        self._code = module.stage
        self._inputs = module.inputs

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._noted("forward pass", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._noted("backward pass", bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._noted("backward pass of the weights", bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return [self._waiter.guarded(op) for op in super().get_fwd_recv_ops(fwd_chunk_id)]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return [self._waiter.guarded(op) for op in super().get_bwd_recv_ops(bwd_chunk_id)]

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return [self._waiter.guarded(op) for op in super().get_fwd_send_ops(fwd_chunk_id)]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        for operation in operations:  # a split backward pass gives gradients of any layout
            operation.tensor = operation.tensor.contiguous()
        return [self._waiter.guarded(operation) for operation in operations]

    def _warmup_forward_vote(self, *args: Any, **kwargs: Any) -> Tensor:
        vote = super()._warmup_forward_vote
        return self._waiter.run(lambda: vote(*args, **kwargs))

    def _warmup_backward_result(self, *args: Any, **kwargs: Any) -> Tensor:
        result = super()._warmup_backward_result
        return self._waiter.run(lambda: result(*args, **kwargs))

    def _noted(self, what: str, chunk: int) -> Any:
        index = self._inputs.microbatches[chunk].index
        return self._waiter.activity.during(what, self._code, index)


class TrainingPipeline:
    """The stages of this rank and the schedule that runs them, for one shape of microbatch.

    Args:
        stages: All stages of the plan, captured for this shape.
        layout: Which of them are this rank's.
        schedule: Name of the schedule.
        num_microbatches: Of one pipeline in one step.
        groups: The processes.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        layout: Layout,
        schedule: str,
        num_microbatches: int,
        groups: Groups,
    ) -> None:
        # How long the actions of other shapes last says nothing.
        groups.waiter.activity.longest.clear()
        self.num_microbatches = num_microbatches
        self._inputs = StepInputs()
        self._crossing = crossings(stages)
        loss = next(stage.results["loss"] for stage in stages if "loss" in stage.results)
        self.modules = [
            self._module(stages[index], loss, layout.num_stages) for index in layout.own_stages
        ]
        arguments = {
            "num_stages": layout.num_stages,
            "device": groups.device,
            "group": groups.pipeline,
        }
        self._stages = [
            _NotedStage(
                module,
                groups.waiter,
                **arguments,
                **self._metadata(module, self._crossing),
            )
            for module in self.modules
        ]
        kind = torch_schedule(schedule)
        self._untried = kind.splits_backward
        make: type = getattr(torch_pipelining, kind.torch_class or "")
        self._schedule = make(
            self._stages[0] if issubclass(make, PipelineScheduleSingle) else self._stages,
            num_microbatches,
            loss_fn=_weighted_loss,
            scale_grads=False,
        )
        self._has_last = layout.num_stages - 1 in layout.own_stages

    def run(
        self, microbatches: Sequence[Microbatch], inputs: Mapping[str, Any], loss_scaling: float
    ) -> float:
        """Run one step's forward and backward passes; gradients are added to ``.grad``.

        Args:
            microbatches: This replica's.
            inputs: Fields of :class:`StepInputs`.
            loss_scaling: Factor of the loss before the backward pass.

        Returns:
            This replica's part of the loss on the rank of the loss, else 0.
        """
        self._inputs.microbatches = microbatches
        for name, value in inputs.items():
            setattr(self._inputs, name, value)
        self._choose_backward()
        positions = torch.arange(self.num_microbatches)
        arguments: dict[str, Any] = {}
        if self._has_last:
            arguments["target"] = torch.tensor(
                [part.share * loss_scaling for part in microbatches], dtype=torch.float64
            )
            arguments["losses"] = []
        try:
            self._schedule.step(microbatch=positions, return_outputs=False, **arguments)
            for module in self.modules:
                module.finish()
            return self._loss(microbatches)
        finally:
            for module in self.modules:
                module.clear()

    def _choose_backward(self) -> None:
        """Let stages whose backward pass torch cannot split compute it whole."""
        if not self._untried:
            return
        self._untried = False
        for stage, module in zip(self._stages, self.modules, strict=True):
            received = self._crossing.tensors(module.received, grad=True)
            if not can_split_backward(module, received):
                logger.warning(
                    "stage %d computes gradients of inputs and weights together: torch cannot "
                    "split its backward pass, so the schedule saves no time there",
                    module.stage.index,
                )
                stage.dw_builder = _nothing_left

    def _loss(self, microbatches: Sequence[Microbatch]) -> float:
        total = 0.0
        for module in self.modules:
            for position, results in sorted(module.results.items()):
                if "loss" in results:
                    total += float(results["loss"]) * microbatches[position].share
        return total

    def _module(self, stage: Stage, loss: str, num_stages: int) -> StageModule:
        last = stage.index == num_stages - 1
        sent = (loss,) if last else self._crossing.names[stage.index]
        return StageModule(stage, self._crossing.into(stage.index), sent, self._inputs)

    @staticmethod
    def _metadata(module: StageModule, crossing: Crossings) -> dict[str, Any]:
        """Return what every boundary carries, so that torch asks no other rank for it."""
        return {
            "input_args": crossing.tensors(module.received, grad=True),
            "output_args": crossing.tensors(module.sent, grad=True),
        }


def _nothing_left() -> Callable[..., None]:
    """Build the weights' part of a backward pass that was computed whole."""
    return lambda: None


def _weighted_loss(outputs: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """Return the loss times its weight (share x loss scaling), shape ``()``."""
    return outputs[0] * float(weight)
