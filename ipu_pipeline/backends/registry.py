"""Targets by name; nothing of a target is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.executable import Executable, ExecutionOptions

# name -> (module, attribute) of a function with the signature of ``lower``.
_TARGETS: Mapping[str, tuple[str, str]] = {
    "local": ("ipu_pipeline.backends.local.lower", "lower"),
    "distributed": ("ipu_pipeline.backends.cluster.lower", "lower"),
    "poptorch": ("ipu_pipeline.backends.ipu.lower", "lower"),
}


def available_targets() -> tuple[str, ...]:
    """Return the names of all targets."""
    return tuple(_TARGETS)


def lower(
    target: str,
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
) -> Executable:
    """Check ``plan`` for ``target`` and turn it into an executable.

    Raises:
        LoweringError: The target is unknown or cannot run the plan.
    """
    if target not in _TARGETS:
        raise LoweringError(
            f"target {target!r} is unknown; available: {', '.join(available_targets())}"
        )
    module, attribute = _TARGETS[target]
    function: Callable[..., Any] = getattr(import_module(module), attribute)
    executable: Executable = function(model, plan, optimizer, options)
    return executable
