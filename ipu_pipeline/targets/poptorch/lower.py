"""Check a plan for poptorch and turn it into an executable."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.targets.base import ExecutionOptions
from ipu_pipeline.targets.poptorch.annotations import annotate
from ipu_pipeline.targets.poptorch.check import check
from ipu_pipeline.targets.poptorch.executable import PopTorchExecutable
from ipu_pipeline.targets.poptorch.optimizers import optimizer_settings
from ipu_pipeline.targets.poptorch.settings import settings_for


def lower(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
) -> PopTorchExecutable:
    """Return an executable that runs ``plan`` on IPUs.

    Raises:
        LoweringError: poptorch is not installed, or it cannot run the plan.
    """
    poptorch = _poptorch()
    _check_options(options)
    device_optimizer = None
    if optimizer is not None:
        device_optimizer = optimizer_settings(
            optimizer, loss_scaling=options.loss_scaling, max_grad_norm=options.max_grad_norm
        )
    settings = settings_for(
        plan,
        options.ipu_config,
        optimizer=device_optimizer,
        half=options.precision == "fp16",
        seed=options.seed,
    )
    check(plan, settings)
    annotations = annotate(plan, checkpoint_layers=settings.config.recompute_checkpoint_every_layer)
    return PopTorchExecutable(model, plan, optimizer, annotations, settings, poptorch)


def _poptorch() -> Any:
    import sys

    if "poptorch" not in sys.modules and find_spec("poptorch") is None:
        raise LoweringError(
            "poptorch is not installed: it comes with Graphcore's SDK. Here you can write a bundle "
            "for a machine that has it (ipu-pipeline emit PLAN -o bundle/), run that on the CPU "
            "(ipu-pipeline run bundle/ --emulate), or use target='local'"
        )
    return import_module("poptorch")


def _check_options(options: ExecutionOptions) -> None:
    if options.precision == "bf16":
        raise LoweringError("IPUs have no bfloat16; use precision='fp16' or 'float32'")
    if options.schedule not in (None, "popart"):
        raise LoweringError(
            f"IPUs run PopART's schedule, not {options.schedule!r}; leave schedule out"
        )
    if options.sequential:
        raise LoweringError("sequential is the local target's; leave it out for poptorch")
