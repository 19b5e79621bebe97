"""``poptorch.optim``: optimizers whose arguments are variable when given, constant when omitted.

The device runs PopART's own formulas on these values; ``step()`` of the Python object is never
called. Omitted arguments (``None``) take the default and are compiled in as constants, lr included.
"""

from __future__ import annotations

from typing import Any, Callable

import torch

from .optim_base import VariableAttributes, accum_type, clip_norm, collect


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers below."""

    popart_type = ""
    _wide: dict[str, Any]
    variable_attrs: VariableAttributes
    ipu_state: dict[str, Any]
    ipu_param: dict[str, Any]
    _read_device: Callable[[], None] | None
    _state_is_new: bool

    def _setup(
        self,
        params: Any,
        group: dict[str, tuple[Any, Any]],
        wide: dict[str, tuple[Any, Any]],
        ignored: dict[str, Any],
    ) -> None:
        """Store values; each is ``(given, default)`` and omitted when given is ``None``."""
        values, omitted = collect({**group, **wide})
        self._wide = {}
        self._read_device = None
        self._state_is_new = False
        self.ipu_state, self.ipu_param = {}, {}
        self.variable_attrs = VariableAttributes(omitted, list(values))
        super().__init__(params, {**{name: values[name] for name in group}, **ignored})
        for name in wide:
            setattr(self, name, values[name])
        self._wide = {name: None for name in wide}

    def wide_values(self) -> dict[str, Any]:
        """Return the values that all groups share."""
        return {name: getattr(self, name) for name in self._wide}

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
        found["ipu_state"] = dict(self.ipu_state)
        found["ipu_param"] = dict(self.ipu_param)
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
        self.ipu_state = dict(state_dict["ipu_state"])
        self.ipu_param = dict(state_dict["ipu_param"])
        self._state_is_new = True

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "step"}
        return {**kept, "_read_device": None}


class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    popart_type = "SGD"

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float | None = None,
        dampening: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool | None = None,
        maximize: bool | None = None,
        foreach: bool | None = None,
        differentiable: bool | None = None,
        loss_scaling: float | None = None,
        velocity_scaling: float | None = None,
        use_combined_accum: bool | None = None,
        accum_type: torch.dtype | None = None,
        velocity_accum_type: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        combined = bool(use_combined_accum)
        if combined and (accum_type is not None or velocity_accum_type is not None):
            raise ValueError("accum_type and velocity_accum_type exclude use_combined_accum=True")
        if not combined and velocity_scaling is not None:
            raise ValueError("velocity_scaling needs use_combined_accum=True")
        self.use_combined_accum = combined
        self._setup(
            params,
            {
                "lr": (lr, lr),
                "momentum": (momentum, 0.0),
                "dampening": (dampening, 0.0),
                "weight_decay": (weight_decay, 0.0),
                "nesterov": (nesterov, False),
                "velocity_scaling": (velocity_scaling, 1.0),
            },
            {
                **_scaling(loss_scaling, accum_type, max_grad_norm),
                "velocity_accum_type": _accum("velocity_accum_type", velocity_accum_type),
            },
            {"maximize": maximize, "foreach": foreach, "differentiable": differentiable},
        )


class Adam(Optimizer):
    """Adam with weight decay added to the gradient."""

    popart_type = "ADAM"

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        amsgrad: bool | None = None,
        foreach: bool | None = None,
        maximize: bool | None = None,
        capturable: bool | None = None,
        differentiable: bool | None = None,
        fused: bool | None = None,
        loss_scaling: float | None = None,
        accum_type: torch.dtype | None = None,
        first_order_momentum_accum_type: torch.dtype | None = None,
        second_order_momentum_accum_type: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        _refuse_amsgrad(amsgrad)
        self._setup(
            params,
            _adam_group(lr, betas, eps, weight_decay, decay_default=0.0),
            {
                **_scaling(loss_scaling, accum_type, max_grad_norm),
                **_momenta(first_order_momentum_accum_type, second_order_momentum_accum_type),
            },
            _ignored(foreach, maximize, capturable, differentiable, fused),
        )


class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    popart_type = "ADAMW"

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        amsgrad: bool | None = None,
        maximize: bool | None = None,
        foreach: bool | None = None,
        capturable: bool | None = None,
        differentiable: bool | None = None,
        fused: bool | None = None,
        loss_scaling: float | None = None,
        bias_correction: bool | None = None,
        accum_type: torch.dtype | None = None,
        first_order_momentum_accum_type: torch.dtype | None = None,
        second_order_momentum_accum_type: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        _refuse_amsgrad(amsgrad)
        # SDK 2.5 to 3.4 correct the bias on the device even when it is switched off here.
        self.bias_correction = bias_correction is not False
        if not self.bias_correction:
            self.popart_type = "ADAMW_NO_BIAS"
        self._setup(
            params,
            _adam_group(lr, betas, eps, weight_decay, decay_default=1e-2),
            {
                **_scaling(loss_scaling, accum_type, max_grad_norm),
                **_momenta(first_order_momentum_accum_type, second_order_momentum_accum_type),
            },
            _ignored(foreach, maximize, capturable, differentiable, fused),
        )


class LAMB(Optimizer):
    """Layer-wise adaptive moments; takes no max_grad_norm."""

    popart_type = "LAMB"

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        bias_correction: bool | None = None,
        loss_scaling: float | None = None,
        max_weight_norm: float | None = None,
        accum_type: torch.dtype | None = None,
        first_order_momentum_accum_type: torch.dtype | None = None,
        second_order_momentum_accum_type: torch.dtype | None = None,
    ) -> None:
        self.bias_correction = bias_correction is not False
        if not self.bias_correction:
            self.popart_type = "LAMB_NO_BIAS"
        group = _adam_group(lr, betas, eps, weight_decay, decay_default=1e-2)
        group["max_weight_norm"] = (max_weight_norm, 65500.0)
        self._setup(
            params,
            group,
            {
                "loss_scaling": (loss_scaling, 1.0),
                "accum_type": _accum("accum_type", accum_type),
                **_momenta(first_order_momentum_accum_type, second_order_momentum_accum_type),
            },
            {},
        )


class RMSprop(Optimizer):
    """RMSprop; takes no max_grad_norm."""

    popart_type = "RMSPROP"

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        alpha: float | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        momentum: float | None = None,
        centered: bool | None = None,
        foreach: bool | None = None,
        maximize: bool | None = None,
        differentiable: bool | None = None,
        loss_scaling: float | None = None,
        accum_type: torch.dtype | None = None,
        first_order_momentum_accum_type: torch.dtype | None = None,
        second_order_momentum_accum_type: torch.dtype | None = None,
        use_tf_variant: bool | None = None,
    ) -> None:
        self.use_tf_variant = bool(use_tf_variant)
        self._setup(
            params,
            {
                "lr": (lr, 1e-2),
                "alpha": (alpha, 0.99),
                "eps": (eps, 1e-8),
                "weight_decay": (weight_decay, 0.0),
                "momentum": (momentum, 0.0),
            },
            {
                "loss_scaling": (loss_scaling, 1.0),
                "accum_type": _accum("accum_type", accum_type),
                **_momenta(first_order_momentum_accum_type, second_order_momentum_accum_type),
            },
            {
                "centered": bool(centered),
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
            },
        )


def _adam_group(
    lr: Any, betas: Any, eps: Any, weight_decay: Any, *, decay_default: float
) -> dict[str, tuple[Any, Any]]:
    return {
        "lr": (lr, 1e-3),
        "betas": (betas, (0.9, 0.999)),
        "eps": (eps, 1e-8),
        "weight_decay": (weight_decay, decay_default),
    }


def _scaling(loss_scaling: Any, kind: Any, max_grad_norm: Any) -> dict[str, tuple[Any, Any]]:
    return {
        "loss_scaling": (loss_scaling, 1.0),
        "accum_type": _accum("accum_type", kind),
        "max_grad_norm": (clip_norm(max_grad_norm), float("inf")),
    }


def _accum(name: str, kind: Any) -> tuple[Any, Any]:
    return accum_type(name, kind), torch.float32


def _momenta(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    return {
        "first_order_momentum_accum_type": _accum("first_order_momentum_accum_type", first),
        "second_order_momentum_accum_type": _accum("second_order_momentum_accum_type", second),
    }


def _ignored(
    foreach: Any, maximize: Any, capturable: Any, differentiable: Any, fused: Any
) -> dict[str, Any]:
    return {
        "foreach": foreach,
        "maximize": maximize,
        "capturable": capturable,
        "differentiable": differentiable,
        "fused": fused,
    }


def _refuse_amsgrad(amsgrad: Any) -> None:
    if amsgrad:
        raise ValueError("Adam and AdamW with amsgrad=True are not supported")
