"""Which node computes which tensor: values, their descriptions, and the order of writes to them."""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ipu_pipeline.errors import CaptureError

if TYPE_CHECKING:
    from ipu_pipeline.capture.tracer import Tracer

N = TypeVar("N")
Versions = list[tuple[Tensor, int]]


class StorageHistory:
    """Remembers for every storage who wrote it last and who has read it since."""

    def __init__(self) -> None:
        self._writer: dict[int, fx.Node] = {}
        self._readers: dict[int, list[fx.Node]] = defaultdict(list)

    def versions(self, arguments: Any) -> Versions:
        """Return the version counters of all tensors in ``arguments`` before a call.

        Raises:
            CaptureError: One of them has none.
        """
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        if any(tensor.is_inference() for tensor in tensors):
            raise CaptureError(
                "a tensor made under torch.inference_mode goes from one block to the next, and "
                "torch does not say when such a tensor is written; use torch.no_grad() there"
            )
        return [(tensor, tensor._version) for tensor in tensors]

    def written(self, before: Versions) -> list[Tensor]:
        """Return the tensors whose storage the call changed."""
        return [tensor for tensor, version in before if tensor._version != version]

    def record(
        self, node: fx.Node, read: Iterable[Tensor], written: list[Tensor]
    ) -> tuple[fx.Node, ...]:
        """Note what ``node`` reads and writes; return the nodes that must run before it."""
        after: dict[fx.Node, None] = {}
        written_keys = {storage_key(tensor) for tensor in written}
        for key in {storage_key(tensor) for tensor in read}:
            if key in self._writer:
                after[self._writer[key]] = None
            if key in written_keys:
                after.update(dict.fromkeys(self._readers.pop(key, [])))
                self._writer[key] = node
            else:
                self._readers[key].append(node)
        after.pop(node, None)
        return tuple(after)


def storage_key(tensor: Tensor) -> int:
    """Return a key that tensors share when they share memory (works without data, too)."""
    return int(storage_of(tensor)._cdata)


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Return the memory of a tensor, of a sparse gradient that of its values."""
    with torch._C.DisableTorchFunctionSubclass():  # also of what stands for a tensor
        return (tensor._values() if tensor.is_sparse else tensor).untyped_storage()


@dataclass(frozen=True)
class TensorMeta:
    """Shape, dtype (torch name without prefix) and gradient flag of a traced value."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        """Describe ``tensor``."""
        return cls(
            tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad
        )


def named_tensors(output: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a model's output by field name or position: ``hidden_states[2]``.

    Raises:
        CaptureError: The output is neither a tensor nor a tuple, list or mapping.
    """
    if isinstance(output, Tensor):
        return [("loss" if output.ndim == 0 else "output", output)]
    members: Iterable[tuple[str, Any]]
    if isinstance(output, Mapping):
        members = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, tuple | list):
        members = [
            ("loss" if i == 0 and getattr(v, "ndim", 1) == 0 else f"output_{i}", v)
            for i, v in enumerate(output)
        ]
    else:
        raise CaptureError(
            f"the model returns a {type(output).__name__}; it must return a tensor, a tuple or a "
            "mapping of tensors"
        )
    return [item for name, value in members for item in _named_members(name, value)]


