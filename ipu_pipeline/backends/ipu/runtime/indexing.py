"""``x[index]`` and ``x[index] = y`` as modes see them; those of torch 2.0 see few."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function

from .host_values import on_host


@contextlib.contextmanager
def indexing_seen() -> Iterator[None]:
    """While it lasts, modes see indexing."""
    names = ("__getitem__", "__setitem__")
    if any(name in vars(Tensor) for name in names) or _modes_see_indexing():
        yield
        return
    for name in names:
        setattr(Tensor, name, _seen(getattr(Tensor, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(Tensor, name)


def _seen(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(x: Tensor, *args: Any) -> Any:
        if not torch._C._is_torch_function_mode_enabled():
            return own(x, *args)
        return handle_torch_function(own, (x,), x, *args)

    return method


@functools.lru_cache(maxsize=None)
def _modes_see_indexing() -> bool:
    found = []

    class Probe(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    vector, number = (on_host(torch.zeros, (size,), {"device": "cpu"}) for size in ((1,), ()))
    with Probe():
        vector[0]
        vector[0] = number
    return found == ["__getitem__", "__setitem__"]
