"""Functions whose results functools keeps (``lru_cache``) are called anew while a model is traced.

A table that one of them made before, or that it keeps from a trace, would be a constant without an
origin: a graph would repeat it for every batch, and the user's next run would get a stand-in.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ipu_pipeline.capture.python_state import Generators, PythonState
from ipu_pipeline.capture.values import tensors_in

# Namespace or class, name there, and what stands there during a trace.
_Found = list[tuple[Any, str, Any]]
_FOUND: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()
# Whether what a function returns is a table: tensors that it does not draw.
_IS_TABLE: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def called_anew(model: nn.Module) -> Iterator[None]:
    """Let cached functions of the user that the code of ``model`` names compute tensors anew."""
    if model not in _FOUND:
        cached = PythonState(model.modules()).cached
        _FOUND[model] = [(place, name, _method_anew(value)) for place, name, value in cached]
    with contextlib.ExitStack() as stack:
        for place, name, call in _FOUND[model]:
            put = (
                functools.partial(setattr, place) if isinstance(place, type) else place.__setitem__
            )
            stack.callback(put, name, (vars(place) if isinstance(place, type) else place)[name])
            put(name, call)
        yield


def _method_anew(value: Any) -> Any:
    is_method = isinstance(value, staticmethod | classmethod)
    return type(value)(_anew(value.__func__)) if is_method else _anew(value)


def _anew(wrapper: functools._lru_cache_wrapper[Any]) -> Callable[..., Any]:
    """Return the function itself, or the cached one if it turns out to make no table."""

    @functools.wraps(wrapper.__wrapped__)
    def call(*args: Any, **kwargs: Any) -> Any:
        if wrapper in _IS_TABLE:
            return (wrapper.__wrapped__ if _IS_TABLE[wrapper] else wrapper)(*args, **kwargs)
        generators = Generators()
        generators.add(torch.default_generator)
        before = generators.states()
        result = wrapper.__wrapped__(*args, **kwargs)
        if generators.drawn(before, generators.states()):
            generators.put_back(before)
            _IS_TABLE[wrapper] = False
            return wrapper(*args, **kwargs)
        _IS_TABLE[wrapper] = any(True for _ in tensors_in(result))
        return result

    vars(call).update(
        {n: getattr(wrapper, n) for n in ("cache_info", "cache_clear", "cache_parameters")}
    )
    return call
