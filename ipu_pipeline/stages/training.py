"""What every step needs: the model's mode, the autocast region, the update of the weights."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ipu_pipeline.capture.calls import set_modes
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ops.master_weights import HALVES, MasterWeights

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class UpdateResult:
    """What an update did.

    Attributes:
        grad_norm: L2 norm over all unscaled gradients, before clipping.
        skipped: The gradients were not finite: no weight and no optimizer state was changed.
    """

    grad_norm: float
    skipped: bool


class LossScaler:
    """What the loss is multiplied by: a number, or what ``torch.amp.GradScaler`` makes of it.

    The scaler is told whether a step was skipped, which all ranks have agreed on: theirs then
    stay equal, whichever of them had an overflow.
    """

    def __init__(self, wish: float | GradScaler | None, precision: str) -> None:
        if wish is None:
            wish = GradScaler("cpu") if precision == "fp16" else 1.0
        self._constant = float(wish) if isinstance(wish, int | float) else 1.0
        self._scaler = wish if isinstance(wish, GradScaler) else None
        self._probe = nn.Parameter(torch.zeros(()))

    @property
    def factor(self) -> float:
        """Factor of the loss of the next backward pass."""
        return self._constant if self._scaler is None else float(self._scaler.get_scale())

    def update(self, *, skipped: bool) -> None:
        """Choose the factor of the next step."""
        if self._scaler is None:
            return
        self._scaler.scale(self._probe.detach())  # which makes its tensors
        self._probe.grad = torch.full((), torch.inf if skipped else 0.0)
        self._scaler.unscale_(torch.optim.SGD([self._probe]))
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """Return what a run that goes on needs; nothing where the factor is a number."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`; without one, or with a number, nothing is changed."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(dict(state))

    def check(self, model: nn.Module, *, master_weights: bool) -> None:
        """Refuse weights whose gradients a scaler cannot divide.

        Raises:
            LoweringError: Some are float16.
        """
        if self._scaler is None or master_weights:
            return
        for name, parameter in model.named_parameters():
            if parameter.dtype is torch.float16 and parameter.requires_grad:
                raise LoweringError(
                    f"{name} is float16, and so is its gradient, too narrow to be divided by a "
                    "scale that moves; use master_weights=True, float32 weights with "
                    "precision='fp16', or a number as loss_scaling"
                )


def total_norm_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm over all gradients; 16 bits would round it otherwise for every split."""
    if not any(gradient.dtype in HALVES for gradient in gradients):
        return get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def apply_update(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    *,
    loss_scaling: float = 1.0,
    max_grad_norm: float | None = None,
    total_norm: Callable[[list[torch.Tensor]], torch.Tensor] = total_norm_of,
    masters: MasterWeights | None = None,
) -> UpdateResult:
    """Unscale, check, clip and apply the gradients, then clear them.

    Args:
        optimizer: Steps once, unless the gradients are not finite.
        parameters: Parameters of all stages; a tied one may come several times, it counts once.
        loss_scaling: The loss was multiplied by this; the gradients are divided by it.
        max_grad_norm: Upper bound of the norm over all gradients; ``None`` for no clipping.
        total_norm: Returns the L2 norm over all gradients from those of the parameters here.
        masters: Float32 copies of the optimizer's 16-bit parameters, which step in their place.

    Returns:
        The norm before clipping, and whether the step was skipped.
    """
    if masters is not None:
        with masters.in_place():
            return apply_update(
                optimizer,
                parameters,
                loss_scaling=loss_scaling,
                max_grad_norm=max_grad_norm,
                total_norm=total_norm,
            )
    with_grad = [p for p in dict.fromkeys(parameters) if p.grad is not None]
    gradients = [dense_part(p) for p in with_grad]
    if loss_scaling != 1.0 and gradients:
        with torch.no_grad():
            torch._foreach_div_(gradients, loss_scaling)
    norm = total_norm(gradients)
    # One non-finite element makes the norm non-finite, so the norm is the whole check.
    skipped = not bool(torch.isfinite(norm))
    if not skipped:
        if max_grad_norm is not None:
            clip_grads_with_norm_(list(map(_Gradient, gradients)), max_grad_norm, norm)  # type: ignore[arg-type]
        _step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    for parameter in with_grad:
        parameter.grad = None
    return UpdateResult(grad_norm=float(norm), skipped=skipped)


@dataclass
class _Gradient:
    """What torch's clipping reads of a parameter."""

    grad: torch.Tensor


