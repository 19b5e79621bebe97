"""PopART's optimizers on plain tensors, in float32 unless a state has another type.

Formulas: PopART's adam.hpp (Adam, AdamW, LAMB) and the documented SGD and RMSprop; gradients come
in reduced and without the loss scaling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import backend_error
from .options_base import require

_FIRST, _SECOND, _MEAN, _STEP = "Accl1___", "Accl2___", "Accl3___", "Step___"


class DeviceOptimizer:
    """State and update of all weights.

    Args:
        values: What ``optim_base.device_values`` made.
        groups: Group of every parameter, by name.
    """

    def __init__(self, values: dict[str, Any], groups: dict[str, int]) -> None:
        self.values = values
        self._groups = groups
        self.state: dict[str, Tensor] = {}

    @property
    def loss_scaling(self) -> float:
        """Factor of the loss before the backward pass."""
        return float(self.values["lossScaling"][0])

    def load(self, state: dict[str, Tensor]) -> None:
        """Replace the state.

        Raises:
            Error: A name that belongs to no parameter.
        """
        for key in state:
            if key.split("___", 1)[-1] not in self._groups:
                raise backend_error(f"The optimizer state {key} belongs to no parameter")
        self.state = {key: tensor.detach().clone() for key, tensor in state.items()}

    def update(self, gradients: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        """Change the parameters that have a gradient."""
        with torch.no_grad():
            self._clip(gradients)
            for name, gradient in gradients.items():
                values = {k: v for k, (v, _) in self.values["groups"][self._groups[name]].items()}
                weight = parameters[name]
                change = self._change(name, gradient.float(), weight.float(), values)
                weight.copy_(weight.float() - values["learningRate"] * change)

    def _clip(self, gradients: dict[str, Tensor]) -> None:
        limit = self.values["maxGradNorm"]
        if limit == float("inf") or not gradients:
            return
        norm = torch.stack([gradient.float().norm() for gradient in gradients.values()]).norm()
        for name in gradients:
            gradients[name] = gradients[name] * (limit / torch.clamp(norm, min=limit))

    def _change(
        self, name: str, gradient: Tensor, weight: Tensor, values: dict[str, Any]
    ) -> Tensor:
        kind = self.values["optimizer_type"]
        if kind == "SGD":
            return self._sgd(name, gradient, weight, values)
        if kind == "RMSPROP":
            return self._rmsprop(name, gradient, weight, values)
        if kind == "ADAM":
            gradient = gradient + values["weightDecay"] * weight
            return self._adam(name, gradient, values)
        change = self._adam(name, gradient, values) + values["weightDecay"] * weight
        if kind.startswith("LAMB"):
            change = change * _trust(weight, change, values["maxWeightNorm"])
        return change

    def _adam(self, name: str, gradient: Tensor, values: dict[str, Any]) -> Tensor:
        beta1, beta2 = values["beta1"], values["beta2"]
        first = beta1 * self._get(_FIRST, name, gradient) + (1 - beta1) * gradient
        second = beta2 * self._get(_SECOND, name, gradient) + (1 - beta2) * gradient * gradient
        self._put(_FIRST, name, first)
        self._put(_SECOND, name, second)
        step = self._get(_STEP, name, gradient.new_zeros(())) + 1
        self._put(_STEP, name, step)
        if self.values["optimizer_type"] == "LAMB_NO_BIAS":
            return first / (second.sqrt() + values["eps"])
        # AdamW's switch is lost on its way to the device (SDK 2.5 to 3.4): always corrected.
        count = int(step)
        first = first / (1 - beta1**count)
        second = second / (1 - beta2**count)
        return first / (second.sqrt() + values["eps"])

    def _sgd(self, name: str, gradient: Tensor, weight: Tensor, values: dict[str, Any]) -> Tensor:
        gradient = gradient + values["weightDecay"] * weight
        momentum = values["momentum"]
        if momentum == 0.0:
            return gradient * (1 - values["dampening"])
        velocity = momentum * self._get(_FIRST, name, gradient)
        velocity = velocity + (1 - values["dampening"]) * gradient
        self._put(_FIRST, name, velocity)
        return gradient + momentum * velocity if values["nesterov"] else velocity

    def _rmsprop(
        self, name: str, gradient: Tensor, weight: Tensor, values: dict[str, Any]
    ) -> Tensor:
        gradient = gradient + values["weightDecay"] * weight
        alpha, momentum = values["alpha"], values["momentum"]
        square = alpha * self._get(_SECOND, name, gradient) + (1 - alpha) * gradient * gradient
        self._put(_SECOND, name, square)
        if self.values["centered"]:
            mean = alpha * self._get(_MEAN, name, gradient) + (1 - alpha) * gradient
            self._put(_MEAN, name, mean)
            square = square - mean * mean
        if self.values["useTfVariant"]:
            change = gradient / (square + values["eps"]).sqrt()
        else:
            change = gradient / (square.sqrt() + values["eps"])
        if momentum == 0.0:
            return change
        velocity = momentum * self._get(_FIRST, name, gradient) + change
        self._put(_FIRST, name, velocity)
        return velocity

    def _get(self, prefix: str, name: str, like: Tensor) -> Tensor:
        found = self.state.get(prefix + name)
        if found is None:
            return torch.zeros_like(like)
        require(found.shape == like.shape, f"The optimizer state of {name} has another shape")
        return found.float()

    def _put(self, prefix: str, name: str, value: Tensor) -> None:
        kind = {
            _FIRST: self.values["firstOrderMomentumAccumType"],
            _SECOND: self.values["secondOrderMomentumAccumType"],
        }.get(prefix, torch.float32)
        self.state[prefix + name] = value.to(kind)


def _trust(weight: Tensor, change: Tensor, max_weight_norm: float) -> Tensor:
    """Return LAMB's ratio of norms; 1 where one of them is 0."""
    above = torch.clamp(weight.norm(), max=max_weight_norm)
    below = change.norm()
    return torch.where((above > 0) & (below > 0), above / below, torch.ones_like(above))
