"""Trace the glue: run the model once and record what happens between the leaves.

Every call of a leaf becomes one ``call_module`` node that points at the model's own module;
every torch function in the glue becomes one node. Nodes carry in ``node.meta``:

- ``spec``: ``TensorMeta`` of a tensor result;
- ``after``: nodes that must run before it although no value flows (in-place writes);
- ``writes``: keys of the storages that it changes;  ``storage``: key of its result's storage;
- ``random``: it draws random numbers;  ``starts``: name of the block it starts;
- ``guard``: it checks a value that Python read;  ``scope``: fqn of the innermost module.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.guards import VALUE_READS, ValueGuard, name_of
from ipu_pipeline.capture.leaves import Leaves
from ipu_pipeline.capture.region import Region, RegionCall
from ipu_pipeline.capture.storage import StorageHistory, storage_key
from ipu_pipeline.capture.surroundings import patched_calls
from ipu_pipeline.capture.values import Values
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ops.random import is_random

MATRIX_FUNCTIONS = frozenset(
    {"scaled_dot_product_attention", "matmul", "__matmul__", "bmm", "baddbmm", "einsum", "mm"}
)


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


@dataclass(frozen=True)
class Trace:
    """A recorded run.

    Attributes:
        graph: The nodes in execution order; its output is a dict of the model's results.
        attributes: What ``call_module`` and ``get_attr`` targets stand for.
        inputs: Names of the batch's tensors, one placeholder each.
    """

    graph: fx.Graph
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]


def trace(model: nn.Module, batch: Mapping[str, Any], leaves: Leaves) -> Trace:
    """Run ``model(**batch)`` once and record its glue.

    Raises:
        CaptureError: Something happens in the glue that cannot be replayed faithfully.
    """
    tracer = _Tracer(model, leaves)
    inputs = [name for name, value in batch.items() if isinstance(value, Tensor)]
    for name in inputs:
        tracer.values.bind(batch[name], tracer.new_node("placeholder", name, meta_of=batch[name]))
    with patched_calls(tracer.module_call, tracer.function_apply), tracer:
        output = model(**batch)
    tracer.values.keep(output)
    results = dict(named_tensors(output))
    end = tracer.graph.output({name: tracer.values.node_of(t) for name, t in results.items()})
    end.meta["after"] = tracer.storages.record(end, results.values(), [])
    return Trace(tracer.graph, tracer.attributes, tuple(inputs))


def named_tensors(output: Any) -> list[tuple[str, Tensor]]:
    """Return the direct tensor members of a model's output, by field name or position."""
    if isinstance(output, Tensor):
        return [("loss" if output.ndim == 0 else "output", output)]
    if isinstance(output, Mapping):
        return [(str(key), value) for key, value in output.items() if isinstance(value, Tensor)]
    if isinstance(output, tuple | list):
        names = ["loss" if i == 0 and getattr(v, "ndim", 1) == 0 else f"output_{i}"
                 for i, v in enumerate(output)]  # fmt: skip
        return [(n, v) for n, v in zip(names, output, strict=True) if isinstance(v, Tensor)]
    raise CaptureError(
        f"the model returns a {type(output).__name__}; it must return a tensor, a tuple or a "
        "mapping of tensors"
    )


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module, leaves: Leaves) -> None:
        super().__init__()
        self.model = model
        self.leaves = leaves
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.values = Values(self)
        self.storages = StorageHistory()
        self.calls: Counter[str] = Counter()
        self.scope: list[str] = [""]
        self.in_leaf = 0
        self.thread = threading.get_ident()
        self.ambient = Region.current()
        self.fqns = {id(t): fqn for fqn, t in [*model.named_buffers(), *model.named_parameters()]}

    # ---- entry points -------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.in_leaf or threading.get_ident() != self.thread:
            return func(*args, **kwargs)
        if func is Tensor.__iter__:  # an iterator would hide what it yields
            return iter(self.__torch_function__(torch.unbind, types, args, kwargs))
        versions = self.storages.versions((args, kwargs))
        self.in_leaf += 1  # hooks of autograd functions and nested calls are not glue
        try:
            result = func(*args, **kwargs)
        finally:
            self.in_leaf -= 1
        self._record(func, args, kwargs, result, versions)
        return result

    def module_call(
        self, original: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one module call; a leaf becomes one node, glue is entered."""
        if self.in_leaf or threading.get_ident() != self.thread:
            return original(module, *args, **kwargs)
        fqn = self.leaves.names.get(id(module), type(module).__name__)
        if not self.leaves.is_leaf(module):
            self.scope.append(fqn)
            try:
                return original(module, *args, **kwargs)
            finally:
                self.scope.pop()
        versions = self.storages.versions((args, kwargs))
        self.in_leaf += 1
        try:
            result = original(module, *args, **kwargs)
        finally:
            self.in_leaf -= 1
        self.attributes[fqn] = module
        node = self._call("call_module", fqn, module, args, kwargs)
        if self.leaves.starts_block(module):
            node.meta["starts"] = self._count(fqn)
            node.meta["module"] = fqn
        self._finish(node, args, kwargs, result, versions)
        return result

    def function_apply(self, original: Any, cls: type, args: tuple[Any, ...]) -> Any:
        """Run one ``autograd.Function.apply``; in the glue it is one node."""
        if self.in_leaf or threading.get_ident() != self.thread:
            return original(*args)
        versions = self.storages.versions(args)
        self.in_leaf += 1
        try:
            result = original(*args)
        finally:
            self.in_leaf -= 1
        node = self._held_call(cls.apply, args, {}, cls.__name__)
        self._finish(node, args, {}, result, versions)
        return result

    # ---- recording ----------------------------------------------------------------------

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any, versions: Any) -> None:
        if func in VALUE_READS:
            self._guard(func, args, kwargs, result)
            return
        written = self.storages.written(versions)
        if not written and not any(True for _ in self.values.tensors(result)):
            return  # shapes, dtypes, flags: constant for a given batch shape
        if getattr(func, "__name__", "") == "__set__":
            raise CaptureError(
                f"{self._where()} assigns an attribute of a tensor "
                f"({func.__self__.__name__}); such a write cannot be replayed: keep that module "
                "inside a block"
            )
        kind, target, arguments = _callable_form(func, args)
        node = self._call(kind, target, func, arguments, kwargs)
        if self.leaves.granularity == "op" and name_of(func).split(".")[-1] in MATRIX_FUNCTIONS:
            node.meta["starts"] = self._count(f"{self.scope[-1]}.{func.__name__}".lstrip("."))
        node.meta["random"] = is_random(func, args, kwargs)
        self._finish(node, args, kwargs, result, versions)

    def _call(self, kind: str, target: Any, function: Any, args: Any, kwargs: Any) -> fx.Node:
        region = Region.current()
        if region != self.ambient:  # no_grad or autocast switched inside the glue
            held = function if kind == "call_module" else _as_function(kind, target)
            return self._held_call(RegionCall(held, region), args, kwargs, "region")
        arguments = self.values.to_nodes(args), self.values.to_nodes(kwargs)
        return self.new_node(kind, target, *arguments)

    def _held_call(self, function: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        """Record a call of an object that generated code cannot name."""
        arguments = self.values.to_nodes(args), self.values.to_nodes(kwargs)
        holder = function if isinstance(function, nn.Module) else RegionCall(function, None)
        target = f"_held.{name}_{len(self.attributes)}"
        self.attributes[target] = holder
        return self.new_node("call_module", target, *arguments)

    def _guard(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        guard = ValueGuard(func, result, self._where())
        node = self._held_call(guard, args, kwargs, "guard")
        node.meta["guard"] = True

    def _finish(self, node: fx.Node, args: Any, kwargs: Any, result: Any, versions: Any) -> None:
        written = self.storages.written(versions)
        node.meta["after"] = self.storages.record(
            node, self.values.tensors((args, kwargs)), written
        )
        node.meta["writes"] = frozenset(map(storage_key, written))
        self.values.bind_result(result, node)

    def new_node(
        self,
        kind: str,
        target: Any,
        args: Any = (),
        kwargs: Any = None,
        *,
        meta_of: Tensor | None = None,
    ) -> fx.Node:
        """Append one node to the graph."""
        node = self.graph.create_node(kind, target, args, kwargs or {})
        node.meta["scope"] = self.scope[-1]
        if meta_of is not None:
            node.meta["spec"] = TensorMeta.of(meta_of)
        return node

    def attribute_node(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor that is no result of the trace: a parameter or constant."""
        fqn = self.fqns.get(id(tensor))
        if fqn is None:
            fqn = self._constant(tensor)
        self.attributes[fqn] = tensor
        return self.new_node("get_attr", fqn, meta_of=tensor)

    def _constant(self, tensor: Tensor) -> str:
        if tensor.requires_grad or (tensor.is_floating_point() and tensor.numel() > 1):
            raise CaptureError(
                f"{self._where()} uses a {tuple(tensor.shape)} {tensor.dtype} tensor that is "
                "neither a parameter, a buffer, an input nor the result of a recorded call; "
                "return it from its module instead of storing it on the side"
            )
        return f"_constants.c{len(self.attributes)}"

    def _count(self, name: str) -> str:
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"

    def _where(self) -> str:
        return f"the code of {self.scope[-1] or type(self.model).__name__!r}"


def _callable_form(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Return how generated code calls ``func``: node kind, target and arguments."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # x.T, x.real, x.data
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if args and isinstance(args[0], Tensor) and getattr(Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


def _as_function(kind: str, target: Any) -> Any:
    return getattr(Tensor, target) if kind == "call_method" else target
