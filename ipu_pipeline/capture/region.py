"""Regions of the glue that run without gradients or with autocast switched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Region:
    """The thread's modes that change what a torch function computes.

    Attributes:
        grad: Whether gradients are recorded.
        autocast: Whether autocast is on.
        autocast_dtype: Its dtype.
        autocast_depth: How many autocast contexts surround the call; one more than before means
            that the model's own code switched it, perhaps to what it was anyway.
    """

    grad: bool
    autocast: bool
    autocast_dtype: torch.dtype
    autocast_depth: int

    @classmethod
    def current(cls) -> Region:
        """Return the modes of the calling thread."""
        depth = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        return cls(
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            depth,
        )


class RegionCall(nn.Module):
    """Calls a function or module under the modes that the model's own code had switched.

    Args:
        function: What to call.
        region: The modes it was captured in.
        ambient: The modes around the model's call: what is equal there is left to the caller.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        region: Region | None = None,
        ambient: Region | None = None,
    ) -> None:
        super().__init__()
        self.function = function
        self.grad: bool | None = None
        self.autocast: tuple[bool, torch.dtype] | None = None
        if region is not None and ambient is not None:
            if region.grad != ambient.grad:
                self.grad = region.grad
            if region.autocast_depth != ambient.autocast_depth:
                self.autocast = (region.autocast, region.autocast_dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with contextlib.ExitStack() as stack:
            if self.grad is not None:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.autocast is not None:
                enabled, dtype = self.autocast
                stack.enter_context(torch.autocast("cpu", dtype=dtype, enabled=enabled))
            return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return what tells this call from others: the function and the modes."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        owner = getattr(getattr(self.function, "__self__", None), "__qualname__", "")
        return f"{owner} {name}, grad={self.grad}, autocast={self.autocast}"
