"""How calls are recorded so that they can be replayed, and which of them need care.

Besides plain calls of torch functions: calls in regions without gradients or with autocast
switched, and calls of functions that use tensors which are not among their arguments.
``torch.vmap(f)(x)`` runs ``f`` on tensors that only exist inside it, so that it is recorded as one
call; its free variables (a padding mask in a closure) are collected while it runs and lifted to
arguments. A value that Python read from a tensor is specialised, and checked on every batch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import _functorch
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ipu_pipeline.capture.values import reached, tensors_in
from ipu_pipeline.ops.autocast import autocast_devices

# Functions of which the result's shape depends on the values of their arguments.
_VALUE_SHAPED = frozenset(
    {
        torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere,
        torch.masked_select, Tensor.masked_select, torch.bincount, Tensor.bincount,
        torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive,
        torch.repeat_interleave, Tensor.repeat_interleave, functional.one_hot,
    }
)  # fmt: skip
# Each starts a block of the finest plans.
MATRIX_FUNCTIONS = frozenset(
    {"scaled_dot_product_attention", "matmul", "__matmul__", "bmm", "baddbmm", "einsum", "mm"}
)
SHAPE: Any = Tensor.shape.__get__  # type: ignore[attr-defined]
# Calls that turn a tensor's shape into Python values.
SHAPE_READS = frozenset(
    {SHAPE, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel}
)
# Calls that turn tensor values into Python values.
VALUE_READS = frozenset(
    {
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.__complex__,
        Tensor.__array__,
        Tensor.__contains__,
        Tensor.__repr__,
        Tensor.__format__,
        Tensor.equal,
        Tensor.allclose,
        Tensor.is_nonzero,
        torch.equal,
        torch.allclose,
        torch.is_nonzero,
    }
)
# Functions that give a Python sequence of parts.
CUTS = frozenset({"unbind", "split", "chunk", "tensor_split", "split_with_sizes"})
COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__", "lt", "le", "gt", "ge")


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

    def open_to_chance(one: fx.Node) -> list[fx.Node]:
        sources = one.all_input_nodes
        return [n for n in sources if n.op != "call_module" and not _never_crossed(n)]

    drawn = (n for n in reached([node], open_to_chance) if n.meta.get("random"))
    return any(not one.all_input_nodes for one in drawn)


def _never_crossed(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    numbers = [a for a in node.args if isinstance(a, int | float)]
    return name in COMPARISONS and bool(numbers) and all(not 0 < n < 1 for n in numbers)


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """``tensor[index] = value``, returning the tensor so that its later readers depend on it."""
    tensor[index] = value
    return tensor


def set_data(tensor: Tensor, value: Tensor) -> Tensor:
    """``tensor.data = value`` of its own shape, into the same memory, returning the tensor."""
    if (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
        tensor.data = value
    else:
        tensor.data.copy_(value)
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
        name = attribute_name(func)
        return "call_function", set_data if name == "data" else set_requires_grad, args
    if name == "__get__":  # x.T, x.real, x.data
        return "call_function", getattr, (args[0], attribute_name(func))
    if args and isinstance(args[0], Tensor) and getattr(Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


def attribute_name(func: Any) -> str:
    """Return the name of the attribute that ``func`` (``Tensor.x.__get__``) reads or writes."""
    descriptor = func.__self__
    return str(getattr(descriptor, "__name__", None) or descriptor.fget.__name__)


@dataclass(frozen=True)
class Region:
    """The thread's modes that change what a torch function computes.

    Attributes:
        grad: Whether gradients are recorded.
        autocast: Of every type of device that is here, whether autocast is on, and its dtype.
        autocast_depth: How many autocast contexts surround the call; one more than before means
            that the model's own code switched it, perhaps to what it was anyway.
    """

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_depth: int

    @classmethod
    def current(cls) -> Region:
        """Return the modes of the calling thread."""
        depth = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        return cls(
            torch.is_grad_enabled(),
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in autocast_devices()
            ),
            depth,
        )


class RegionCall(nn.Module):
    """Calls a function or module under the modes that the model's own code had switched.

    Those of ``region`` that are equal in ``ambient``, around the model, are left to the caller.
    """

    def __init__(self, function: Callable[..., Any], region: Region, ambient: Region) -> None:
        super().__init__()
        self.function = function
        self.grad = region.grad if region.grad != ambient.grad else None
        switched = region.autocast_depth != ambient.autocast_depth
        self.autocast = region.autocast if switched else ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with contextlib.ExitStack() as stack:
            if self.grad is not None:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return what tells this call from others: the function and the modes."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        owner = getattr(getattr(self.function, "__self__", None), "__qualname__", "")
        return f"{owner} {name}, grad={self.grad}, autocast={self.autocast}"


class GradientHook(nn.Module):
    """Lets ``hook`` see, and perhaps change, the gradient of a tensor between two blocks."""

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.hook = hook

    def forward(self, tensor: Tensor) -> Tensor:
        """Register the hook; the tensor is returned so that its later readers come later."""
        if tensor.requires_grad:
            tensor.register_hook(self.hook)
        return tensor

    def extra_repr(self) -> str:
        """Return what tells this hook from others."""
        return repr(self.hook)


class ModeCall(nn.Module):
    """Calls a leaf in the training or evaluation modes that its modules had in this call.

    Only where one run calls the same modules in different modes: else the program sets them.
    """

    def __init__(
        self, function: nn.Module, parts: Sequence[nn.Module], modes: Sequence[bool]
    ) -> None:
        super().__init__()
        self.function = function
        self.parts = tuple(parts)
        self.modes = tuple(modes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the leaf."""
        before = [part.training for part in self.parts]
        set_modes(zip(self.parts, self.modes, strict=True))
        try:
            return self.function(*args, **kwargs)
        finally:
            set_modes(zip(self.parts, before, strict=True))

    def extra_repr(self) -> str:
        """Return what tells this call from others."""
        return f"{self.modes}"


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put modules into training (``True``) or evaluation mode, each alone."""
    for module, mode in modes:
        if module.training is not mode:
            module.training = mode


def name_of(function: Any) -> str:
    """Return a readable name of a torch function."""
    if getattr(function, "__name__", "") == "__get__":
        return f"Tensor.{attribute_name(function)}"
    name = getattr(function, "__qualname__", None) or repr(function)
    return str(name).replace("TensorBase.", "Tensor.")


class FreeTensors(TorchFunctionMode):
    """Collects the tensors that torch functions are given and that none within it returned."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}

    @property
    def free(self) -> list[Tensor]:
        """The free tensors, in the order of their first use."""
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


