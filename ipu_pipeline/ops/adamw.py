"""torch.optim.AdamW with our kernel: one pass over memory, and stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.ops.adamw_step import LOW_PRECISION, AdamWSettings, AdamWTensors, adamw_step
from ipu_pipeline.ops.random import derive_seed

_DTYPES = (torch.float32, torch.float64, *LOW_PRECISION)
_AVERAGES = ("exp_avg", "exp_avg_sq")
# Group settings that torch's optimizer does not have: kept when its state is loaded.
_OWN = ("stochastic_rounding", "seed")
# Group settings that choose one of torch's ways to compute: without meaning here.
_TORCH_ONLY = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with one fused kernel, and stochastic rounding of 16-bit weights.

    The running averages of bfloat16 and float16 weights are float32. State dicts load into
    ``torch.optim.AdamW`` and the other way round; averages of 16 bits that come so are kept so.
    Parameters without a gradient are skipped.

    Args:
        params: Parameters, named parameters or groups, as for torch.
        lr: Learning rate, at least 0.
        betas: Decay rates of the two running averages, each in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: Decoupled: every step multiplies a weight by ``1 - lr * weight_decay``.
        amsgrad: Must be False.
        maximize: Ascend instead of descend.
        stochastic_rounding: Round bfloat16 and float16 weights at random after each step; does
            nothing to others. The random numbers depend on ``seed``, the weight's step, its
            position among the parameters it was made with and the element only.
        seed: Of the stochastic rounding.

    Raises:
        ValueError: A setting is out of range, ``amsgrad`` is set, or a parameter is of another
            type than float32, float64, bfloat16 and float16.
    """

    def __init__(  # noqa: PLR0913  # torch's signature
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self._positions: dict[Tensor, int] = {}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        own = {"stochastic_rounding": stochastic_rounding, "seed": seed}
        self.defaults.update(own)
        for group in self.param_groups:
            _fill(group, own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, as torch's optimizers do.

        Raises:
            ValueError: The group wants ``amsgrad``, or a parameter's type is not supported.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _refuse_amsgrad(group)
            for parameter in group["params"]:
                _check_dtype(parameter)
        except ValueError:
            self.param_groups.pop()
            raise
        self._number(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what pickling and copying leave of an optimizer."""
        super().__setstate__(state)
        self.__dict__.setdefault("_positions", {})
        for group in self.param_groups:
            self._number(group)

    def _number(self, group: dict[str, Any]) -> None:
        """Note where parameters stand; others may be taken out of the groups later."""
        for parameter in group["params"]:
            self._position(parameter)

    def _position(self, parameter: Tensor) -> int:
        return self._positions.setdefault(parameter, len(self._positions))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What ``closure`` returns, else ``None``.

        Raises:
            ValueError: A gradient is sparse; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            _check_gradients(group["params"], number)
        for group in self.param_groups:
            tensors = self._tensors(group)
            if tensors.weights:
                adamw_step(tensors, _settings(group))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer or of torch.optim.AdamW.

        Settings come from the state, except those that it does not have. Averages keep their
        type; torch itself would round float32 ones of a 16-bit weight.

        Raises:
            ValueError: The state is that of ``amsgrad``; nothing was changed.
        """
        for saved in state_dict["param_groups"]:
            _refuse_amsgrad(saved)
        own = [{name: group[name] for name in _OWN} for group in self.param_groups]
        super().load_state_dict(state_dict)
        pairs = zip(self.param_groups, own, state_dict["param_groups"], strict=True)
        for group, settings, saved in pairs:
            _fill(group, settings)
            group.update(_TORCH_ONLY)
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                self._restore_precision(parameter, state_dict["state"].get(key, {}))

    def _restore_precision(self, parameter: Tensor, saved: dict[str, Any]) -> None:
        for name in _AVERAGES:
            value = saved.get(name)
            if value is not None and _narrow(parameter) and value.dtype == torch.float32:
                self.state[parameter][name] = value.to(parameter.device)

    def _tensors(self, group: dict[str, Any]) -> AdamWTensors:
        """Collect what a group's step reads and writes; begins the state of new parameters."""
        tensors = AdamWTensors()
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self._state(parameter)
            tensors.weights.append(parameter)
            tensors.gradients.append(_fitting(parameter.grad, parameter))
            tensors.exp_avgs.append(state["exp_avg"])
            tensors.exp_avg_sqs.append(state["exp_avg_sq"])
            tensors.steps.append(state["step"])
            if group["stochastic_rounding"]:
                step, position = int(state["step"]), self._position(parameter)
                tensors.keys.append(derive_seed("adamw", group["seed"], step, position))
        return tensors

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """Return the parameter's state, with averages of a type that fits its present one."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            dtype = torch.float32 if _narrow(parameter) else parameter.dtype
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in _AVERAGES:
                state[name] = torch.zeros_like(
                    parameter, dtype=dtype, memory_format=torch.contiguous_format
                )
        for name in _AVERAGES:
            state[name] = _fitting(state[name], parameter)
        return state


def _settings(group: dict[str, Any]) -> AdamWSettings:
    beta1, beta2 = group["betas"]
    return AdamWSettings(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=bool(group["maximize"]),
    )


def _fill(group: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        group.setdefault(name, value)


def _narrow(parameter: Tensor) -> bool:
    return parameter.dtype in LOW_PRECISION


def _fitting(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor in a type that the kernel takes beside this parameter."""
    if tensor.dtype == parameter.dtype or (_narrow(parameter) and tensor.dtype == torch.float32):
        return tensor
    return tensor.to(torch.float32 if _narrow(parameter) else parameter.dtype)


def _refuse_amsgrad(group: dict[str, Any]) -> None:
    if group.get("amsgrad"):
        raise ValueError(
            "this AdamW does not keep the largest second moment (amsgrad=True); set amsgrad=False, "
            "or use torch.optim.AdamW"
        )


def _check_dtype(parameter: Tensor) -> None:
    if parameter.dtype not in _DTYPES:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; this AdamW "
            "updates float32, float64, bfloat16 and float16, use torch.optim.AdamW for others"
        )


def _check_gradients(parameters: Sequence[Tensor], group: int) -> None:
    for position, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is not None and gradient.layout != torch.strided:
            raise ValueError(
                f"parameter {position} of group {group}, of shape {tuple(parameter.shape)}, has a "
                f"gradient of layout {gradient.layout}; AdamW changes every element in every "
                "step: make it dense (grad.to_dense(), or sparse=False in the embedding), or use "
                "torch.optim.SparseAdam"
            )
