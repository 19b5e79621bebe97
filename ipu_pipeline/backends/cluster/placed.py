"""Runs a model's own Python on every rank, where each has the weights of its own stages only.

Every rank runs the same code: ``forward``, ``generate``, logits processors and all. A tensor that
comes from a weight is a :class:`PlacedTensor`: ranks that hold the weight have its value, the
others its shape (on ``meta``). An operation runs for real where all it reads is, and on shapes
elsewhere. What it reads from two places meets where the weights are; whatever Python reads as a
number goes to all ranks. So the cut of the plan is taken at the weights, hidden states travel once
from stage to stage, a stage has the KV cache of its own layers, and control flow is the same
everywhere. The model is not changed: what is watched are calls of torch's functions.

Legend: ``where`` is a set of positions of the pipeline, as bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ops.random import is_random

# Python reads a number, or a shape depends on values.
_READS = frozenset(
    {
        "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__",
        "__array__", "__contains__", "__repr__", "__format__", "is_nonzero", "equal", "allclose",
        "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
        "_unique2", "unique_dim", "tensor_split", "__reduce_ex__", "_assert_async",
    }
)  # fmt: skip
# Numbers that they are given are sizes.
_SIZED = frozenset(
    {
        "view", "reshape", "expand", "repeat", "tile", "unflatten", "narrow", "split", "chunk",
        "new_zeros", "new_ones", "new_full", "new_empty", "interpolate", "pad", "broadcast_to",
    }
)  # fmt: skip
_TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})
_METADATA = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "__len__", "is_contiguous",
        "is_floating_point", "is_complex", "is_signed", "element_size", "get_device", "type",
        "storage_offset", "__hash__", "is_inference", "is_conj", "is_neg", "requires_grad_",
    }
)  # fmt: skip
_AUGMENTED = frozenset(
    f"__i{name}__" for name in
    ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
     "lshift", "rshift")
)  # fmt: skip
_RESHAPING = frozenset(
    {"resize_", "resize_as_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_",
     "swapdims_", "as_strided_"}
)  # fmt: skip
# They drop out while training only, which nothing here does.
_QUIET = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"})
_SENT_AT_ONCE = 64
_MOST_RULES = 10_000


class PlacedTensor(Tensor):
    """A tensor that some positions of the pipeline have.

    Attributes:
        value: Its value, on ``meta`` where it is not here.
        positions: Those that have it, as bits.
        leaves: It is a result of the model: what is computed of it goes to all ranks.
        moved: It was sent, so that a copy of it is in other memory.
        family: All that share its memory.
    """

    value: Tensor
    positions: int
    leaves: bool
    moved: bool
    family: list[weakref.ref[PlacedTensor]]

    @classmethod
    def of(cls, value: Tensor, where: int, device: torch.device) -> PlacedTensor:
        """Wrap a value, or its shape on ``meta``; it says that it is on ``device``."""
        made: PlacedTensor = cls._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=device
        )
        made.value, made.positions, made.leaves, made.moved = value, where, False, False
        made.family = [weakref.ref(made)]
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to compute outside of a run."""
        raise LoweringError(
            f"{getattr(func, '__name__', func)} was called on a tensor that one stage holds, after "
            "the call of generate or forward that made it; use what that call returns"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse what reaches torch unseen."""
        raise LoweringError(
            f"{func} reads a tensor that another stage holds without one of torch's functions, "
            "which is not seen; use target='local' for this model"
        )


class Links(Protocol):
    """How the ranks of one pipeline reach each other."""

    layout: Layout
    device: torch.device

    def start_send(self, wire: Tensor, position: int) -> Callable[[], object]:
        """Begin to send bytes to a position; return what waits for that."""
        ...

    def receive(self, wire: Tensor, position: int) -> None:
        """Overwrite ``wire`` with the next bytes from a position."""
        ...


class _Held(NamedTuple):
    """Memory that not all ranks have: of a weight, or what was written from placed values."""

    where: int
    is_weight: bool
    memory: StorageWeakRef


class RankProgram(TorchFunctionMode):
    """Runs the code inside on this rank, on values where they are and on shapes elsewhere.

    Args:
        links: To the other ranks of this pipeline.
        held: Parameters and buffers that not every position has as they are, and which do.
    """

    def __init__(self, links: Links, held: Mapping[Tensor, int]) -> None:
        super().__init__()
        layout = links.layout
        self._links = links
        self._own = 1 << layout.position
        self._all = (1 << layout.num_ranks) - 1
        self._held: dict[int, _Held] = {}
        for tensor, where in held.items():
            self._hold(tensor, where, is_weight=True)
        self._most_held = 2 * len(self._held) + _SENT_AT_ONCE
        self._shapes_of: dict[int, Tensor] = {}
        self._shape_rules = _ShapeRules()
        self._pending: list[tuple[Callable[[], object], Tensor]] = []

    # ---- what torch's functions do ----------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._with_numbers(args[1]), *args[2:])
        found: dict[int, PlacedTensor] = {}
        held: list[PlacedTensor] = []
        for tensor in _tensors((args, kwargs)):
            if type(tensor) is PlacedTensor:
                found[id(tensor)] = tensor
            elif (place := self._place(tensor)) is not None and id(tensor) not in found:
                made = PlacedTensor.of(self._local(tensor, place), place.where, tensor.device)
                found[id(tensor)] = made
                held.append(made)
        if not found:
            return func(*args, **kwargs)
        if name == "__get__":
            attribute = getattr(func.__self__, "__name__", "")
            if attribute not in _TENSOR_ATTRIBUTES:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        elif name in _METADATA and len(args) == 1 and not kwargs:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        self._read(func, name, args, kwargs, found)
        return self._run(func, name, args, kwargs, found, held)

    def _run(
        self,
        func: Callable[..., Any],
        name: str,
        args: Any,
        kwargs: Any,
        found: Mapping[int, PlacedTensor],
        held: list[PlacedTensor],
    ) -> Any:
        changed = args[0] if _in_place(name) and args else None
        self._refuse(name, kwargs, changed)
        where = self._meet(found, held, changed)
        if where & self._own:
            values = {key: tensor.value for key, tensor in found.items()}
            result = func(*_replaced(args, values), **_replaced(kwargs, values))
        elif changed is None:
            values = {key: tensor.value for key, tensor in found.items()}
            result = self._shape_rules(func, name, args, kwargs, values)
        if changed is not None:
            self._note_change(changed, where)
            return changed
        if where == self._all:
            return self._free(result)
        hidden = [tensor for tensor in found.values() if id(tensor) not in map(id, held)]
        return self._wrapped(result, where, hidden)

    def _with_numbers(self, index: Any) -> Any:
        """Return an index whose slices end at numbers that all ranks know."""
        if isinstance(index, slice):
            ends = (index.start, index.stop, index.step)
            return slice(*(int(self.everywhere(end)) if type(end) is PlacedTensor else end
                           for end in ends))  # fmt: skip
        return tuple(map(self._with_numbers, index)) if isinstance(index, tuple) else index

    def _refuse(self, name: str, kwargs: Any, changed: Any) -> None:
        if kwargs.get("out") is not None or (changed is not None and name in _RESHAPING):
            raise LoweringError(
                f"{name} changes the shape of a tensor in place, or writes into one that is given "
                "(out=), and a stage of another rank holds a part of what it reads; use target="
                "'local' for this model, or the form that returns a new tensor"
            )

    def _free(self, result: Any) -> Any:
        """Return what all ranks have computed; here it may share memory that this rank holds."""
        if isinstance(result, tuple | list):
            return _like(result, [self._free(item) for item in result])
        if not isinstance(result, Tensor) or self._place(result) is None:
            return result
        return PlacedTensor.of(result, self._all, self._links.device)

    def _wrapped(self, result: Any, where: int, read: list[PlacedTensor]) -> Any:
        if isinstance(result, tuple | list):
            return _like(result, [self._wrapped(item, where, read) for item in result])
        if not isinstance(result, Tensor):
            return result
        memory = result.untyped_storage()._cdata
        made = PlacedTensor.of(result, where, self._links.device)
        for tensor in read:
            if tensor.value is result and not tensor.leaves:
                return tensor
            if tensor.value.untyped_storage()._cdata == memory:
                tensor.family.append(weakref.ref(made))
                made.family = tensor.family
        return self.everywhere(made) if any(tensor.leaves for tensor in read) else made

    def _note_change(self, changed: Any, where: int) -> None:
        """Note that a tensor was changed in place, where all that was read is."""
        if type(changed) is PlacedTensor:
            family = [one for ref in changed.family if (one := ref()) is not None]
            if len(family) > 1 and any(one.moved for one in family):
                raise LoweringError(
                    f"a tensor of shape {tuple(changed.value.shape)} is changed in place while "
                    "another one shares its memory, and stages of two ranks use them; use target="
                    "'local' for this model, or copy before changing"
                )
            changed.positions = where
            if not where & self._own:
                changed.value = _shape(changed.value)
        elif isinstance(changed, Tensor) and where != self._all:
            self._hold(changed, where, is_weight=False)

    # ---- where values are -------------------------------------------------------------------

    def _hold(self, tensor: Tensor, where: int, *, is_weight: bool) -> None:
        memory = StorageWeakRef(tensor.untyped_storage())  # its address stays taken
        self._held[memory.cdata] = _Held(where, is_weight, memory)
        if not is_weight and len(self._held) > self._most_held:
            self._held = {k: one for k, one in self._held.items() if not one.memory.expired()}
            self._most_held = 2 * len(self._held) + _SENT_AT_ONCE

    def _place(self, tensor: Tensor) -> _Held | None:
        if tensor.is_meta or tensor.layout is not torch.strided:
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # of vmap: it has no memory
            return None
        return self._held.get(tensor.untyped_storage()._cdata)

    def _local(self, tensor: Tensor, place: _Held) -> Tensor:
        """Return what this rank has of a tensor of held memory."""
        if place.where & self._own:
            return tensor
        if not place.is_weight or not isinstance(tensor, nn.Parameter):
            return _shape(tensor)
        if id(tensor) not in self._shapes_of:
            self._shapes_of[id(tensor)] = _shape(tensor)
        return self._shapes_of[id(tensor)]

    def _read(
        self, func: Any, name: str, args: Any, kwargs: Any, found: Mapping[int, PlacedTensor]
    ) -> None:
        """Bring to all ranks what decides about shapes, and what Python or a draw reads."""
        every = name in _READS or (name == "where" and len(args) + len(kwargs) == 1)
        every = every or (name not in _QUIET and is_random(func, args, kwargs))
        every = every or (name == "repeat_interleave" and _has_tensor(args[1:], kwargs))
        for tensor in found.values():
            kind, given = tensor.value.dtype, tensor is not args[0] if args else True
            is_mask = name == "__getitem__" and given and kind in (torch.bool, torch.uint8)
            is_size = name in _SIZED and given and not tensor.value.ndim
            if every or is_mask or is_size:
                self.everywhere(tensor)

    def _meet(
        self, found: Mapping[int, PlacedTensor], held: list[PlacedTensor], changed: Any
    ) -> int:
        """Return where an operation runs; send what it reads there, if it is in no one place."""
        where = self._all
        for tensor in found.values():
            where &= tensor.positions
        if where:
            return where
        weights = set(map(id, held))
        hidden = [
            _lowest(tensor.positions) for tensor in found.values() if id(tensor) not in weights
        ]
        latest = max(hidden, default=0)
        fixed = [found[id(changed)]] if id(changed) in found else held
        wanted = self._all
        for tensor in fixed:
            wanted &= tensor.positions
        wanted = wanted or fixed[-1].positions
        later = wanted >> latest << latest
        target = _lowest(later) if later else wanted.bit_length() - 1
        for tensor in found.values():
            self.send(tensor, target)
        return 1 << target

    def everywhere(self, tensor: PlacedTensor) -> Tensor:
        """Send a tensor to all positions that do not have it; return its value."""
        for position in range(self._links.layout.num_ranks):
            self.send(tensor, position)
        return tensor.value

    def of_first(self, tensor: Tensor) -> Tensor:
        """Return what the first position has in place of a tensor, on all of them."""
        with torch._C.DisableTorchFunction():
            value = tensor if self._own == 1 else _shape(tensor)
            return self.everywhere(PlacedTensor.of(value, 1, self._links.device))

    def send(self, tensor: PlacedTensor, target: int) -> None:
        """Send a tensor to a position, from the nearest one before that has it."""
        if not tensor.positions >> target & 1:
            with torch._C.DisableTorchFunction():  # hooks call this, and views of weights are held
                self._send(tensor, target)

    def _send(self, tensor: PlacedTensor, target: int) -> None:
        before = tensor.positions & ((1 << target) - 1)
        source = before.bit_length() - 1 if before else _lowest(tensor.positions)
        tensor.positions |= 1 << target
        tensor.moved = True
        if not tensor.value.numel():
            if self._own == 1 << target:
                tensor.value = torch.empty_like(tensor.value, device=self._links.device)
            return
        if self._own == 1 << source:
            wire = tensor.value.clone(memory_format=torch.contiguous_format)  # may be changed
            wire = wire.reshape(-1).view(torch.uint8)
            self._pending.append((self._links.start_send(wire, target), wire))
            if len(self._pending) > _SENT_AT_ONCE:
                self._pending.pop(0)[0]()
        elif self._own == 1 << target:
            value = torch.empty_like(tensor.value, device=self._links.device)
            flat = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            self._links.receive(flat.reshape(-1).view(torch.uint8), source)
            tensor.value = flat if value.is_contiguous() else value.copy_(flat)

    def finish(self) -> None:
        """Wait until everything is sent."""
        for wait, _ in self._pending:
            wait()
        self._pending.clear()


# ---- trees of arguments and results --------------------------------------------------------------


def _tensors(tree: Any, found: list[Tensor] | None = None) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    found = [] if found is None else found
    for item in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list | dict):
            _tensors(item, found)
    return found


def placed_in(tree: Any) -> list[PlacedTensor]:
    """Return the placed tensors in nested tuples, lists and dicts."""
    return [tensor for tensor in _tensors(tree) if type(tensor) is PlacedTensor]


def _replaced(tree: Any, values: Mapping[int, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return values.get(id(tree), tree)
    if isinstance(tree, tuple | list) and not isinstance(tree, torch.Size):
        return _like(tree, [_replaced(item, values) for item in tree])
    if isinstance(tree, dict):
        return {key: _replaced(item, values) for key, item in tree.items()}
    return tree


def _like(tree: Any, items: list[Any]) -> Any:
    """Return items in a list, a tuple, or a named one."""
    return type(tree)(*items) if hasattr(tree, "_make") else type(tree)(items)


# ---- shapes --------------------------------------------------------------------------------------


class _ShapeRules:
    """What functions return, on ``meta``; remembered, as all layers of a kind ask alike."""

    def __init__(self) -> None:
        self._known: dict[object, Any] = {}

    def __call__(
        self,
        func: Callable[..., Any],
        name: str,
        args: Any,
        kwargs: Any,
        values: Mapping[int, Tensor],
    ) -> Any:
        """Return the result for arguments of which some have shapes only."""
        key = None
        try:
            if name not in ("__getitem__", "repeat_interleave"):  # what they index with counts
                key = (func, _signature((args, kwargs), values))
                if key in self._known:
                    return _mapped(self._known[key], None, _same_shape, names=False)
        except TypeError:  # something that is not hashable
            key = None
        found = _on_shapes(func, name, args, kwargs, values)
        # A view has to stay one.
        read = {values[id(t)].untyped_storage()._cdata for t in _tensors((args, kwargs))
                if id(t) in values}  # fmt: skip
        if key is not None and all(
            t.untyped_storage()._cdata not in read for t in _tensors([found])
        ):
            if len(self._known) >= _MOST_RULES:
                self._known.clear()
            self._known[key] = found
        return found


def _signature(tree: Any, values: Mapping[int, Tensor]) -> object:
    """Return what a result's shape depends on, to be looked up.

    Raises:
        TypeError: It cannot be.
    """
    if isinstance(tree, Tensor):
        value = values.get(id(tree), tree)
        if not value.ndim and value is tree:
            raise TypeError("the number may be a size")
        return value.shape, value.stride(), value.dtype
    if isinstance(tree, tuple | list):
        return type(tree), tuple(_signature(item, values) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _signature(item, values)) for key, item in tree.items())
    hash(tree)
    return type(tree), tree


def _on_shapes(
    func: Callable[..., Any], name: str, args: Any, kwargs: Any, values: Mapping[int, Tensor]
) -> Any:
    """Return what a function returns, on ``meta``; an operation without a rule runs on zeros."""
    if name in ("cpu", "cuda"):
        return _shape(values[id(args[0])])
    if name == "__getitem__":
        known = {key: value for key, value in values.items() if not value.is_meta}
        args = (args[0], _counted(_replaced(args[1], known)))
    given = _mapped((args, kwargs), values, _shape, names=name == "to")
    try:
        return func(*given[0], **given[1])
    except (NotImplementedError, RuntimeError):
        given = _mapped((args, kwargs), values, _zeros, names=name == "to")
        found = func(*given[0], **given[1])
        return _mapped([found], None, _shape, names=False)[0]


def _shape(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else _same_shape(tensor)


def _same_shape(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _counted(index: Any) -> Any:
    """Return an index in which masks that are known are positions, whose number is a shape."""
    if isinstance(index, Tensor) and type(index) is not PlacedTensor:
        is_mask = index.dtype in (torch.bool, torch.uint8)
        return index.nonzero(as_tuple=True) if is_mask and index.ndim else index
    if not isinstance(index, tuple):
        return index
    parts: list[Any] = []
    for item in index:
        found = _counted(item)
        parts += found if isinstance(found, tuple) else [found]
    return tuple(parts)


def _mapped(
    tree: Any,
    values: Mapping[int, Tensor] | None,
    change: Callable[[Tensor], Tensor],
    *,
    names: bool,
) -> Any:
    """Return arguments with tensors changed, and devices (in ``names`` their names) that follow.

    ``values`` are those of placed tensors; ``None``: all are changed.
    """
    if isinstance(tree, Tensor):
        if values is None or id(tree) in values:
            return change(tree if values is None else values[id(tree)])
        # A number that all ranks know may be a size.
        return tree.cpu() if not tree.ndim or change is _zeros else change(tree)
    if isinstance(tree, torch.device):
        return change(torch.empty((), device="meta")).device
    if isinstance(tree, str) and names and tree.partition(":")[0] in ("cpu", "cuda"):
        return change(torch.empty((), device="meta")).device
    if isinstance(tree, dict):
        return {
            key: _mapped(item, values, change, names=names or key == "device")
            for key, item in tree.items()
        }
    if isinstance(tree, tuple | list) and not isinstance(tree, torch.Size):
        return _like(tree, [_mapped(item, values, change, names=names) for item in tree])
    return tree


# ---- small facts ---------------------------------------------------------------------------------


def _lowest(where: int) -> int:
    return (where & -where).bit_length() - 1


def _in_place(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or name in _AUGMENTED
    return name.endswith("_") and name != "requires_grad_"


def _has_tensor(args: Any, kwargs: Mapping[str, Any]) -> bool:
    given = {key: item for key, item in kwargs.items() if key not in ("input", "self")}
    return bool(_tensors((args, given)))
