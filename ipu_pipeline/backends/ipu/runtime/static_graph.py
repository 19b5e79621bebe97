"""Keep model code from doing what a device program cannot: read values, keep caches.

Causal masks of older transformers fill a tensor with a number that is itself a tensor.

transformers skips an attention mask when all of it is ones, unless it is being traced; poptorch's
tracing is not the one that model code asks about. Caches of keys and values start with empty
tensors, which the device does not have, and training needs none.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def static_graph(model: nn.Module) -> Iterator[None]:
    """While it lasts, ``torch.jit.is_tracing()`` says yes and ``model`` uses no cache."""
    jit: Any = torch.jit
    own, full = jit.is_tracing, torch.full
    owned: Any = (getattr(module, "config", None) for module in model.modules())
    configs = {id(c): c for c in owned if getattr(c, "use_cache", False) is True}.values()
    jit.is_tracing = lambda: True
    torch.full = functools.partial(_full, full)
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        jit.is_tracing = own
        torch.full = full
        for config in configs:
            config.use_cache = True


def _full(own: Any, size: Any, fill_value: Any, **options: Any) -> Tensor:
    """Do what ``torch.full`` does, without reading a ``fill_value`` that is a tensor."""
    if not isinstance(fill_value, Tensor):
        filled: Tensor = own(size, fill_value, **options)
        return filled
    options.setdefault("dtype", fill_value.dtype)
    return torch.zeros(size, **options) + fill_value


class DeviceForward:
    """Makes ``model.forward`` return only what the device gives back, until :meth:`restore`.

    In training that is the loss, marked as the loss; in evaluation a tuple of all tensors of the
    output, whose names are in :attr:`names`.

    Args:
        model: The user's model.
        poptorch: The front end.

    Attributes:
        names: Of the tensors of the last evaluation.
    """

    def __init__(self, model: nn.Module, poptorch: Any) -> None:
        self.names: list[str] = []
        self._model = model
        # Somebody may have put a forward on the object before us.
        self._own = model.__dict__.get("forward")
        plain = model.forward

        @functools.wraps(plain)
        def changed(*args: Any, **kwargs: Any) -> Any:
            with static_graph(model):
                output = plain(*args, **kwargs)
            if model.training:
                # A sum of losses must be marked as the one loss.
                return poptorch.identity_loss(output["loss"], reduction="none")
            tensors = {n: value for n, value in output.items() if isinstance(value, Tensor)}
            self.names = list(tensors)
            return tuple(tensors.values())

        forward: Any = changed
        forward.returns_tensors = True
        self._changed = forward
        model.forward = forward

    def restore(self) -> None:
        """Give the model its own ``forward`` back."""
        if self._own is None:
            self._model.__dict__.pop("forward", None)
        else:
            self._model.__dict__["forward"] = self._own

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """While it lasts, the model has its own ``forward``."""
        self.restore()
        try:
            yield
        finally:
            self._model.forward = self._changed


def is_changed(model: nn.Module) -> bool:
    """Tell whether a :class:`DeviceForward` is on ``model``."""
    return getattr(model.forward, "returns_tensors", False)
