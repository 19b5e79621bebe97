"""How calls of torch functions are replayed, and which of them need care."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

# Functions of which the result's shape depends on the values of their arguments.
_VALUE_SHAPED = frozenset(
    {
        torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere,
        torch.masked_select, Tensor.masked_select, torch.bincount, Tensor.bincount,
        torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive,
        torch.repeat_interleave, Tensor.repeat_interleave, functional.one_hot,
    }
)  # fmt: skip
# Calls that turn a tensor's shape into Python values.
SHAPE_READS = frozenset(
    {
        Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__,
        torch.numel,
    }
)  # fmt: skip
_COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__", "lt", "le", "gt", "ge")


def has_value_shape(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of this call's result depends on values, not only on shapes."""
    if func in (torch.where, Tensor.where):
        return len(args) == 1
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
    return func in _VALUE_SHAPED


def decided_by_chance(node: fx.Node) -> bool:
    """Whether the value that ``node`` checks depends on freshly drawn random numbers.

    A comparison with a number that uniform numbers never cross (``torch.rand([]) < 0.0``: layer
    drop that is switched off) always gives the same and counts as decided.
    """
    pending = list(node.all_input_nodes)
    seen: set[fx.Node] = set()
    while pending:
        source = pending.pop()
        if source in seen or source.op == "call_module" or _never_crossed(source):
            continue
        seen.add(source)
        if source.meta.get("random") and not source.all_input_nodes:
            return True
        pending.extend(source.all_input_nodes)
    return False


def _never_crossed(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    numbers = [a for a in node.args if isinstance(a, int | float)]
    return name in _COMPARISONS and bool(numbers) and all(not 0 < n < 1 for n in numbers)


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """``tensor[index] = value``, returning the tensor so that its later readers depend on it."""
    tensor[index] = value
    return tensor


def callable_form(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Return how generated code calls ``func``: node kind, target and arguments."""
    name = getattr(func, "__name__", "")
    if func is Tensor.__setitem__:
        return "call_function", set_item, args
    if name == "__get__":  # x.T, x.real, x.data
        return "call_function", getattr, (args[0], attribute_name(func))
    if args and isinstance(args[0], Tensor) and getattr(Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


def attribute_name(func: Any) -> str:
    """Return the name of the attribute that ``func`` (``Tensor.x.__get__``) reads or writes."""
    descriptor = func.__self__
    return str(getattr(descriptor, "__name__", None) or descriptor.fget.__name__)


def as_function(kind: str, target: Any) -> Any:
    """Return one callable for a node's kind and target."""
    return getattr(Tensor, target) if kind == "call_method" else target
