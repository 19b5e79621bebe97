"""What ``torch.autocast`` does to tensors of a device, and how to be outside of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor


@functools.cache
def autocast_devices() -> tuple[str, ...]:
    """Return the types of devices that are here: CPUs, and the accelerator if there is one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if found is None else ("cpu", found.type)


def autocast_dtype(device: torch.device | None = None) -> torch.dtype | None:
    """Return what autocast casts to in this thread; ``None`` where it is off.

    Args:
        device: Of the tensors; ``None`` and meta: of any device that is here.
    """
    kinds = autocast_devices() if device is None or device.type == "meta" else (device.type,)
    on = (kind for kind in kinds if torch.is_autocast_enabled(kind))
    return next((torch.get_autocast_dtype(kind) for kind in on), None)


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Within it nothing is cast, on no device."""
    with contextlib.ExitStack() as stack:
        for kind in autocast_devices():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def autocast_like_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as ``torch.autocast`` does before a linear layer; outside of it change nothing."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, weight, bias

    def cast(operand: Tensor) -> Tensor:
        return operand if operand.dtype is torch.float64 else operand.to(dtype)

    return cast(x), cast(weight), cast(bias) if bias is not None else None
