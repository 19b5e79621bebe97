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
    """The thread's modes that change what a torch function computes."""

    grad: bool
    autocast: bool
    autocast_dtype: torch.dtype

    @classmethod
    def current(cls) -> Region:
        """Return the modes of the calling thread."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
        )


class RegionCall(nn.Module):
    """Calls a function under the modes it was captured in (``None``: the modes of the caller)."""

    def __init__(self, function: Callable[..., Any], region: Region | None) -> None:
        super().__init__()
        self.held = (function,)  # in a tuple: a module in here must not become a child
        self.region = region

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with contextlib.ExitStack() as stack:
            if self.region is not None:
                stack.enter_context(torch.set_grad_enabled(self.region.grad))
                stack.enter_context(
                    torch.autocast(
                        "cpu", dtype=self.region.autocast_dtype, enabled=self.region.autocast
                    )
                )
            return self.held[0](*args, **kwargs)
