"""Check a plan for the local target and turn it into an executable."""

from __future__ import annotations

import torch
from torch import nn

from ipu_pipeline.backends.local.executable import LocalExecutable, shape_to_run
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.stage import recomputed_blocks
from ipu_pipeline.stages.tables import check_blocks
from ipu_pipeline.stages.training import check_model


def lower(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
) -> LocalExecutable:
    """Return an executable that runs ``plan`` in this process.

    Raises:
        LoweringError: The target cannot run the plan.
    """
    check(plan, options)
    check_model(model, optimizer)
    return LocalExecutable(model, plan, optimizer, options)


def check(plan: Plan, options: ExecutionOptions) -> None:
    """Refuse what the local target cannot run.

    Raises:
        LoweringError: Replicas or state divided among them, a schedule that it does not have,
            unknown blocks to recompute, or a serialized block without parameters.
    """
    if plan.replicas > 1:
        raise LoweringError(
            f"the plan has {plan.replicas} replicas; the local target runs one pipeline: make the "
            "plan with replicas=1, or more microbatches for the same total batch"
        )
    if options.ipu_config is not None:
        raise LoweringError(
            "the local target runs on no IPU: leave ipu_config out, or use target='poptorch'"
        )
    if options.replicated_tensor_sharding:
        raise LoweringError(
            "replicated_tensor_sharding divides optimizer state among replicas, and the local "
            "target runs one pipeline in one process; leave it out, or use target='distributed' "
            "with a plan of several replicas"
        )
    if options.training:
        shape_to_run(plan, options)
    recomputed_blocks(options.recompute, plan)
    check_blocks(plan)
