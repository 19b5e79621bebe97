"""Keeps the user's model and the device's weights apart, and brings them together when read.

A training executor changes the class of the model and of its parameters and buffers: any use of a
parameter by torch first fetches newer weights from the device, if there are any.
"""

from __future__ import annotations

import contextlib
import copyreg
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

WRAPPED = (
    "model has already been wrapped in 'poptorch.PoplarExecutor'. Call model.destroy() on the "
    "executor that wraps it before wrapping it again"
)
_links: dict[int, Link] = {}


class Link:
    """The connection of one user's model with the executor that trains it.

    Args:
        model: The user's model.
        fetch: Called before a parameter is used, when the device has newer weights.
        destroy: Called by ``model.destroy()``.

    Attributes:
        device_is_newer: The device changed the weights since they were last read.
        version: Counts reads of new weights; other executors upload when it changed.
    """

    def __init__(
        self, model: nn.Module, fetch: Callable[[], None], destroy: Callable[[], None]
    ) -> None:
        if hasattr(type(model), "_poptorch_base"):
            raise RuntimeError(WRAPPED)
        self._model = model
        self._fetch = fetch
        self._busy = False
        self._classes: list[tuple[Tensor, type]] = []
        self.device_is_newer = False
        self.version = 0
        self._destroy = destroy
        self._wrap()

    def _wrap(self) -> None:
        for tensor in [*self._model.parameters(), *self._model.buffers()]:
            self._classes.append((tensor, type(tensor)))
            _links[id(tensor)] = self
            is_parameter = isinstance(tensor, nn.Parameter)
            tensor.__class__ = PoptorchParameter if is_parameter else PoptorchBuffer
        base = self._base = type(self._model)
        body = {
            "_poptorch_base": base,
            "destroy": lambda _model: self._destroy(),
            "__reduce_ex__": _reduce_as_user_model,
        }
        self._model.__class__ = type(f"Poptorch{base.__name__}", (base,), body)

    def unwrap(self) -> None:
        """Give the model and its tensors their own classes back."""
        for tensor, kind in self._classes:
            tensor.__class__ = kind
            _links.pop(id(tensor), None)
        self._classes.clear()
        self._model.__class__ = self._base

    @contextlib.contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Show the model as the user made it, so that it can be pickled."""
        self.unwrap()
        try:
            yield
        finally:
            self._wrap()

    def fetch_if_newer(self) -> None:
        """Bring the host's weights up to date."""
        if not self.device_is_newer or self._busy:
            return
        self._busy = True
        try:
            self._fetch()
        finally:
            self._busy = False
        self.device_is_newer = False
        self.version += 1


def _reduce_as_user_model(model: nn.Module, _protocol: int) -> Any:
    """Pickle and copy a wrapped model as the user made it."""
    base: Any = type(model)._poptorch_base
    state = model.__getstate__() if hasattr(base, "__getstate__") else dict(model.__dict__)
    return copyreg._reconstructor, (base, object, None), state  # type: ignore[attr-defined]


def link_of(model: nn.Module) -> Link | None:
    """Return the connection of a model whose parameters an executor trains."""
    for tensor in model.parameters():
        return _links.get(id(tensor))
    return None


def _fetch_for(values: Any) -> None:
    if isinstance(values, (list, tuple)):
        for value in values:
            _fetch_for(value)
    elif isinstance(values, (PoptorchParameter, PoptorchBuffer)):
        link = _links.get(id(values))
        if link is not None:
            link.fetch_if_newer()


class PoptorchParameter(nn.Parameter):
    """A parameter whose newest value may be on the device."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        _fetch_for(self)
        return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _fetch_for(args)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})


class PoptorchBuffer(Tensor):
    """A buffer whose newest value may be on the device."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        _fetch_for(self)
        return self.data.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        # A copy belongs to no executor, so it is a plain tensor.
        made = self.data.clone()
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _fetch_for(args)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