class LiftedCall(nn.Module):
    """Calls a function with other tensors in place of those that it holds itself.

    Args:
        function: What to call.
        free: The tensors that it held when it was captured.
        modes: Function modes that the model's own code had entered around the call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        free: Sequence[Tensor],
        modes: Sequence[TorchFunctionMode],
    ) -> None:
        super().__init__()
        self.function = function
        self.free = tuple(free)
        self.modes = tuple(modes)

    def forward(
        self, given: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call the function; ``given`` stands for ``free``, tensor by tensor."""
        places = {id(old): new for old, new in zip(self.free, given, strict=True)}
        with contextlib.ExitStack() as stack:
            for mode in self.modes:
                stack.enter_context(mode)
            stack.enter_context(OtherTensors(places))
            return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return what tells this call from others."""
        return f"{self.function!r}, {[(t.shape, t.dtype) for t in self.free]}, {self.modes}"


def modes_above(mode: TorchFunctionMode) -> list[TorchFunctionMode]:
    """Return the function modes that were entered after ``mode``, outermost first."""
    stack = _get_current_function_mode_stack()
    return stack[stack.index(mode) + 1 :] if mode in stack else []


class OtherTensors(TorchFunctionMode):
    """Gives torch functions other tensors in place of some: by ``id`` of those."""

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
