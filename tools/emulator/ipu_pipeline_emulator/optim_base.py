"""What is variable in an optimizer, and the values that the device gets from it."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch

from .options_base import require

_LOG = logging.getLogger("poptorch")
_BACKEND_NAMES = {
    "lr": "learningRate",
    "momentum": "momentum",
    "dampening": "dampening",
    "weight_decay": "weightDecay",
    "nesterov": "nesterov",
    "velocity_scaling": "velocityScaling",
    "eps": "eps",
    "alpha": "alpha",
    "max_weight_norm": "maxWeightNorm",
}
_IGNORED = frozenset(
    [
        "params",
        "maximize",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
        "amsgrad",
        "centered",
        "initial_lr",
        "decoupled_weight_decay",
    ]
)
_TORCH_KINDS = {
    torch.optim.SGD: "SGD",
    torch.optim.Adam: "ADAM",
    torch.optim.AdamW: "ADAMW",
    torch.optim.RMSprop: "RMSPROP",
}


class VariableAttributes:
    """Which values of an optimizer may change after the model was compiled.

    Args:
        constant: Names that are constant.
        known: All names.
    """

    def __init__(self, constant: list[str], known: list[str]) -> None:
        self._constant = set(constant)
        self._known = set(known)

    def isConstant(self, name: str) -> bool:
        """Tell whether a value is compiled in."""
        return name in self._constant

    def markAsConstant(self, name: str) -> None:
        """Compile a value in."""
        self._check(name)
        self._constant.add(name)

    def markAsVariable(self, name: str) -> None:
        """Let a value change."""
        self._check(name)
        self._constant.discard(name)

    def _check(self, name: str) -> None:
        if name not in self._known:
            raise KeyError(f"{name} is not a value of this optimizer: {sorted(self._known)}")


def collect(values: dict[str, tuple[Any, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the effective values and the names that were omitted."""
    effective = {
        name: default if given is None else given for name, (given, default) in values.items()
    }
    return effective, [name for name, (given, _) in values.items() if given is None]


def accum_type(name: str, kind: Any) -> Any:
    """Return the type, refusing all but float16 and float32.

    Raises:
        AssertionError: Another type.
    """
    require(
        kind in (None, torch.float16, torch.float32),
        f"{name} must be torch.float16 or torch.float32, got {kind}",
    )
    return kind


def clip_norm(norm: Any) -> Any:
    """Return the norm, refusing what is not a positive number.

    Raises:
        AssertionError: Not above 0.
    """
    require(
        norm is None or (isinstance(norm, (int, float)) and norm > 0),
        f"max_grad_norm must be above 0, got {norm!r}",
    )
    return norm


def popart_type(optimizer: Any) -> str:
    """Return the kind of optimizer that the device runs.

    Raises:
        AssertionError: PopART has no such optimizer.
    """
    kind = getattr(optimizer, "popart_type", "")
    if not kind:
        kind = next(
            (name for base, name in _TORCH_KINDS.items() if isinstance(optimizer, base)), ""
        )
        # torch's AdamW is a subclass of Adam in newer releases.
        if isinstance(optimizer, torch.optim.AdamW):
            kind = "ADAMW"
    require(bool(kind), f"Unsupported optimizer type {type(optimizer).__name__}")
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError("Adam and AdamW with amsgrad=True are not supported")
    if len({bool(group.get("centered")) for group in optimizer.param_groups}) > 1:
        raise ValueError("RMSprop: 'centered' must be the same in all groups")
    return str(kind)


def device_values(optimizer: Any) -> dict[str, Any]:
    """Return everything the device gets: ``(value, is constant)`` by name, for each group."""
    kind = popart_type(optimizer)
    _warn_unknown(optimizer)
    wide = optimizer.wide_values() if hasattr(optimizer, "wide_values") else {}
    groups = [_group_values(optimizer, group) for group in optimizer.param_groups]
    return {
        "optimizer_type": kind,
        "accumType": wide.get("accum_type", torch.float32),
        "firstOrderMomentumAccumType": wide.get(
            "first_order_momentum_accum_type", wide.get("velocity_accum_type", torch.float32)
        ),
        "secondOrderMomentumAccumType": wide.get("second_order_momentum_accum_type", torch.float32),
        "maxGradNorm": float(wide.get("max_grad_norm", float("inf"))),
        "useCombinedAccum": bool(getattr(optimizer, "use_combined_accum", False)),
        "useTfVariant": bool(getattr(optimizer, "use_tf_variant", False)),
        "centered": bool(optimizer.param_groups[0].get("centered", False)),
        "lossScaling": (
            float(wide.get("loss_scaling", 1.0)),
            _is_constant(optimizer, "loss_scaling", wide.get("loss_scaling", 1.0)),
        ),
        "groups": groups,
    }


def _group_values(optimizer: Any, group: dict[str, Any]) -> dict[str, tuple[Any, bool]]:
    values: dict[str, tuple[Any, bool]] = {}
    for name, target in _BACKEND_NAMES.items():
        if name in group:
            kind = bool if name == "nesterov" else float
            values[target] = (kind(group[name]), _is_constant(optimizer, name, group[name]))
    if "betas" in group:
        constant = _is_constant(optimizer, "betas", group["betas"])
        values["beta1"] = (float(group["betas"][0]), constant)
        values["beta2"] = (float(group["betas"][1]), constant)
    return values


def _is_constant(optimizer: Any, name: str, value: Any) -> bool:
    attributes = getattr(optimizer, "variable_attrs", None)
    if attributes is not None:
        return bool(attributes.isConstant(name))
    if name == "lr":
        return False
    # torch's own: constant when equal to the default of its signature.
    parameter = inspect.signature(type(optimizer).__init__).parameters.get(name)
    default = parameter.default if parameter is not None else value
    return bool(value == default)


def _warn_unknown(optimizer: Any) -> None:
    known = _IGNORED | set(_BACKEND_NAMES) | {"betas"}
    for index, group in enumerate(optimizer.param_groups):
        if group.get("maximize"):
            _LOG.warning("maximize of optimizer group %d is ignored by the device", index)
        unknown = sorted(set(group) - known)
        if unknown:
            _LOG.warning("Ignoring unexpected attributes of optimizer group %d: %s", index, unknown)


def changed_constant(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return what changed although it was compiled in; empty if nothing did."""
    for name in ("optimizer_type", "maxGradNorm", "useCombinedAccum", "useTfVariant", "centered"):
        if old[name] != new[name]:
            return f"{name} from {old[name]} to {new[name]}"
    if len(old["groups"]) != len(new["groups"]):
        return f"the number of groups from {len(old['groups'])} to {len(new['groups'])}"
    pairs = [({"lossScaling": old["lossScaling"]}, {"lossScaling": new["lossScaling"]})]
    pairs += list(zip(old["groups"], new["groups"]))
    for before, after in pairs:
        for name in [name for name in before if name in after]:
            value, constant = before[name]
            if constant and after[name][0] != value:
                return f"the constant {name} from {value} to {after[name][0]}"
            if constant != after[name][1]:
                return f"{name} from {_word(constant)} to {_word(after[name][1])}"
    return ""


def _word(constant: bool) -> str:
    return "constant" if constant else "variable"
