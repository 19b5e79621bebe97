"""AdamW over a whole list of weights in one pass over memory, with stochastic rounding.

The kernel reads every weight, gradient and average once and writes them once, in one parallel
region over all tensors. Weights of 16 bits are updated in float32 and rounded back, at random if
wished, as IPUs do: an update smaller than half of a weight's spacing is lost when rounding to
nearest, and right on average when rounding at random.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.random import derive_seed
from ipu_pipeline.ops.rounding import stochastic_round

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_LOW_PRECISION)
_AVERAGES = ("exp_avg", "exp_avg_sq")
# Group settings that torch's optimizer does not have: kept when its state is loaded.
_OWN = ("stochastic_rounding", "seed")
# Group settings that choose one of torch's ways to compute: without meaning here.
_TORCH_ONLY = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}


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

    torch.library.register_fake("ipu_pipeline::adamw_step", changes_in_place_only)
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
        if tensors.keys and weight.dtype in _LOW_PRECISION:
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
            position among the parameters and the element only.
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
        first = 0
        work = []
        for number, group in enumerate(self.param_groups):
            _check_gradients(group["params"], number)
            work.append((group, first))
            first += len(group["params"])
        for group, first_index in work:
            tensors = self._tensors(group, first_index)
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

    def _tensors(self, group: dict[str, Any], first_index: int) -> AdamWTensors:
        """Collect what a group's step reads and writes; begins the state of new parameters."""
        tensors = AdamWTensors()
        for index, parameter in enumerate(group["params"], first_index):
            if parameter.grad is None:
                continue
            state = self._state(parameter)
            tensors.weights.append(parameter)
            tensors.gradients.append(_fitting(parameter.grad, parameter))
            tensors.exp_avgs.append(state["exp_avg"])
            tensors.exp_avg_sqs.append(state["exp_avg_sq"])
            tensors.steps.append(state["step"])
            if group["stochastic_rounding"]:
                step = int(state["step"])
                tensors.keys.append(derive_seed("adamw", group["seed"], step, index))
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
    return parameter.dtype in _LOW_PRECISION


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
