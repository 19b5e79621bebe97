"""Evaluation: forward passes only, stage by stage, each stage through all microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ipu_pipeline.backends.cluster.doing import Doing
from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.module import Crossings, StageModule, StepInputs, crossings
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.executable import EvalResult
from ipu_pipeline.stages.stage import Stage


def evaluate(
    stages: Sequence[Sequence[Stage]],
    microbatches: Sequence[Microbatch],
    inputs: StepInputs,
    groups: Groups,
    doing: Doing,
) -> EvalResult:
    """Run every microbatch forward through the pipeline; every rank gets the result.

    Torch's schedules want microbatches of one shape and a loss; an evaluation batch has neither
    for sure. Every stage runs all microbatches before the next one of its rank starts, so that
    messages between two ranks are sent and received in the same order.

    Args:
        stages: ``[microbatch][stage]``.
        microbatches: The whole batch; every replica evaluates all of it.
        inputs: Seed, step and precision; its microbatches are set here.
        groups: Of the processes.
        doing: Notes what is being done.
    """
    inputs.microbatches = microbatches
    layout = groups.layout
    passed: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    results: list[dict[str, Tensor]] = [{} for _ in microbatches]
    sends: list[Any] = []
    for index in layout.own_stages:
        for position, found in enumerate(stages):
            crossing = crossings(found)
            sent = crossing.names[index] if index < layout.num_stages - 1 else ()
            module = StageModule(found[index], crossing.into(index), sent, inputs)
            received = passed.pop((index, position), None)
            if received is None:
                received = _receive(module, crossing, groups)
            with doing.during("evaluation", module.stage, position):
                outputs = module(*received, microbatch=torch.tensor([position]))
            results[position] = results[position] | module.results[position]
            target = layout.position_of(index + 1) if sent else layout.position
            if sent and target == layout.position:
                passed[index + 1, position] = outputs
            for value in outputs if target != layout.position else ():
                work = dist.isend(_wire(value), group=groups.pipeline, group_dst=target)
                assert work is not None
                sends.append((work, value))
    for work, _ in sends:
        groups.waiter.run(work.wait)
    return _shared(microbatches, results, groups)


def _receive(module: StageModule, crossing: Crossings, groups: Groups) -> tuple[Tensor, ...]:
    index = module.stage.index
    source = groups.layout.position_of(index - 1) if index else 0
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


def _shared(
    microbatches: Sequence[Microbatch], results: Sequence[dict[str, Tensor]], groups: Groups
) -> EvalResult:
    """Join the microbatches on axis 0 and give every rank of the pipeline all results."""
    joined: dict[str, Tensor] = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if name == "loss":
            pairs = zip(microbatches, values, strict=True)
            joined[name] = torch.stack([value.double() * part.share for part, value in pairs]).sum()
        else:
            joined[name] = torch.cat(values) if values[0].ndim else torch.stack(values)
    described = groups.of_pipeline({n: (value.shape, value.dtype) for n, value in joined.items()})
    outputs = {}
    for position, names in enumerate(described):
        for name, (shape, dtype) in names.items():
            value = joined.get(name)
            value = (
                torch.empty(shape, dtype=dtype, device=groups.device) if value is None else value
            )
            groups.from_position(value, position)
            outputs[name] = value
    loss = outputs.pop("loss", None)
    return EvalResult(None if loss is None else float(loss), outputs)