def _named_members(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named_members(f"{name}[{key}]", item)
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _named_members(f"{name}[{number}]", item)


def nested_by_name(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put tensors under names as those of :func:`named_tensors` into tuples and dicts again."""
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        first, bracket, rest = name.partition("[")
        if bracket and name.endswith("]"):
            inner, _, after = rest.partition("]")
            groups.setdefault(first, {})[inner + after] = tensor
        else:
            groups[name] = tensor
    return {name: _member(found) for name, found in groups.items()}


def _member(found: Any) -> Any:
    if not isinstance(found, dict):
        return found
    inner = nested_by_name(found)
    if not all(key.isdecimal() for key in inner):
        return inner
    return tuple(inner.get(str(n)) for n in range(max(map(int, inner)) + 1))


PLAIN = (
    bool, int, float, complex, str, type(None), type(Ellipsis), range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class SideFloat(float):
    """A number that a block read from a tensor and left on the side, or one made of such."""


class SideInt(int):
    """The same, a whole one."""


def _kept_apart(operator: str) -> Any:
    def operate(self: Any, *others: Any) -> Any:
        own = float if isinstance(self, float) else int
        result = getattr(own, operator)(own(self), *others)
        kind = {float: SideFloat, int: SideInt}.get(type(result))
        return result if kind is None else kind(result)

    return operate


for _name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod"):
    for _operator in (f"__{_name}__", f"__r{_name}__"):
        for _kind in (SideFloat, SideInt):
            setattr(_kind, _operator, _kept_apart(_operator))
for _operator in ("__neg__", "__abs__"):
    for _kind in (SideFloat, SideInt):
        setattr(_kind, _operator, _kept_apart(_operator))


class Values:
    """Maps live tensors to nodes; keeps the tensors alive so that their ids stay theirs."""

    def __init__(self, source: Tracer) -> None:
        self._source = source
        self._nodes: dict[int, fx.Node] = {}
        self._originals: dict[int, fx.Node] = {}
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._alive: list[Any] = []

    def release(self) -> None:
        """Drop all tensors: the trace is over, and they may be large."""
        self._nodes.clear()
        self._originals.clear()
        self._alive.clear()

    def known(self, tensor: Tensor) -> fx.Node | None:
        """Return the node of ``tensor`` if it has one."""
        return self._nodes.get(id(tensor))

    def by_id(self, number: int) -> fx.Node | None:
        """Return the node of the tensor with this id if it has one."""
        return self._nodes.get(number)

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """Say that ``node`` computes ``tensor``."""
        self._nodes[id(tensor)] = node
        node.meta["storage"] = storage_key(tensor)
        self._alive.append(tensor)

    def bind_alias(self, tensor: Tensor, node: fx.Node) -> None:
        """Say that ``tensor`` is another object for the value of ``node``."""
        self._originals[id(tensor)] = node
        self._alive.append(tensor)

    def original(self, tensor: Tensor) -> fx.Node | None:
        """Return the node of the value that ``tensor`` is another object for."""
        return self._originals.get(id(tensor))

    def replace(self, node: fx.Node, other: fx.Node) -> None:
        """Say that the value of ``node`` is that of ``other`` in the finished graph."""
        self._replaced[node] = other

    def final(self, number: int) -> fx.Node | None:
        """Return the node of the tensor with this id in the finished graph, if there is one."""
        node = self._nodes.get(number) or self._originals.get(number)
        while node in self._replaced:
            node = self._replaced[node]
        return node if node is not None and not node._erased else None

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node of ``tensor``; a parameter, buffer or constant gets one."""
        if id(tensor) not in self._nodes:
            self.bind(tensor, self._source.attribute_node(tensor))
        return self._nodes[id(tensor)]

    def bind_result(self, result: Any, node: fx.Node) -> None:
        """Bind every tensor of a call's result to ``node`` or to a member access of it."""
        self._alive.append(result)
        members: dict[tuple[Any, ...], fx.Node] = {(): node}
        for path, tensor in tensor_paths(result):
            for end in range(1, len(path) + 1):
                if path[:end] not in members:
                    access, key = path[end - 1]
                    members[path[:end]] = self._source.new_node(
                        "call_function", access, (members[path[: end - 1]], key)
                    )
            members[path].meta["spec"] = TensorMeta.of(tensor)
            self.bind(tensor, members[path])

    def to_nodes(self, value: Any) -> Any:
        """Return ``value`` with every tensor replaced by its node.

        Raises:
            CaptureError: It holds an object that cannot be replayed on a stage.
        """
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, np.integer | np.floating | np.bool_):
            return value.item()  # before PLAIN: np.float64 is a float that code cannot name
        if isinstance(value, SideFloat | SideInt):
            raise CaptureError(
                f"{self._source.where()} uses a number ({value}) that a block read from a tensor "
                "in Python and left in a list or an attribute; the next batch has another one: let "
                "the block leave the tensor there, without .item() or float()"
            )
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, slice):
            return slice(*(self.to_nodes(part) for part in (value.start, value.stop, value.step)))
        if type(value) in (tuple, list, set):
            return type(value)(self.to_nodes(item) for item in value)
        if type(value) is dict:
            return {key: self.to_nodes(item) for key, item in value.items()}
        return self._object_node(value)

    def _object_node(self, value: Any) -> fx.Node:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return self._source.host_node(value)
        node = self._source.module_node(value) if isinstance(value, nn.Module) else None
        if node is None:
            raise CaptureError(self.refusal(value))
        return node

    def refusal(self, value: Any) -> str:
        """Say why ``value`` cannot be replayed on a stage."""
        where = self._source.where()
        kind = type(value).__name__
        remedy = ": keep what makes and what uses it inside one block"
        if isinstance(value, torch.Generator):
            remedy = ": draw from torch's own generator, or draw inside a block"
        if "cache" in kind.lower():
            remedy = " (switch caches off with use_cache=False)"
        return (
            f"{where} passes a {kind} object from one block to the next; stages exchange tensors "
            f"and plain values only{remedy}"
        )


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Return a new input of a graph."""
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(name)
    node.meta["scope"] = ""
    return node


def reached(start: Iterable[N], step: Callable[[N], Iterable[N]]) -> Iterator[N]:
    """Yield nodes and what ``step`` leads to from them, each once."""
    pending = list(dict.fromkeys(start))
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        fresh = [one for one in dict.fromkeys(step(node)) if one not in seen]
        seen.update(fresh)
        pending += fresh


def computed_from(node: fx.Node) -> Iterator[fx.Node]:
    """Yield ``node`` and what it is computed from."""
    return reached([node], lambda one: one.all_input_nodes)


def reads_behind(node: fx.Node) -> bool:
    """Whether a value that Python reads is ``node`` or is computed from it."""
    return any(one.meta.get("guard") for one in reached([node], lambda one: one.users))


Path = tuple[tuple[Any, Any], ...]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor inside ``value``."""
    for _, tensor in tensor_paths(value):
        yield tensor


def tensor_paths(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield ``(path, tensor)``; a path step is the access function and its key."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensor_paths(item, (*path, (operator.getitem, key)))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from tensor_paths(item, (*path, (operator.getitem, index)))
    elif isinstance(value, slice):
        for name in ("start", "stop", "step"):
            yield from tensor_paths(getattr(value, name), (*path, (getattr, name)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensor_paths(getattr(value, field.name), (*path, (getattr, field.name)))
