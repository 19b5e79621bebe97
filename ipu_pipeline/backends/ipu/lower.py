"""Check a plan for poptorch and start a worker that runs it.

Everything here was run against the stand-in (:mod:`ipu_pipeline_emulator`), which
was written from the public sources of poptorch 3.4. Nothing of it has run on an IPU or with
Graphcore's own poptorch.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn
from torch.amp import GradScaler

from ipu_pipeline.backends.ipu.check import check, notes
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.executable import PopTorchExecutable
from ipu_pipeline.backends.ipu.optimizers import optimizer_settings
from ipu_pipeline.backends.ipu.sdk_python import find_sdk_python
from ipu_pipeline.backends.ipu.settings import ipu_config_of_plan, settings_for
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.materialize import materialize

logger = logging.getLogger(__name__)


def lower(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
) -> PopTorchExecutable:
    """Return an executable that runs ``plan`` on IPUs.

    Raises:
        LoweringError: No SDK is named, or it cannot run the plan or the model.
        StageError: The worker died.
    """
    python = find_sdk_python(options.sdk_python)
    materialize(model, options.weights, options.seed)
    _check_options(options, plan)
    _refuse_hooks(model)
    device_optimizer = None
    if optimizer is not None:
        device_optimizer = optimizer_settings(
            optimizer, loss_scaling=_loss_scaling(options), max_grad_norm=options.max_grad_norm
        )
    whole_loss = replace(ipu_config_of_plan(plan), output_mode="all")
    settings = settings_for(
        plan,
        options.ipu_config or whole_loss,
        optimizer=device_optimizer,
        half=_is_half(model),
        seed=options.seed,
    )
    check(plan, settings)
    for note in notes(plan, settings):
        logger.warning("%s", note)
    return PopTorchExecutable(
        model, plan, optimizer, settings, python, self_check=options.self_check
    )


def _loss_scaling(options: ExecutionOptions) -> float:
    if isinstance(options.loss_scaling, GradScaler):
        raise LoweringError(
            "loss_scaling of IPUs is a number, or ipu_config=IPUConfig(auto_loss_scaling=True); a "
            "GradScaler runs here and not there: leave it out"
        )
    return 1.0 if options.loss_scaling is None else options.loss_scaling


def _is_half(model: nn.Module) -> bool:
    kinds = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    if not kinds <= {torch.float32, torch.float16}:
        raise LoweringError(
            f"the model has parameters of type {', '.join(sorted(map(str, kinds)))}; IPUs have "
            "float32 and float16: call model.float() or model.half()"
        )
    return torch.float16 in kinds


def _refuse_hooks(model: nn.Module) -> None:
    parameters = (
        (fqn, p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))
        for fqn, p in model.named_parameters()
    )
    modules = (
        (fqn, m._backward_hooks or m._backward_pre_hooks) for fqn, m in model.named_modules()
    )
    hooked = [fqn for fqn, hooks in (*parameters, *modules) if hooks]
    if hooked:
        raise LoweringError(
            f"{hooked[0] or type(model).__name__!r} has a hook on its gradients or its backward "
            "pass, which is Python code that no IPU runs; remove the hook (max_grad_norm clips on "
            "the device), or use target='local'"
        )


def _check_options(options: ExecutionOptions, plan: Plan) -> None:
    if options.precision == "bf16":
        raise LoweringError("IPUs have no bfloat16; use model.half(), or float32")
    if options.precision == "fp16":
        raise LoweringError(
            "precision='fp16' is autocast, which the device has not: its weights are float16 "
            "themselves; call model.half() before plan() and compile(), and leave precision out"
        )
    if options.master_weights:
        raise LoweringError(
            "master_weights are float32 copies that an optimizer in Python steps, and the device "
            "runs its own; leave it out, or use target='local' or 'distributed'"
        )
    others = ("device", "compile_blocks", "offload_activations")
    if any(getattr(options, name) for name in others) or options.batches != "whole":
        raise LoweringError(
            f"{', '.join(others)} and batches='share' are the local and distributed targets'; "
            "PopART places, compiles and stores, and one process feeds all replicas: leave them out"
        )
    if options.schedule not in (None, "popart"):
        raise LoweringError(
            f"IPUs run PopART's schedule, not {options.schedule!r}; leave schedule out"
        )
    if options.loss_weights not in (None, "samples") or plan.batch_axes:
        raise LoweringError(
            "IPUs cut every input on axis 0 and take the mean of the microbatches' means; leave "
            "loss_weights and batch_axes out, or use target='local' or 'distributed'"
        )
    if options.recompute is not None:
        raise LoweringError(
            f"recompute={options.recompute!r} is an option of the other targets: what IPUs "
            "recompute is the plan's to say; leave it out, and plan with IPUConfig(recompute=...)"
        )
    if options.sequential:
        raise LoweringError("sequential is the local target's; leave it out for poptorch")
    config = options.ipu_config or IPUConfig()
    if options.replicated_tensor_sharding and not config.replicated_tensor_sharding:
        raise LoweringError(
            "replicated_tensor_sharding is asked for, but IPUs read it from ipu_config, where it "
            "is off; set it there: ipu_config=IPUConfig(replicated_tensor_sharding=True, ...)"
        )
