"""The operations of a recorded program, and how they are executed with values.

Integers of 32 bits and floats of 32 bits are the widest that the device has. On the host an
integer is kept in 64 bits, as torch's own kernels want their indices.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator

import torch
from torch import Tensor

Values = Dict[int, Tensor]
"""A tensor for each slot."""
ON_DEVICE = {torch.int64: torch.int32, torch.float64: torch.float32}
"""Types that the device has instead of others."""
ON_HOST = {torch.int32: torch.int64, torch.float64: torch.float32}
"""Types in which the host computes what the device computes."""

_ONEDNN = not torch.__version__.startswith(("1.", "2.0."))


def _right_products(function: Any) -> Any:
    """Gradients of oneDNN's convolutions are NaN in torch 2.0 on some processors.

    All other operations take the kernels that they take on the host, to the last bit. Later
    versions of torch warn of TF32 where oneDNN's flags are set.
    """
    if _ONEDNN or "conv" not in getattr(function, "__name__", ""):
        return contextlib.nullcontext()
    return torch.backends.mkldnn.flags(enabled=False)


class Slot:
    """The place of a tensor in the arguments of a recorded operation."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


@dataclass
class Node:
    """One recorded call.

    Attributes:
        function: What was called.
        args: Positional arguments, with a slot in the place of every tensor.
        kwargs: Named arguments.
        outputs: Slots of the tensors in the result, in order.
        has_gradient: Gradients were enabled.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: list[int]
    has_gradient: bool

    def run(self, values: Values) -> Any:
        """Call the function with values."""
        args, kwargs = _fill((self.args, self.kwargs), values)
        try:
            return self.function(*args, **kwargs)
        except RuntimeError as error:
            # Older releases of torch have few kernels for float16 on the host.
            if "'Half'" not in str(error):
                raise
            wide = replaced((args, kwargs), lambda v: _cast(v, torch.float16, torch.float32))
            result = self.function(*wide[0], **wide[1])
            return replaced(result, lambda v: _cast(v, torch.float32, torch.float16))


class Graph:
    """The calls in the order in which they were made.

    Attributes:
        parameters: Slots of the parameters, as ``Weights`` orders them.
        buffers: Slots of the buffers.
        inputs: Slots of the input tensors, in the order of the arguments.
        constants: Values of host tensors that were moved to the device.
        structure: What ``forward`` returned.
        outputs: Its leaves, with a slot in the place of every tensor.
        loss: Slot of the loss; ``None`` for inference.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.parameters: list[int] = []
        self.buffers: list[int] = []
        self.inputs: list[int] = []
        self.constants: Values = {}
        self.structure: Any = None
        self.outputs: list[Any] = []
        self.loss: int | None = None
        self._unused_after: list[list[int]] = []

    def finish(self) -> None:
        """Find out when each intermediate tensor is used for the last time."""
        kept = {*self.parameters, *self.buffers, *self.constants, self.loss}
        kept |= {value.index for value in self.outputs if isinstance(value, Slot)}
        last: dict[int, int] = {}
        for position, node in enumerate(self.nodes):
            read = [v.index for v in flat((node.args, node.kwargs)) if isinstance(v, Slot)]
            last.update(dict.fromkeys([*read, *node.outputs], position))
        self._unused_after = [[] for _ in self.nodes]
        for slot, position in last.items():
            if slot not in kept:
                self._unused_after[position].append(slot)

    def run(self, values: Values, *, training: bool) -> tuple[list[Any], Tensor | None]:
        """Execute the program.

        Args:
            values: Of parameters, buffers and inputs; changed in place.
            training: Compute for gradients.

        Returns:
            The leaves of the output, and the loss.
        """
        values.update(self.constants)
        for node, unused in zip(self.nodes, self._unused_after):
            gradients = torch.set_grad_enabled(training and node.has_gradient)
            with gradients, _right_products(node.function):
                result = node.run(values)
                values.update(zip(node.outputs, map(_in_host_type, tensors_of(result))))
            for slot in unused:
                values.pop(slot, None)
        outputs = [values[v.index] if isinstance(v, Slot) else v for v in self.outputs]
        return outputs, None if self.loss is None else values[self.loss]


def flat(value: Any) -> Iterator[Any]:
    """Yield everything in a structure that is not a container."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from flat(item)
    else:
        yield value


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a structure, in order."""
    return [item for item in flat(value) if isinstance(item, Tensor)]


def replaced(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return arguments with ``function`` applied to everything that is not a container."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(item, function) for item in value))
    if isinstance(value, (list, tuple)):
        items = [replaced(item, function) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: replaced(item, function) for key, item in value.items()}
    return function(value)


def zeros_for(value: Any) -> Any:
    """Return zeros of the host for a tensor without values, and the host for its device."""
    if isinstance(value, Tensor) and value.is_meta:
        return torch.zeros(value.shape, dtype=ON_HOST.get(value.dtype, value.dtype))
    return torch.device("cpu") if value == torch.device("meta") else value


def without_values(value: Any) -> Any:
    """Return a tensor of the same shape and type that has no values."""
    return value.to("meta") if isinstance(value, Tensor) else value


def _fill(value: Any, values: Values) -> Any:
    return replaced(value, lambda v: values[v.index] if isinstance(v, Slot) else v)


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    return value.to(after) if isinstance(value, Tensor) and value.dtype == before else value


def _in_host_type(value: Tensor) -> Tensor:
    kind = ON_HOST.get(value.dtype)
    return value if kind is None else value.to(kind)
