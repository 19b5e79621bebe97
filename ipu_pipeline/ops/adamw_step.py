"""One AdamW step of a whole list of weights, in one pass over memory.

The kernel reads every weight, gradient and average once and writes them once, in one parallel
region over all tensors. Weights of 16 bits are updated in float32 and rounded back, at random if
wished, as IPUs do: an update smaller than half of a weight's spacing is lost when rounding to
nearest, and right on average when rounding at random.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.rounding import stochastic_round

# Updated in float32, and rounded back.
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdamWSettings:
    """What one step of a parameter group depends on; names and meaning of torch.optim.AdamW."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    maximize: bool = False


@dataclass
class AdamWTensors:
    """The tensors of a group, position by position; all but the gradients are updated in place.

    Attributes:
        weights: float32, bfloat16, float16 or float64.
        gradients: Of the weight's type, or float32 where the weight has 16 bits.
        exp_avgs: Running mean of the gradients; types as for the gradients.
        exp_avg_sqs: Running mean of their squares, of the same type as ``exp_avgs``.
        steps: Scalars, the number of steps taken before this one.
        keys: One below 2**63 per weight: those of 16 bits are rounded at random by these; empty:
            to nearest.
    """

    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


@torch.no_grad()
def adamw_step(tensors: AdamWTensors, settings: AdamWSettings) -> None:
    """Take one AdamW step of a list of weights, in place.

    Results do not depend on the number of threads. In float32 they agree with
    ``torch.optim.AdamW(foreach=False)`` up to rounding: the operations come in the same order.

    Args:
        tensors: What is updated; dense, of any strides.
        settings: What the update depends on.

    Raises:
        RuntimeError: From the kernel: lists, shapes or types do not match.

    Source:
        Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019.
    """
    on_cpu = all(weight.device.type == "cpu" for weight in tensors.weights)
    if not (on_cpu and extension.available()):
        return _plain_step(tensors, settings)
    lists = (tensors.weights, tensors.gradients, tensors.exp_avgs, tensors.exp_avg_sqs)
    _operator()(*lists, tensors.steps, **vars(settings), keys=tensors.keys)
    return None


@functools.cache
def _operator() -> Any:
    """Return the C++ operator; its library is loaded."""

    def changes_in_place_only(*_args: Any, **_kwargs: Any) -> None:
        return None

    extension.register_fakes(adamw_step=changes_in_place_only)
    return torch.ops.ipu_pipeline.adamw_step.default


def _plain_step(tensors: AdamWTensors, settings: AdamWSettings) -> None:
    for position, weight in enumerate(tensors.weights):
        tensors.steps[position] += 1
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        averages = tensors.exp_avgs[position], tensors.exp_avg_sqs[position]
        mean, square = (average.to(wide) for average in averages)
        updated = weight.to(wide)
        gradient = tensors.gradients[position].to(wide)
        step = float(tensors.steps[position])
        _plain_update(updated, gradient, mean, square, step=step, settings=settings)
        for average, new in zip(averages, (mean, square), strict=True):
            _store(average, new)
        if tensors.keys and weight.dtype in LOW_PRECISION:
            updated = stochastic_round(updated, weight.dtype, tensors.keys[position])
        _store(weight, updated)


def _plain_update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    settings: AdamWSettings,
) -> None:
    s = settings
    if s.maximize:
        gradient = -gradient
    exp_avg.lerp_(gradient, 1 - s.beta1)
    exp_avg_sq.mul_(s.beta2).addcmul_(gradient, gradient, value=1 - s.beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - s.beta2**step) ** 0.5).add_(s.eps)
    weight.mul_(1 - s.lr * s.weight_decay)
    weight.addcdiv_(exp_avg, denominator, value=-s.lr / (1 - s.beta1**step))


def _store(tensor: Tensor, new: Tensor) -> None:
    """Copy unless ``new`` is the tensor itself, already updated in place."""
    if new is not tensor:
        tensor.copy_(new)
