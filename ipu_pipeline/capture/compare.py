"""When what two runs give is equal: of any value, of tensors but for rounding, of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Relative to the largest value compared; captured and eager differ by 0 almost always.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
DEFAULT_TOLERANCE = 1e-4
# So many elements are compared at once: temporary tensors are not as large as a table.
COMPARED_AT_ONCE = 1 << 20
# A loss is one number: its rounding errors are small, and so may be what mixes samples.
LOSS_TOLERANCE = 2e-5


def compared(value: Tensor) -> Tensor:
    """Return what a result is compared by, without graph: of logits not computed, their input."""
    found: Tensor = getattr(value, "computed_from", value)
    return found.detach()


def same_value(value: Any, other: Any) -> bool:
    """Whether two values, tensors, arrays or plain ones, are equal; NaN is equal to NaN."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):  # of no labels a mean is NaN
        nan = value.isnan(), other.isnan()
        return torch.equal(*nan) and torch.equal(value.nan_to_num(), other.nan_to_num())
    if type(value) is not type(other) or np.shape(value) != np.shape(other):
        return False
    return bool(np.all((value == other) | ((value != value) & (other != other))))


def difference(found: Tensor | None, reference: Tensor) -> float:
    """Return the largest difference relative to the scale of ``reference`` (at least 1e-3)."""
    if found is None:
        return 0.0 if not reference.any() else float("inf")
    if found.shape != reference.shape:
        return float("inf")
    if torch.equal(found, reference):
        return 0.0
    if not reference.is_floating_point():
        return float("inf")
    delta = scale = 0.0
    pairs = (t.detach().reshape(-1).split(COMPARED_AT_ONCE) for t in (found, reference))
    for one, other in zip(*pairs, strict=True):
        if not torch.equal(one.isfinite(), other.isfinite()):
            return float("inf")
        delta = max(delta, float((one - other).nan_to_num(0.0, 0.0, 0.0).abs().max()))
        scale = max(scale, float(other.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    return delta / max(scale, 1e-3)


def is_weighted_sum(
    whole: Tensor, weights: Sequence[float], parts: Sequence[Tensor | None], floor: float = 1e-3
) -> bool:
    """Whether ``whole``, a loss, is the sum of its parts with these weights.

    Rounding errors are those of numbers of the size ``floor`` at least.
    """
    pairs = zip(weights, parts, strict=True)
    kept = [weight * part for weight, part in pairs if weight and part is not None]
    if not kept:
        return False
    return close_enough(whole, torch.stack(kept).sum(0), LOSS_TOLERANCE, floor)


def as_exact_as(model: nn.Module, loss: Tensor) -> Tensor:
    """Return a loss in the lowest precision of a model's parameters, in which it is compared."""
    lowest = next((p.dtype for p in model.parameters() if p.dtype in TOLERANCE), loss.dtype)
    return loss.to(lowest)


def close_enough(
    a: Tensor, b: Tensor, tolerance: float = DEFAULT_TOLERANCE, floor: float = 1e-3
) -> bool:
    """Whether results are equal but for rounding."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    allowed = TOLERANCE.get(a.dtype, tolerance)
    scale = float(a.detach().float().nan_to_num().abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=allowed * max(scale, floor), equal_nan=True)
