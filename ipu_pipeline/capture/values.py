"""Which node computes which tensor, and how Python values become node arguments."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn

from ipu_pipeline.capture.meta import TensorMeta
from ipu_pipeline.capture.storage import storage_key
from ipu_pipeline.errors import CaptureError

PLAIN = (
    bool, int, float, complex, str, type(None), type(Ellipsis), range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class NodeSource(Protocol):
    """What the values need from the tracer."""

    def new_node(self, kind: str, target: Any, args: Any = ()) -> fx.Node:
        """Append one node to the graph."""
        ...

    def attribute_node(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor that is no result of the trace."""
        ...

    def module_node(self, module: nn.Module) -> fx.Node | None:
        """Return the node of a module of the model; ``None`` for any other module."""
        ...

    def where(self) -> str:
        """Say whose code is running."""
        ...


class Values:
    """Maps live tensors to nodes; keeps the tensors alive so that their ids stay theirs."""

    def __init__(self, source: NodeSource) -> None:
        self._source = source
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []

    def release(self) -> None:
        """Let go of all tensors: the trace is over, and they may be large."""
        self._nodes.clear()
        self._alive.clear()

    def known(self, tensor: Tensor) -> fx.Node | None:
        """Return the node of ``tensor`` if it has one."""
        return self._nodes.get(id(tensor))

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """Say that ``node`` computes ``tensor``."""
        self._nodes[id(tensor)] = node
        node.meta["storage"] = storage_key(tensor)
        self._alive.append(tensor)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node of ``tensor``; a parameter, buffer or constant gets one."""
        if id(tensor) not in self._nodes:
            self.bind(tensor, self._source.attribute_node(tensor))
        return self._nodes[id(tensor)]

    def tensors(self, value: Any) -> Iterator[Tensor]:
        """Yield every tensor inside ``value``."""
        return tensors_in(value)

    def bind_result(self, result: Any, node: fx.Node) -> None:
        """Bind every tensor of a call's result to ``node`` or to a member access of it."""
        self._alive.append(result)
        members: dict[tuple[Any, ...], fx.Node] = {(): node}
        for path, tensor in _walk(result, ()):
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
        node = self._source.module_node(value) if isinstance(value, nn.Module) else None
        if node is None:
            raise CaptureError(self.refusal(value))
        return node

    def refusal(self, value: Any) -> str:
        """Say why ``value`` cannot be replayed on a stage."""
        where = self._source.where()
        if isinstance(value, np.ndarray):
            return (
                f"{where} turns a numpy array of shape {value.shape} into a tensor; a captured "
                "graph would repeat this one array for every batch (SpecAugment draws its masks "
                "so: set mask_time_prob=0 and mask_feature_prob=0, or apply_spec_augment=False)"
            )
        kind = type(value).__name__
        remedy = " (switch caches off with use_cache=False)" if "cache" in kind.lower() else ""
        return (
            f"{where} passes a {kind} object from one block to the next; stages exchange tensors "
            f"and plain values only{remedy}"
        )


Path = tuple[tuple[Any, Any], ...]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor inside ``value``."""
    for _, tensor in _walk(value, ()):
        yield tensor


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    """Yield ``(path, tensor)``; a path step is the access function and its key."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*path, (operator.getitem, key)))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, (operator.getitem, index)))
    elif isinstance(value, slice):
        for name in ("start", "stop", "step"):
            yield from _walk(getattr(value, name), (*path, (getattr, name)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name), (*path, (getattr, field.name)))