def dense_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the gradient, of a sparse one the values of its rows, each row once."""
    gradient = parameter.grad
    assert gradient is not None
    if not gradient.is_sparse:
        return gradient
    parameter.grad = gradient.coalesce()
    return parameter.grad._values()


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Switch every module of ``model`` to evaluation mode, and back to what each was."""
    with kept_modes(model):
        model.eval()
        yield


@contextlib.contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` back into the mode that it is in now."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        set_modes(before)


def autocast_region(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the region in which forward passes of ``precision`` run on a device."""
    dtype = AUTOCAST.get(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def check_model(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse an optimizer that cannot step a model.

    Raises:
        LoweringError: It wants a closure, or holds parameters that are not the model's.
    """
    if optimizer is not None:
        _refuse_closures(optimizer)
        own = {id(parameter) for parameter in model.parameters()}
        groups = optimizer.param_groups
        if any(id(p) not in own for group in groups for p in group["params"]):
            raise LoweringError(
                "the optimizer holds parameters that are not the model's; make it from "
                "model.parameters() of the model that is compiled"
            )


_ONE_USER = {"stages": "plan its blocks into one stage", "replicas": "plan with replicas=1"}


def refuse_gradient_hooks(
    model: nn.Module, shared: Iterable[nn.Parameter] = (), users: str = "stages"
) -> None:
    """Refuse hooks that would see other gradients, or at another time, than in plain torch.

    ``shared`` are parameters that several ``users`` (stages or replicas) have a gradient of.

    Raises:
        LoweringError: A parameter has a hook that runs when its gradient is added up or one that
            reaches an optimizer (which steps in the backward pass), or one on its gradient while
            several stages or replicas use it.
    """
    several = {id(parameter) for parameter in shared}
    for fqn, parameter in model.named_parameters():
        hooks = [*(parameter._backward_hooks or {}).values()]
        late = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if late or any(map(_reaches_optimizer, hooks)):
            raise LoweringError(
                f"{fqn!r} has a hook that runs "
                f"{'as soon as its gradient is added up' if late else 'on its gradient'} "
                f"({'register_post_accumulate_grad_hook' if late else 'register_hook'}, as for "
                "optimizer steps in the backward pass); other microbatches are in flight then "
                "that need the weights as they are: remove the hook and pass "
                "compile(optimizer=...) or step after the whole batch"
            )
        if id(parameter) in several and hooks:
            raise LoweringError(
                f"{fqn!r} has a hook on its gradient (register_hook) and is used by several "
                f"{users}, each of which has a part of that gradient only; change the sum in .grad "
                f"after forward_backward() instead, or {_ONE_USER[users]}"
            )


def _reaches_optimizer(value: Any, depth: int = 5) -> bool:
    """Whether a hook, or what it holds, is an optimizer."""
    if isinstance(value, torch.optim.Optimizer):
        return True
    if not depth or isinstance(value, nn.Module | torch.Tensor | str | type):
        return False
    if isinstance(value, functools.partial):
        held: Iterable[Any] = (value.func, *value.args, *value.keywords.values())
    elif inspect.isfunction(value):
        found = inspect.getclosurevars(value)
        held = (*found.nonlocals.values(), *found.globals.values())
    elif inspect.ismethod(value):
        held = (value.__func__, value.__self__)
    elif isinstance(value, Mapping):
        held = value.values()
    elif isinstance(value, list | tuple):
        held = value
    else:
        held = getattr(value, "__dict__", {}).values()
    return any(_reaches_optimizer(item, depth - 1) for item in list(held)[:1000])


def _refuse_closures(optimizer: torch.optim.Optimizer) -> None:
    step = inspect.signature(type(optimizer).step).parameters.get("closure")
    if step is not None and step.default is inspect.Parameter.empty:
        raise _needs_closure(optimizer)


def _step(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if "closure" in str(error):  # one that looks for it itself (sharpness-aware ones)
            raise _needs_closure(optimizer) from error
        raise


def _needs_closure(optimizer: torch.optim.Optimizer) -> LoweringError:
    return LoweringError(
        f"{type(optimizer).__name__}.step needs a closure that computes the loss again; a "
        "pipeline computes it once per step: use an optimizer without (AdamW, SGD), or call "
        "forward_backward in a closure of your own"
    )
