"""Functions that use tensors which are not among their arguments, as calls that name them.

``torch.vmap(f)(x)`` runs ``f`` on tensors that only exist inside it, so that it is recorded as one
call. What ``f`` reads from around itself (a padding mask in a closure) becomes an argument: it is
found by watching, and put in place of the captured tensor when the call is replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ipu_pipeline.capture.values import tensors_in


class Watch(TorchFunctionMode):
    """Notes which tensors torch functions are given that no watched function made."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}

    @property
    def outside(self) -> list[Tensor]:
        """The tensors from outside that were used, in the order of their first use."""
        return [tensor for tensor in self._seen.values() if not _functorch.is_batchedtensor(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs or {})):
            if id(tensor) not in self._made:
                self._seen.setdefault(id(tensor), tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if id(tensor) not in self._seen:
                self._made[id(tensor)] = tensor
        return result


class OutsideCall(nn.Module):
    """Calls a function with other tensors in place of those that it holds itself.

    Args:
        function: What to call.
        outside: The tensors that it held when it was captured.
        modes: Function modes that the model's own code had entered around the call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        outside: Sequence[Tensor],
        modes: Sequence[TorchFunctionMode],
    ) -> None:
        super().__init__()
        self.function = function
        self.outside = tuple(outside)
        self.modes = tuple(modes)

    def forward(
        self, given: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call the function; ``given`` stands for ``outside``, tensor by tensor."""
        places = {id(old): new for old, new in zip(self.outside, given, strict=True)}
        with contextlib.ExitStack() as stack:
            for mode in self.modes:
                stack.enter_context(mode)
            stack.enter_context(_Replaced(places))
            return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return what tells this call from others."""
        return f"{self.function!r}, {[(t.shape, t.dtype) for t in self.outside]}, {self.modes}"


def modes_above(mode: TorchFunctionMode) -> list[TorchFunctionMode]:
    """Return the function modes that were entered after ``mode``, outermost first."""
    stack = _get_current_function_mode_stack()
    return stack[stack.index(mode) + 1 :] if mode in stack else []


class _Replaced(TorchFunctionMode):
    def __init__(self, places: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._replaced(args), **self._replaced(kwargs or {}))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._places.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(self._replaced(item) for item in value)
        if type(value) is dict:
            return {key: self._replaced(item) for key, item in value.items()}
        if type(value) is slice:
            return slice(*map(self._replaced, (value.start, value.stop, value.step)))
        return value
