"""``poptorch.optim``: optimizers whose arguments are variable when given, constant when omitted.

The device runs PopART's own formulas on these values; ``step()`` of the Python object is never
called. Omitted arguments (``None``) take the default and are compiled in as constants, lr included.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any, Callable, ClassVar

import torch

from .optim_base import VariableAttributes, accum_type, clip_norm, collect

_LOG = logging.getLogger("poptorch")
# What every parameter group has its own value of.
_OF_GROUPS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "alpha": 0.99,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "velocity_scaling": 1.0,
    "max_weight_norm": 65500.0,
}
# What all groups share.
_SHARED: dict[str, Any] = {
    "loss_scaling": 1.0,
    "accum_type": torch.float32,
    "velocity_accum_type": torch.float32,
    "first_order_momentum_accum_type": torch.float32,
    "second_order_momentum_accum_type": torch.float32,
    "max_grad_norm": float("inf"),
}
# Switches of the program, which are no values.
_SWITCHES = {"bias_correction": True, "use_combined_accum": False, "use_tf_variant": False}
_MOMENTA = "first_order_momentum_accum_type second_order_momentum_accum_type"


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers below, each of which names its arguments in the front end's order."""

    popart_type = ""
    arguments: ClassVar[str] = ""
    required: ClassVar[tuple[str, ...]] = ()
    own_defaults: ClassVar[dict[str, Any]] = {}
    variable_attrs: VariableAttributes
    ipu_state: dict[str, Any] | None
    ipu_param: dict[str, Any] | None
    _shared: dict[str, None]
    _read_device: Callable[[], None] | None
    _state_is_new: bool

    def __init__(self, params: Any, *values: Any, **named: Any) -> None:
        """Store the values; ``None`` is an omitted one."""
        given = self._given(values, named)
        self._check(given)
        for name in _SWITCHES.keys() & given:
            switch = given.pop(name)
            setattr(self, name, _SWITCHES[name] if switch is None else bool(switch))
        defaults = {**_OF_GROUPS, **_SHARED, **self.own_defaults}
        known = {name: (given.pop(name), defaults[name]) for name in [*given] if name in defaults}
        stored, omitted = collect(known)
        if "centered" in given:
            given["centered"] = bool(given["centered"])
        if "amsgrad" in given:
            given["amsgrad"] = bool(given["amsgrad"])
        self._shared = {}
        self._read_device = None
        self._state_is_new = False
        self.ipu_state, self.ipu_param = None, None
        self.variable_attrs = VariableAttributes(omitted, list(stored))
        # torch keeps what is left, which the device ignores, in its groups, too.
        super().__init__(params, {**{k: v for k, v in stored.items() if k not in _SHARED}, **given})
        self._shared = {name: None for name in stored if name in _SHARED}
        for name in self._shared:
            setattr(self, name, stored[name])

    def _given(self, values: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Return every argument by name.

        Raises:
            TypeError: An unknown or repeated one, or a missing one.
        """
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([
            inspect.Parameter(
                name, kind, default=inspect.Parameter.empty if name in self.required else None
            )
            for name in self.arguments.split()
        ])  # fmt: skip
        bound = signature.bind(*values, **named)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _check(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if name.endswith("accum_type"):
                accum_type(name, value)
        clip_norm(given.get("max_grad_norm"))
        # SDK 2.5 to 3.4 correct AdamW's bias on the device even when it is switched off here.
        if given.get("bias_correction") is False:
            self.popart_type += "_NO_BIAS"

    def wide_values(self) -> dict[str, Any]:
        """Return the values that all groups share."""
        return {name: getattr(self, name) for name in self._shared}

    def step(self, closure: Any = None) -> Any:
        """Refuse: the device updates the weights.

        Raises:
            RuntimeError: Always.
        """
        del closure
        raise RuntimeError(
            "poptorch optimizers do not update weights on the host: call the training model, "
            "and setOptimizer() after changing a value"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return torch's dict with ``ipu_state`` and ``ipu_param`` added."""
        if self._read_device is not None:
            self._read_device()
        found = dict(super().state_dict())
        found["ipu_state"] = None if self.ipu_state is None else dict(self.ipu_state)
        found["ipu_param"] = None if self.ipu_param is None else dict(self.ipu_param)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; the executor uploads it before its next run.

        Raises:
            RuntimeError: The state of a torch optimizer.
        """
        if "ipu_state" not in state_dict or "ipu_param" not in state_dict:
            raise RuntimeError(
                "Only the state of a poptorch optimizer can be loaded: 'ipu_state' or "
                "'ipu_param' is missing"
            )
        own = {key: state_dict[key] for key in ("state", "param_groups")}
        super().load_state_dict(own)
        self.ipu_state, self.ipu_param = state_dict["ipu_state"], state_dict["ipu_param"]
        self._state_is_new = self.ipu_state is not None

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "step"}
        return {**kept, "_read_device": None}


class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    popart_type = "SGD"
    arguments = (
        "lr momentum dampening weight_decay nesterov maximize foreach differentiable loss_scaling "
        "velocity_scaling use_combined_accum accum_type velocity_accum_type max_grad_norm"
    )
    required = ("lr",)

    def _check(self, given: dict[str, Any]) -> None:
        super()._check(given)
        if given["velocity_scaling"] is not None and not given["use_combined_accum"]:
            _LOG.warning("velocity_scaling is ignored without use_combined_accum=True")


class Adam(Optimizer):
    """Adam with weight decay added to the gradient."""

    popart_type = "ADAM"
    arguments = (
        "lr betas eps weight_decay amsgrad foreach maximize capturable differentiable fused "
        f"loss_scaling accum_type {_MOMENTA} max_grad_norm"
    )


class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    popart_type = "ADAMW"
    arguments = (
        "lr betas eps weight_decay amsgrad maximize foreach capturable differentiable fused "
        f"loss_scaling bias_correction accum_type {_MOMENTA} max_grad_norm"
    )
    own_defaults: ClassVar[dict[str, Any]] = {"weight_decay": 1e-2}


class LAMB(Optimizer):
    """Layer-wise adaptive moments; takes no max_grad_norm."""

    popart_type = "LAMB"
    arguments = (
        "lr betas eps weight_decay bias_correction loss_scaling max_weight_norm accum_type "
        f"{_MOMENTA}"
    )
    own_defaults: ClassVar[dict[str, Any]] = {"weight_decay": 1e-2}


class RMSprop(Optimizer):
    """RMSprop; takes no max_grad_norm."""

    popart_type = "RMSPROP"
    arguments = (
        "lr alpha eps weight_decay momentum centered foreach maximize differentiable loss_scaling "
        f"accum_type {_MOMENTA} use_tf_variant"
    )
    own_defaults: ClassVar[dict[str, Any]] = {"lr": 1e-2}
