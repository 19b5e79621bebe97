"""AdamW whose bfloat16 weights are rounded at random, with float32 averages.

An update smaller than half of a weight's spacing is lost when it is rounded to nearest, and right
on average when it is rounded at random, as IPUs do. The kernel ``kernels/torch/adamw_step.cpp``
does this in one pass over memory; plain torch draws the same numbers and rounds the same way.
Weights of other types take torch's own step: use ``torch.optim.AdamW(fused=True)`` where there is
no bfloat16 weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.random import derive_seed

_WORD = 0xFFFFFFFF
# Temporaries of the hash are eight times as large as the result, so it is made in pieces.
_PIECE = 1 << 20


class StochasticRoundingAdamW(torch.optim.AdamW):
    """torch.optim.AdamW; bfloat16 weights have float32 averages and are rounded at random.

    State dicts load into ``torch.optim.AdamW`` and the other way round. The random numbers depend
    on ``seed``, the weight's step, its position among the parameters the optimizer was made with,
    and the element only.

    Args:
        params: Parameters, named parameters or groups, as for torch.
        seed: Of the stochastic rounding.
        **settings: Those of ``torch.optim.AdamW``.

    Raises:
        ValueError: A setting is out of range, ``amsgrad`` is set for a bfloat16 weight, or, in a
            step, a gradient is sparse.
    """

    def __init__(self, params: Any, *, seed: int = 0, **settings: Any) -> None:
        self._positions: dict[Tensor, int] = {}
        super().__init__(params, **settings)
        self.defaults["seed"] = seed
        for group in self.param_groups:
            group.setdefault("seed", seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, as torch's optimizers do."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._number(group["params"])
        if group["amsgrad"] and any(map(_rounded, group["params"])):
            self.param_groups.pop()
            raise ValueError(
                "amsgrad=True is not known to the step that rounds bfloat16 weights at random; set "
                "amsgrad=False, or use torch.optim.AdamW"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what pickling and copying leave of an optimizer."""
        super().__setstate__(state)
        self.__dict__.setdefault("_positions", {})
        for group in self.param_groups:
            self._number(group["params"])

    def _number(self, parameters: list[Tensor]) -> None:
        """Note where parameters stand; others may be taken out of the groups later."""
        for parameter in parameters:
            self._positions.setdefault(parameter, len(self._positions))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What ``closure`` returns, else ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            own = [p for p in group["params"] if p.grad is not None and _rounded(p)]
            if own:
                self._step_rounded(own, group)
            taken += [(p, p.grad) for p in own]
        # Torch's step skips what has no gradient.
        try:
            for parameter, _ in taken:
                parameter.grad = None
            super().step()
        finally:
            for parameter, gradient in taken:
                parameter.grad = gradient
        return loss

    def _step_rounded(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} has a gradient of layout "
                    f"{gradient.layout}, and AdamW changes every element in every step: make it "
                    "dense (grad.to_dense(), or sparse=False in the embedding)"
                )
        states = [self._state(parameter) for parameter in parameters]
        keys = [
            derive_seed("adamw", group["seed"], int(state["step"]), self._positions[parameter])
            for parameter, state in zip(parameters, states, strict=True)
        ]
        adamw_step(
            parameters,
            [g if _rounded(g) else g.float() for g in gradients],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
            keys=keys,
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            maximize=bool(group["maximize"]),
        )

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """Return the parameter's state; averages of another type are cast to float32."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            average = state.get(name)
            if average is None:
                average = torch.zeros(parameter.shape, device=parameter.device)
            state[name] = average.float()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer or of torch.optim.AdamW.

        Settings come from the state, except a seed that it does not have. Averages keep their
        precision; torch itself would round float32 ones of a bfloat16 weight.
        """
        seeds = [group["seed"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, seed, saved in zip(
            self.param_groups, seeds, state_dict["param_groups"], strict=True
        ):
            group.setdefault("seed", seed)
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                values = state_dict["state"].get(key, {})
                if _rounded(parameter) and values:
                    for name in ("exp_avg", "exp_avg_sq"):
                        self.state[parameter][name] = values[name].to(parameter.device)


def _rounded(parameter: Tensor) -> bool:
    return parameter.dtype == torch.bfloat16


@torch.no_grad()
def adamw_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    keys: list[int],
    **settings: Any,
) -> None:
    """Take one AdamW step of a list of bfloat16 weights, in place, and round them at random.

    Results depend neither on the number of threads nor on the strides.

    Args:
        weights: bfloat16, of any strides.
        gradients: bfloat16 or float32.
        exp_avgs: Running means of the gradients, float32.
        exp_avg_sqs: Running means of their squares, float32.
        steps: Scalars, the number of steps taken before this one; counted up.
        keys: One below 2**63 per weight, which decides its random numbers.
        **settings: ``lr``, ``beta1``, ``beta2``, ``weight_decay``, ``eps`` and ``maximize``.

    Raises:
        RuntimeError: From the kernel: lists, shapes or types do not match.

    Source:
        Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019.
    """
    lists = (weights, gradients, exp_avgs, exp_avg_sqs, steps)
    if _kernels(*weights):
        torch.ops.ipu_pipeline.adamw_step.default(*lists, **settings, keys=keys)
        return
    for weight, gradient, mean, square, step, key in zip(*lists, keys, strict=True):
        wide = weight.float()
        adamw([wide], [gradient.float()], [mean], [square], [], [step], foreach=False,
              amsgrad=False, **settings)  # fmt: skip
        weight.copy_(stochastic_round(wide, key))


_kernels = extension.kernels(adamw_step=lambda *_, **__: None)  # it changes its arguments


def random_bits(key: int, first: int, count: int) -> Tensor:
    """Return 32 random bits for each of the elements ``first`` to ``first + count - 1``.

    Two rounds of an integer hash over the index, each with half of the key.

    Returns int64 of shape ``(count,)``, each in [0, 2**32); ``key`` is from 0 to 2**63 - 1.

    Source:
        C. Wellons, hash-prospector ("lowbias32" and its successor, public domain).
    """
    index = torch.arange(first, first + count)
    high_key = (key >> 32) + (index >> 32) * 0x9E3779B9
    x = (index + (key & _WORD)) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    x = ((x ^ (x >> 16)) + high_key) & _WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & _WORD
    return x ^ (x >> 15)


def stochastic_round(x: Tensor, key: int) -> Tensor:
    """Round float32 to bfloat16 at random, so that the mean of many roundings is the value.

    A value between two neighbours becomes the upper one with the probability that makes the mean
    right. Beyond the largest bfloat16, and for infinities and NaN, this is rounding to nearest.

    ``key``, below 2**63, and an element's index decide that element's random number.
    """
    rounded = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    target, flat = rounded.view(-1), x.reshape(-1)
    for first in range(0, len(flat), _PIECE):
        piece = flat[first : first + _PIECE]
        noise = random_bits(key, first, len(piece)).to(x.device)
        # Noise is added below the bits that are kept; the rest is cut off.
        bits = piece.view(torch.int32).to(torch.int64) & _WORD
        chosen = ((bits + (noise >> 16)) >> 16).to(torch.int16).view(torch.bfloat16)
        inside = piece.abs() < torch.finfo(torch.bfloat16).max  # not for NaN
        target[first : first + len(piece)] = torch.where(inside, chosen, piece.bfloat16())
    return rounded
