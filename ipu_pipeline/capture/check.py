"""The self-check: a capture is compared with the model on other data before it is trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.patches import preserved_state
from ipu_pipeline.capture.values import named_tensors
from ipu_pipeline.errors import CaptureError, GuardError

SEED = 1234
# Relative to the largest value compared; captured and eager differ by 0 almost always.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
DEFAULT_TOLERANCE = 1e-4

Outcome = dict[str, Tensor]


def check_capture(captured: CapturedModel, batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Compare results and every gradient with the model's own on altered data.

    Dropout is switched off for the comparison; buffers, gradients and the random state are put
    back.

    Returns:
        Notes for the user: values read in Python that the capture is specialised to.

    Raises:
        CaptureError: The capture computes something else than the model.
    """
    try:
        _compare(captured, altered(batch))
    except GuardError as error:
        _compare(captured, batch)
        return (f"specialised to the example batch: {error}",)
    except _RefusedByModel as error:
        _compare(captured, batch)
        return (f"checked on the example batch only: the model refuses altered data ({error})",)
    return ()


class _RefusedByModel(Exception):
    """The model itself fails on the altered batch."""


def altered(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return other data of the same shapes: samples reversed, and some tokens masked."""
    return {name: _altered(name, value) for name, value in batch.items()}


def _altered(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    changed = value.flip(0) if value.shape[0] > 1 else value.clone()
    if name.endswith("attention_mask") and value.ndim == 2 and value.shape[1] >= 4:
        changed[0, -(value.shape[1] // 4) :] = 0
    elif value.shape[0] == 1 and value.ndim > 1 and "position" not in name:
        changed = changed.flip(1)
    return changed


def _compare(captured: CapturedModel, batch: Mapping[str, Any]) -> None:
    model = captured.model
    expected = _outcome(captured, lambda: _eager(model, _copied(batch), captured.results))
    found = _outcome(captured, lambda: captured.run(_copied(batch)))
    for name in {**expected, **found}:
        reference = expected.get(name)
        if reference is None:
            reference = torch.zeros_like(found[name])
        difference = _difference(found.get(name), reference)
        allowed = TOLERANCE.get(reference.dtype, DEFAULT_TOLERANCE)
        if not difference <= allowed:
            raise CaptureError(
                f"the captured {type(model).__name__} differs from the model on other data: "
                f"{name} by {difference:.3g} of its scale (allowed {allowed:g}); something between "
                "the blocks is not replayed faithfully: try another granularity, and please "
                "report the model class"
            )


def _eager(model: nn.Module, batch: Mapping[str, Any], results: Mapping[str, str]) -> Outcome:
    try:
        output = model(**batch)
    except Exception as error:
        raise _RefusedByModel(f"{type(error).__name__}: {error}") from error
    return {name: t for name, t in named_tensors(output) if name in results}


def _copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch that the model may write to."""
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in batch.items()}


def _outcome(captured: CapturedModel, run: Callable[[], Outcome]) -> Outcome:
    """Return results and gradients, by name, of one run without dropout."""
    model = captured.model
    with preserved_state(model), _NoDropout(), torch.set_grad_enabled(captured.training):
        torch.manual_seed(SEED)
        outcome = run()
        if captured.training:
            loss = outcome[LOSS]
            if not loss.requires_grad:
                return outcome
            loss.backward()
            outcome = {LOSS: loss.detach()}
            for fqn, parameter in model.named_parameters():
                if parameter.grad is not None:
                    outcome[f"gradient of {fqn}"] = parameter.grad.to_dense()
    return outcome


def _difference(found: Tensor | None, reference: Tensor) -> float:
    """Return the largest difference relative to the scale of ``reference`` (at least 1e-3)."""
    if found is None:
        return 0.0 if not reference.any() else float("inf")
    if found.shape != reference.shape:
        return float("inf")
    if not reference.is_floating_point():
        return 0.0 if torch.equal(found, reference) else float("inf")
    if reference.numel() == 0:
        return 0.0
    same_special = torch.equal(found.isfinite(), reference.isfinite())
    if not same_special:
        return float("inf")
    delta = (found - reference).nan_to_num(0.0, 0.0, 0.0).abs().max()
    scale = reference.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1e-3)
    return float(delta / scale)


class _NoDropout(TorchFunctionMode):
    """Turns dropout off, whatever the probability and mode of its module."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        place, name = 0, ""
        if func in (functional.dropout, torch.dropout, functional.alpha_dropout):
            place, name = 1, "p"
        elif func is functional.scaled_dot_product_attention:
            place, name = 4, "dropout_p"
        if name and len(args) > place:
            args = (*args[:place], 0.0, *args[place + 1 :])
        elif name:
            kwargs[name] = 0.0
        return func(*args, **kwargs)
