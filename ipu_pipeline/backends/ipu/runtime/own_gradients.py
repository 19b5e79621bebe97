"""Gradients that are not those of the forward pass.

The device derives gradients from what the forward pass computes. It never calls the ``backward`` of
a function of its own (``torch.autograd.Function``): its gradient is compared once with the slope of
its forward pass, and a function that means another one (a straight-through estimator, an
approximation) is refused. So is what comes of trained weights in a region without gradients.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from .host_values import tensors_of
from .static_errors import refuse

_STEP = 1e-5
_TOLERANCE = 1e-3


@contextlib.contextmanager
def gradients_checked(trained: Iterable[Tensor] = ()) -> Iterator[None]:
    """While it lasts, functions are compared when they are applied.

    Args:
        trained: Weights that have to get their gradients wherever they are used.

    Raises:
        StaticGraphError: A function has another gradient than its forward pass; what comes of a
            trained weight where gradients are switched off is used elsewhere.
    """
    own: Any = Function.__dict__["apply"]
    known = set()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        differs = any(isinstance(v, Tensor) and v.is_floating_point() for v in args)
        if differs and cls not in known:
            known.add(cls)
            _check(cls, own.__get__(None, cls), args)
        return own.__get__(None, cls)(*args, **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        with _TrainedWeights(trained):
            yield
    finally:
        Function.apply = own  # type: ignore[method-assign]


class _TrainedWeights(TorchFunctionMode):
    """Refuses to compute on with what comes of these weights where gradients are switched off."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = {id(weight) for weight in weights}
        self._without: Dict[int, Tensor] = {}  # their results, kept so that ids stay theirs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        computed = [t for t in tensors_of(result) if t.is_floating_point()]
        if not computed or getattr(func, "__name__", "") == "detach":
            return result
        given = {id(t) for t in tensors_of((args, kwargs))}
        if not torch.is_grad_enabled():
            if given & self._weights or given & self._without.keys():
                self._without.update((id(t), t) for t in computed)
        elif given & self._without.keys():
            raise refuse(
                "uses what was computed from trained weights under torch.no_grad(), and the device "
                "derives gradients there, too",
                "leave no_grad out, or freeze these weights (requires_grad_(False))",
            )
        return result


def _check(cls: Any, apply: Any, args: Any) -> None:
    with torch._C.DisableTorchFunction(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        slope, gradient = _compared(apply, args)
    if not abs(slope - gradient) <= _TOLERANCE * max(abs(slope), abs(gradient), 1e-6):
        raise refuse(
            f"{cls.__name__} computes a gradient of its own, which is not that of its forward "
            "pass, and the device derives the latter",
            "write the forward pass so that its gradient is the one that is meant (x + "
            "(y - x).detach() passes the gradient of y to x)",
        )


def _compared(apply: Any, args: Any) -> Tuple[float, float]:
    """Return the slope of the forward pass in one direction, and what ``backward`` says of it."""
    torch.manual_seed(0)
    made = [_made(value) for value in args]
    moved = [i for i, v in enumerate(made) if isinstance(v, Tensor) and v.is_floating_point()]
    ways = {i: torch.randn_like(made[i]) for i in moved}
    weights: List[Tensor] = []

    def value(step: float) -> Tensor:
        given = [v + step * ways[i] if i in ways else v for i, v in enumerate(made)]
        torch.manual_seed(1)  # a function may draw
        results = apply(*given)
        found = [r for r in (results if isinstance(results, tuple) else (results,))
                 if isinstance(r, Tensor) and r.is_floating_point()]  # fmt: skip
        if not weights:
            torch.manual_seed(2)
            weights.extend(torch.randn_like(r) for r in found)
        return torch.stack([(r * w).sum() for r, w in zip(found, weights)]).sum()

    for index in moved:
        made[index].requires_grad_()
    total = value(0.0)
    leaves = [made[i] for i in moved]
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else ()
    gradient = sum(float((g * ways[i]).sum()) for i, g in zip(moved, grads) if g is not None)
    with torch.no_grad():
        slope = float(value(_STEP) - value(-_STEP)) / (2 * _STEP)
    return slope, gradient


def _made(value: Any) -> Any:
    """Return a tensor of the same shape with values of its own, in float64."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return 0.1 * torch.randn(value.shape, dtype=torch.float64, device="cpu")
    if value.dtype is torch.bool:
        return torch.rand(value.shape, device="cpu") > 0.5
    return torch.ones(value.shape, dtype=value.dtype, device="cpu")
