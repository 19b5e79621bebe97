"""Values that depend on the inputs only: known on the host while the program is built.

A model that reads such a value in Python (``if mask.all():``) gets the one of the batch that the
program is built with. Every later batch is checked on the host, before it goes to the device, to
give the same: the operations between the inputs and the value are kept and run again.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator, Mapping

import torch
from torch import Tensor

from .static_errors import StaticGraphError, place


class _Node:
    """Stands for a tensor in kept arguments."""

    def __init__(self, number: int) -> None:
        self.number = number


class HostValues:
    """The values, how they came about, and what the model read of them."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._steps: list[tuple[Any, Any, Any, list[int]]] = []
        self._inputs: dict[str, int] = {}
        self._reads: list[tuple[str, Any, Any, Any, Any]] = []

    @property
    def is_read(self) -> bool:
        """Tell whether Python read any value."""
        return bool(self._reads)

    def input(self, name: str, value: Tensor) -> int:
        """Return the number of an input's value; ``value`` is copied."""
        self._inputs[name] = number = self._add(value.detach().clone())
        return number

    def constant(self, value: Tensor) -> int:
        """Return the number of a copy of a constant, which may be written to."""
        number = self._add(value.detach().clone())
        kept = value.detach().clone()
        self._steps.append((torch.clone, (kept,), {}, [number]))
        return number

    def value(self, number: int) -> Tensor:
        """Return a value for the batch that the program is built with."""
        return self._values[number]

    def apply(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute on values; tensors of the program in the arguments are their numbers' nodes.

        Returns:
            The result, with the number of every tensor in it.
        """
        result = on_host(func, self._filled(args, self._values), self._filled(kwargs, self._values))
        numbers = [self._add(tensor) for tensor in tensors_of(result)]
        self._steps.append((func, args, kwargs, numbers))
        return result, numbers

    def read(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what Python reads, and have every later batch checked for it."""
        found = on_host(func, self._filled(args, self._values), self._filled(kwargs, self._values))
        self._reads.append((place(), func, args, kwargs, _plain(found)))
        return found

    def compute(self, batch: Mapping[str, Any], wanted: Any) -> Any:
        """Return ``wanted`` (nodes in any structure) for another batch."""
        return self._filled(wanted, self._replay(batch))

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a microbatch for which the model would read something else.

        Raises:
            StaticGraphError: It would.
        """
        if not self._reads:
            return
        values = self._replay(batch)
        for where, func, args, kwargs, expected in self._reads:
            found = _plain(on_host(func, self._filled(args, values), self._filled(kwargs, values)))
            if found != expected:
                raise StaticGraphError(
                    f"{where}: the model reads {found!r} of this batch, and the program was built "
                    f"for {expected!r}; give all batches the same value there (pad them alike), or "
                    "compile again for these"
                )

    def _replay(self, batch: Mapping[str, Any]) -> list[Any]:
        values: list[Any] = [None] * len(self._values)
        for name, number in self._inputs.items():
            values[number] = batch[name].detach().clone()
        for func, args, kwargs, numbers in self._steps:
            result = on_host(func, self._filled(args, values), self._filled(kwargs, values))
            for number, tensor in zip(numbers, tensors_of(result)):
                values[number] = tensor
        return values

    def _add(self, value: Tensor) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def filled(self, value: Any) -> Any:
        """Return a node's value for the batch that the program is built with; others as given."""
        return self._values[value.number] if isinstance(value, _Node) else value

    def _filled(self, value: Any, values: list[Any]) -> Any:
        return map_leaves(lambda v: values[v.number] if isinstance(v, _Node) else v, value)


def node(number: int) -> _Node:
    """Return what stands for a value in the arguments of a kept operation."""
    return _Node(number)


def on_host(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function of torch on host tensors, unseen by any watcher.

    torch 2.0 has few float16 operations on the host: they run in float32 and are rounded.
    """
    with torch._C.DisableTorchFunction(), torch.no_grad():
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "Half" not in str(error):
                raise
            wide = map_leaves(lambda v: _cast(v, torch.float16, torch.float32), (args, kwargs))
            result = func(*wide[0], **wide[1])
            return map_leaves(lambda v: _cast(v, torch.float32, torch.float16), result)


def _cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return value.to(new) if isinstance(value, Tensor) and value.dtype == old else value


def _plain(value: Any) -> Any:
    """Return a read value in a form that can be compared."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    with torch._C.DisableTorchFunction():
        return value.tolist() if hasattr(value, "tolist") else value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Return the tensors in a nested structure, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, slice):
        yield from tensors_of((value.start, value.stop, value.step))


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """Return the structure with ``change`` applied to everything that is no container."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(map_leaves(change, item) for item in value)
    if kind is dict:
        return {key: map_leaves(change, item) for key, item in value.items()}
    if kind is slice:
        return slice(*map_leaves(change, (value.start, value.stop, value.step)))
    if isinstance(value, tuple):  # torch.return_types, torch.Size
        return tuple(map_leaves(change, item) for item in value)
    return change(value)
