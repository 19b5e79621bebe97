"""Torch's stages and schedule for one shape of microbatch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as torch_pipelining
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.pipelining.stage import _make_tensor_from_meta  # type: ignore[attr-defined]

from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import torch_schedule
from ipu_pipeline.backends.cluster.module import StageModule, StepInputs, crossings
from ipu_pipeline.backends.cluster.ranks.waiting import Waiter
from ipu_pipeline.capture.patches import preserved_state
from ipu_pipeline.ops.linear import adding_to_grad
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.devices import device_of, naming_snapshots
from ipu_pipeline.stages.stage import Stage

logger = logging.getLogger(__name__)


class _NotedStage(PipelineStage):
    """Torch's stage; it notes what it is doing, and its waits can be given up.

    Torch keeps a buffer for every message of a step, all the time. Here a message has one from its
    receive to its backward pass.
    """

    def __init__(self, module: StageModule, waiter: Waiter, **arguments: Any) -> None:
        super().__init__(module, module.stage.index, **arguments)
        self._waiter = waiter
        self._code = module.stage
        self._inputs = module.inputs
        self._module = module

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._noted("forward pass", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._noted("backward pass", bwd_chunk_id):
            loss = self._module.late_loss(bwd_chunk_id)
            if loss is not None:
                kwargs["loss"] = loss
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
            if loss is not None:
                assert self._module.vocabulary is not None
                self._module.vocabulary.give_back(bwd_chunk_id)
        for received in (self.args_recv_info, self.grad_recv_info):
            _free(received.get(bwd_chunk_id, ()))

    def backward_maybe_with_nosync(self, backward_type: str, *args: Any, **kwargs: Any) -> Any:
        whole = backward_type == "full"  # torch accumulates into all weights
        with adding_to_grad() if whole else nullcontext():
            return super().backward_maybe_with_nosync(backward_type, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._noted("backward pass of the weights", bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def _setup_forward_recv_info(self, *args: Any, **kwargs: Any) -> None:
        with self._without_memory():
            super()._setup_forward_recv_info(*args, **kwargs)
        _free(chain.from_iterable(self.args_recv_info.values()))

    def _setup_backward_recv_info(self, *args: Any, **kwargs: Any) -> None:
        with self._without_memory():
            super()._setup_backward_recv_info(*args, **kwargs)
        _free(chain.from_iterable(self.grad_recv_info.values()))

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        yield
        self.device = device

    def set_local_bwd_input(
        self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int
    ) -> None:
        received = self.grad_recv_info[mb_index]
        pairs = zip(received, next_stage_bwd_outputs, strict=True)
        _allocate([info for info, gradient in pairs if gradient is None], self.device)
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        _allocate(self.args_recv_info[fwd_chunk_id], self.device)
        return [self._waiter.guarded(op) for op in super().get_fwd_recv_ops(fwd_chunk_id)]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        _allocate(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
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

    @contextmanager
    def _noted(self, what: str, chunk: int) -> Iterator[None]:
        index = self._inputs.microbatches[chunk].index
        with self._waiter.activity.during(what, self._code, index), naming_snapshots():
            yield


def _allocate(received: Iterable[Any], device: torch.device) -> None:
    """Give memory to messages that have none and will have a value."""
    for info in received:
        if info.buffer is None and info.tensor_meta is not None and not info.is_root_arg:
            info.buffer = _make_tensor_from_meta(info.tensor_meta, device)


def _free(received: Iterable[Any]) -> None:
    for info in received:
        info.buffer = None


class TrainingPipeline:
    """The stages of this rank and the schedule that runs them, for one shape of microbatch.

    ``stages`` are all of the plan, ``num_microbatches`` those of one pipeline in one step.
    """

    stage_class = _NotedStage

    def __init__(
        self, stages: Sequence[Stage], *, schedule: str, num_microbatches: int, groups: Groups
    ) -> None:
        layout = groups.layout
        # How long the actions of other shapes last says nothing.
        groups.waiter.activity.longest.clear()
        self.num_microbatches = num_microbatches
        self._vocabulary = groups.vocabulary
        self._inputs = StepInputs()
        self._crossing = crossings(stages)
        loss = next(stage.results["loss"] for stage in stages if "loss" in stage.results)
        sent = (*self._crossing.names, (loss,))
        self.modules = [
            StageModule(
                stages[index],
                self._crossing.into(index),
                sent[index],
                self._inputs,
                groups.vocabulary,
            )
            for index in layout.own_stages
        ]
        self._stages = [
            self.stage_class(
                module,
                groups.waiter,
                num_stages=layout.num_stages,
                device=groups.device,
                group=groups.pipeline,
                # What every boundary carries, so that torch asks no other rank for it.
                input_args=self._crossing.tensors(module.received, grad=True),
                output_args=self._crossing.tensors(module.sent, grad=True),
            )
            for module in self.modules
        ]
        kind = torch_schedule(schedule)
        self._untried = kind.splits_backward
        make: type = getattr(torch_pipelining, kind.torch_class or "")
        self._schedule = make(
            self._stages[0] if issubclass(make, PipelineScheduleSingle) else self._stages,
            num_microbatches,
            # The loss times its weight (share x loss scaling).
            loss_fn=lambda outputs, weight: outputs[0] * float(weight),
            scale_grads=False,
        )
        if groups.vocabulary is not None and make is Schedule1F1B:
            # One forward pass more before the first backward pass, in which the others find time
            # for their softmax: as it is priced (``one_forward_ahead``).
            self._schedule._num_stages += 1
        self._has_last = layout.num_stages - 1 in layout.own_stages

    def run(self, inputs: StepInputs, loss_scaling: float) -> dict[int, float]:
        """Run one step's forward and backward passes; gradients are added to ``.grad``.

        Args:
            inputs: With the microbatches of this replica.
            loss_scaling: Factor of the loss before the backward pass.

        Returns:
            On the rank of the loss, that of every microbatch, by its index.
        """
        microbatches = inputs.microbatches
        vars(self._inputs).update({**vars(inputs), "loss_scaling": loss_scaling})
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
            if self._vocabulary is not None:
                self._vocabulary.finish()
            return self._losses(microbatches)
        finally:
            if self._vocabulary is not None:
                self._vocabulary.clear()
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
                stage.dw_builder = lambda: lambda: None  # nothing is left of it

    def _losses(self, microbatches: Sequence[Microbatch]) -> dict[int, float]:
        return {
            microbatches[position].index: float(results["loss"])
            for module in self.modules
            for position, results in sorted(module.results.items())
            if "loss" in results
        }


# ---- whether torch can split a stage's backward pass --------------------------------------------


TOLERANCE = 1e-4


def can_split_backward(module: StageModule, received: Sequence[Tensor]) -> bool:
    """Whether torch can compute a stage's gradients of inputs and of weights apart: try it once.

    Zero-bubble schedules do. Torch finds the weights' part by walking the autograd graph, which
    fails or goes wrong for some graphs (T5's position bias is one input of many blocks), and
    misses what is recomputed or serialized. Gradients that parameters have are kept.

    Args:
        module: The stage; its inputs are set.
        received: Describe what it receives (no data).
    """
    stage = module.stage
    if stage.index == 0:
        return True  # receives nothing: torch computes it whole, later
    names = {program.name for program in stage.programs}
    if stage.tables or stage.row_shards or stage.recompute & names or module.reads_spread_tables:
        return False
    parameters = [p for p in module.parameters() if p.requires_grad]
    earlier = [p.grad for p in parameters]
    try:
        whole, parts = (
            _gradients(module, received, parameters, backward) for backward in (_at_once, _in_two)
        )
    except RuntimeError:
        return False
    finally:
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient
        module.clear()
    return all(_equal(a, b) for a, b in zip(whole, parts, strict=True))


Backward = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Any]], None]


def _gradients(
    module: StageModule, received: Sequence[Tensor], parameters: list[Any], backward: Backward
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    leaves = [_filled(described, generator, device_of(module)) for described in received]
    position = torch.zeros(1, dtype=torch.int64)
    changing = [t for program in module.stage.programs for t in program.changing.values()]
    with preserved_state(module, changing):
        outputs = [value for value in module(*leaves, microbatch=position) if value.requires_grad]
        seeds = [torch.ones_like(value) for value in outputs]
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        backward(outputs, seeds, inputs, parameters)
        return [None if p.grad is None else p.grad.clone() for p in (*inputs, *parameters)]


def _at_once(outputs: list[Tensor], seeds: list[Tensor], *_: Any) -> None:
    torch.autograd.backward(outputs, seeds)


def _in_two(
    outputs: list[Tensor], seeds: list[Tensor], inputs: list[Tensor], parameters: list[Any]
) -> None:
    found, groups = stage_backward_input(outputs, seeds, inputs, iter(parameters))
    for leaf, gradient in zip(inputs, found, strict=True):
        leaf.grad = gradient
    stage_backward_weight(iter(parameters), groups)


def _filled(described: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    if not described.is_floating_point():
        return torch.zeros(described.shape, dtype=described.dtype, device=device)
    values = torch.randn(described.shape, generator=generator).to(device, described.dtype)
    return values.requires_grad_(described.requires_grad)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    scale = float(a.abs().max()) if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale))
