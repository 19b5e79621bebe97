"""How calls of torch functions are replayed, and which of them need care."""

from __future__ import annotations

import sys
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
SHAPE: Any = Tensor.shape.__get__  # type: ignore[attr-defined]
# Calls that turn a tensor's shape into Python values.
SHAPE_READS = frozenset(
    {SHAPE, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel}
)
# Functions that give a Python sequence of parts.
CUTS = frozenset({"unbind", "split", "chunk", "tensor_split", "split_with_sizes"})
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


def set_requires_grad(tensor: Tensor, value: bool) -> Tensor:  # noqa: FBT001
    """``tensor.requires_grad = value``, returning the tensor."""
    tensor.requires_grad = value
    return tensor


def returned_after_write(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Return a call's result; for an assignment the tensor, so that its readers come later."""
    return args[0] if func is Tensor.__setitem__ or is_assignment(func) else result


def is_assignment(func: Any) -> bool:
    """Whether ``func`` assigns an attribute of a tensor."""
    return getattr(func, "__name__", "") == "__set__"


def is_nameable(func: Any) -> bool:
    """Whether generated code can name ``func``: fx writes torch's functions as dotted names."""
    module = getattr(func, "__module__", None)
    if module is None or not hasattr(func, "__name__"):
        return False
    if module.partition(".")[0] != "torch":
        return True  # fx passes these as objects
    return getattr(sys.modules.get(module), func.__name__, None) is func


def callable_form(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Return how generated code calls ``func``: node kind, target and arguments."""
    name = getattr(func, "__name__", "")
    if func is Tensor.__setitem__:
        return "call_function", set_item, args
    if is_assignment(func):
        return "call_function", set_requires_grad, args
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
