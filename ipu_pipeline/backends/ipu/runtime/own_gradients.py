"""Gradients that are not those of the forward pass.

The device derives gradients from what the forward pass computes. It never calls the ``backward`` of
a function of its own (``torch.autograd.Function``): its gradient is compared once with the slope of
its forward pass, and a function that means another one (a straight-through estimator, an
approximation) is refused. Where the model switches gradients off, tensors are detached.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from .host_values import tensors_of
from .static_errors import refuse

_STEP = 1e-5
_TOLERANCE = 1e-3


@contextlib.contextmanager
def gradients_checked() -> Iterator[None]:
    """While it lasts, functions are compared when they are applied.

    Raises:
        StaticGraphError: A function has another gradient than its forward pass.
    """
    known = set()

    def apply(plain: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
        differs = any(isinstance(v, Tensor) and v.is_floating_point() for v in args)
        if differs and cls not in known:
            known.add(cls)
            _check(cls, plain, args)
        return plain(*args, **kwargs)

    with _applied_by(apply):
        yield


@contextlib.contextmanager
def _applied_by(apply: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, functions are applied by ``apply(plain, cls, *args, **kwargs)``."""
    own: Any = Function.__dict__["apply"]

    def changed(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return apply(own.__get__(None, cls), cls, *args, **kwargs)

    Function.apply = classmethod(changed)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Function.apply = own  # type: ignore[method-assign]


class StoppedGradients:
    """Detaches what enters a region where the model switches gradients off.

    The device derives gradients there, too (poptorch's ``fixRequiresGradFromDispatch`` looks at
    inputs only), and knows ``detach``.
    """

    def __init__(self) -> None:
        self._given = torch.is_grad_enabled()
        self._made: Dict[int, Tensor] = {}  # tensors without gradient, kept so that ids stay theirs

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While it lasts, the forward passes of functions keep their gradients.

        torch switches gradients off in them; the device derives the function's gradient there.
        """

        def apply(plain: Any, _: Any, *args: Any, **kwargs: Any) -> Any:
            before, self._given = self._given, self._given and not torch.is_grad_enabled()
            try:
                return plain(*args, **kwargs)
            finally:
                self._given = before

        with _applied_by(apply):
            yield

    @property
    def here(self) -> bool:
        """Whether the model has switched gradients off."""
        return self._given and not torch.is_grad_enabled()

    def has(self, value: Tensor) -> bool:
        """Tell whether a tensor is known to have no gradient."""
        return not value.is_floating_point() or id(value) in self._made

    def add(self, result: Any) -> Any:
        """Note that the tensors in ``result``, made here, have no gradient, and return it."""
        if self.here:
            self._made.update((id(t), t) for t in tensors_of(result))
        return result

    def changed(self) -> None:
        """Note that a tensor was written to: it and what shares its memory may have a gradient."""
        if not self.here:
            self._made.clear()

    def stop(self, value: Any) -> Any:
        """Return a tensor without its gradient; outside of regions, and others, as they are."""
        if not self.here or not isinstance(value, Tensor) or self.has(value):
            return value
        return self.add(value.detach())


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
