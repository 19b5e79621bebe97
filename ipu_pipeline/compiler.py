"""The flow on one screen: capture, price, split, plan; then lower the plan to a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import is_ipu
from ipu_pipeline.backends.registry import lower
from ipu_pipeline.capture import capture, model_identity
from ipu_pipeline.capture.leaves import Granularity
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.verify import verify_plan
from ipu_pipeline.plan_request import (
    configured,
    cost_model_of,
    depth_of,
    is_spelled_out,
    layers_of,
    machine_limits,
    machine_of,
    microbatches_of,
    offering,
)
from ipu_pipeline.plan_writer import make_plan, price_annotated, run_passes
from ipu_pipeline.planner.passes.manager import PassManager
from ipu_pipeline.planner.search import Constraints, Partition, solve
from ipu_pipeline.stages.executable import Executable, ExecutionOptions


def plan(  # noqa: PLR0913 - the public door: keyword options of one decision
    model: nn.Module,
    example_batch: Mapping[str, Any],
    *,
    machine: str | Machine = "local",
    num_stages: int | None = None,
    microbatches: int | None = None,
    replicas: int = 1,
    schedule: str | None = None,
    costs: str = "analytic",
    granularity: Granularity = "layer",
    config: IPUConfig | None = None,
    constraints: Constraints | None = None,
    passes: str = "",
) -> Plan:
    """Find the fastest split of ``model`` over ``machine``, with a bound on how good it is.

    Args:
        model: In training mode, and returning a loss for ``example_batch``; or in evaluation mode,
            for ``compile(training=False)``. It may live on the ``meta`` device when ``costs`` is
            ``analytic``.
        example_batch: Keyword arguments of one microbatch (axis 0: micro batch), labels included
            in training mode.
        machine: ``local`` (this machine, measured), a known name such as ``pod16``, a machine
            file, or a description.
        num_stages: Pipeline depth; ``None``: the config's, else the best for the machine.
        microbatches: Microbatches per optimizer step; ``None``: the config's, else 8.
        replicas: Copies of the pipeline.
        schedule: ``1f1b``, ``gpipe``, or ``popart`` (the one that IPUs run); ``None``: that of
            the machine.
        costs: ``analytic`` (counted operations) or ``profiled`` (measured on this machine).
        granularity: How fine the blocks are: ``layer``, ``sublayer`` or ``op``.
        config: An IPU configuration; its ``layers_per_ipu`` is respected to the letter.
        constraints: Further limits; the arguments above replace its fields of the same meaning.
        passes: Passes over the solved plan, such as ``serialize_projection{factor=16},
            recompute{blocks=all}``; the predictions are those of the annotated plan.

    Raises:
        CaptureError: The model cannot be captured.
        PartitionError: No split satisfies the constraints, or what the passes made of it does not
            fit.
        PlanError: A pass cannot be applied.
        ValueError: An argument is out of range.
    """
    manager = PassManager.parse(passes)
    captured = capture(model, example_batch, granularity=granularity)
    depth = depth_of(num_stages, config)
    described = machine_of(machine, depth)
    spelled_out = constraints is None and is_spelled_out(config, described)
    limits = replace(
        constraints or machine_limits(described),
        num_stages=depth,
        num_microbatches=microbatches_of(microbatches, config),
        replicas=replicas,
        schedule=schedule or ("popart" if is_ipu(described) else "1f1b"),  # type: ignore[arg-type]
        layers_per_ipu=None if spelled_out else layers_of(captured.graph, config, depth),
    )
    model_of_costs = cost_model_of(captured, example_batch, described, costs, config, limits)
    asked = limits.factors(captured.graph.block_index)
    prices = offering(model_of_costs, asked).estimate(captured.graph, described)
    price: Callable[[Plan], Partition]
    if spelled_out:
        partition = configured(captured.graph, described, config, limits)
    else:
        partition = solve(captured.graph, prices, described, limits)
    price = partial(price_annotated, captured.graph, model_of_costs, limits)
    return run_passes(make_plan(captured, described, prices, partition), manager, price)


def compile(
    model: nn.Module,
    plan: Plan,
    *,
    target: str = "local",
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Executable:
    """Turn a plan into an executable for ``target``.

    Args:
        model: The model that the plan was made for, with its weights.
        plan: From :func:`plan` or ``Plan.load``.
        target: ``local``, ``distributed`` (in processes that torchrun starts) or ``poptorch``.
        optimizer: Any ``torch.optim`` optimizer over ``model.parameters()``.
        **options: Fields of :class:`~ipu_pipeline.stages.executable.ExecutionOptions`:
            ``precision``, ``loss_scaling``, ``max_grad_norm``, ``seed``, ``schedule``, ...;
            ``training=False`` for inference: no optimizer, ``eval_step`` only, and the plan may
            come from a model in evaluation mode and a batch without labels.

    Raises:
        PlanError: The plan was made for another model, or is invalid.
        LoweringError: The target cannot run the plan.
        ValueError: An option is unknown or out of range, or there is an optimizer and nothing to
            train.
    """
    verify_plan(plan)
    plan.check_model(model_identity(model))
    unknown = sorted(set(options) - set(ExecutionOptions.__dataclass_fields__))
    if unknown:
        known = ", ".join(ExecutionOptions.__dataclass_fields__)
        raise ValueError(f"unknown option {', '.join(unknown)}; known options: {known}")
    execution = ExecutionOptions(**options)
    if optimizer is not None and not execution.training:
        raise ValueError("training=False leaves nothing to an optimizer; pass one of the two only")
    return lower(target, model, plan, optimizer, execution)
