"""The user's torch optimizer and the device's: settings go one way each step, state goes both ways.

The torch optimizer stays the one that schedulers, callbacks and checkpoints see. Its class chooses
PopART's; its groups' numbers are handed over whenever one changed. State lives on the device under
PopART's names (``Accl1___weight``: first moment) and is copied only for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.settings import OptimizerSettings
from ipu_pipeline.errors import LoweringError

# Numbers of a group that may change between steps, by PopART optimizer.
_VARYING = {
    "AdamW": ("lr", "betas", "eps", "weight_decay"),
    "Adam": ("lr", "betas", "eps", "weight_decay"),
    "SGD": ("lr", "momentum", "weight_decay"),
}
_STATE = {
    "exp_avg": "Accl1___",
    "momentum_buffer": "Accl1___",
    "exp_avg_sq": "Accl2___",
    "step": "Step___",
}
_KEYS = {
    "AdamW": ("exp_avg", "exp_avg_sq", "step"),
    "Adam": ("exp_avg", "exp_avg_sq", "step"),
    "SGD": ("momentum_buffer",),
}


def optimizer_settings(
    optimizer: torch.optim.Optimizer, *, loss_scaling: float, max_grad_norm: float | None
) -> OptimizerSettings:
    """Describe ``optimizer`` as poptorch is told about it.

    Raises:
        LoweringError: PopART has no such optimizer, or an option of it has no counterpart.
    """
    kind = type(optimizer).__name__
    if kind not in _VARYING:
        raise LoweringError(
            f"the device runs PopART's own optimizer, never Python code, and {kind} has no "
            f"counterpart whose state moves both ways; use torch.optim's {', '.join(_VARYING)} "
            "(a bundle also runs LAMB and RMSprop)"
        )
    first = optimizer.param_groups[0]
    refused = [key for key in ("amsgrad", "maximize", "nesterov", "dampening") if first.get(key)]
    if refused:
        raise LoweringError(
            f"{kind}({refused[0]}={first[refused[0]]}) does not run on the device; leave it out"
        )
    return OptimizerSettings(
        optimizer=kind,
        learning_rate=float(first["lr"]),
        betas=tuple(first.get("betas", (0.9, 0.999))),
        eps=float(first.get("eps", 1e-8)),
        momentum=float(first.get("momentum", 0.0)),
        weight_decay=float(first["weight_decay"]),
        loss_scaling=loss_scaling,
        max_grad_norm=max_grad_norm,
    )


def named_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups for the device's optimizer, parameters by name, as plain data.

    Raises:
        LoweringError: A group holds something that is no parameter of the model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    keys = _VARYING[type(optimizer).__name__]
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        if foreign := [p for p in group["params"] if id(p) not in names]:
            raise LoweringError(
                f"group {number} of the optimizer holds {len(foreign)} tensors that are no "
                "parameters of the model; make the optimizer over model.parameters()"
            )
        numbers = {key: _plain(group[key]) for key in keys if key in group}
        groups.append({"params": [names[id(p)] for p in group["params"]], **numbers})
    return groups


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else float(value)


def read_state(
    optimizer: torch.optim.Optimizer, ipu_state: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Copy the device's optimizer state into the torch optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    keys = _KEYS[type(optimizer).__name__]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = {
                key: ipu_state[_STATE[key] + names[id(parameter)]]
                for key in keys
                if _STATE[key] + names[id(parameter)] in ipu_state
            }
            for key, value in found.items():
                shaped = value.reshape(()) if key == "step" else value.reshape(parameter.shape)
                optimizer.state[parameter][key] = shaped.to(torch.float32).clone()


def write_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the torch optimizer's state under the device's names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        _STATE[key] + names[id(parameter)]: torch.as_tensor(state[key], dtype=torch.float32).clone()
        for parameter, state in optimizer.state.items()
        for key in _KEYS[type(optimizer).__name__]
        if state.get(key) is not None
    }
