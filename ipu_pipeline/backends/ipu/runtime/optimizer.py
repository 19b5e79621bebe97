"""The device's optimizer, with every number that a schedule may change given explicitly."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch
from torch import nn

_TYPES = {"float16": torch.float16, "float32": torch.float32}


def make_optimizer(
    settings: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], poptorch: Any
) -> Any:
    """Return an optimizer of ``poptorch.optim``.

    Args:
        settings: The flat object of ``settings.json``.
        groups: Parameter groups, each with ``params`` and its ``weight_decay`` (and ``lr``).
        poptorch: The front end.
    """
    name = settings["optimizer"]
    arguments = {
        "lr": settings["learning_rate"],
        "weight_decay": settings["weight_decay"],
        "loss_scaling": settings["loss_scaling"],
        "accum_type": _TYPES[settings["accum_dtype"]],
    }
    if name == "SGD":
        arguments.update(momentum=settings["momentum"], use_combined_accum=False)
    else:
        arguments.update(
            first_order_momentum_accum_type=_TYPES[settings["first_order_momentum_dtype"]],
            second_order_momentum_accum_type=_TYPES[settings["second_order_momentum_dtype"]],
            eps=settings["eps"],
        )
    if name in ("Adam", "AdamW", "LAMB"):
        arguments["betas"] = tuple(settings["betas"])
    if name in ("SGD", "Adam", "AdamW") and settings["max_grad_norm"] is not None:
        arguments["max_grad_norm"] = settings["max_grad_norm"]
    return getattr(poptorch.optim, name)(groups, **arguments)


def decayed_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups as transformers makes them: biases and norms are not decayed."""
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bias = name.rsplit(".", 1)[-1] == "bias"
            (plain if bias or id(parameter) in norms else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
