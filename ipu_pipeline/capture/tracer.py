"""The tracer: turns the calls of one run into nodes.

Every call of a leaf becomes one ``call_module`` node that points at the model's own module;
every torch function in the glue becomes one node. Nodes carry in ``node.meta``:

- ``spec``: ``TensorMeta`` of a tensor result;
- ``after``: nodes that must run before it although no value flows (in-place writes);
- ``writes``: keys of the storages that it changes;  ``storage``: key of its result's storage;
- ``random``: it draws random numbers;  ``starts``: name of the block it starts;
- ``guard``: it checks a value that Python read;  ``scope``: fqn of the innermost module;
- ``effect``: it is kept although nothing reads its result;
- ``reads``, ``state``: names of the model's own tensors that it reads, and that it changes;
- ``value_shape``: its shape depends on values.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.calls import (
    CUTS,
    MATRIX_FUNCTIONS,
    SHAPE,
    SHAPE_READS,
    VALUE_READS,
    FreeTensors,
    GradientHook,
    LiftedCall,
    Region,
    RegionCall,
    attribute_name,
    callable_form,
    decided_by_chance,
    has_value_shape,
    is_assignment,
    is_nameable,
    modes_above,
    name_of,
    returned_after_write,
)
from ipu_pipeline.capture.glue import Call, GlueRecorder, apart, paths_of
from ipu_pipeline.capture.leaves import Leaves, refuse_other_parameters
from ipu_pipeline.capture.objects import ObjectCall, Snapshot, needs_objects, objects_among
from ipu_pipeline.capture.places import Places, own_tensors, own_values
from ipu_pipeline.capture.python_state import Draws
from ipu_pipeline.capture.reads import Session, ValueGuard
from ipu_pipeline.capture.side_outputs import SideOutputs
from ipu_pipeline.capture.state import StateUse
from ipu_pipeline.capture.values import (
    StorageHistory,
    TensorMeta,
    Values,
    Versions,
    placeholder,
    storage_key,
    tensors_in,
)
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ops.random import is_random


class Tracer(TorchFunctionMode):
    """Records one run of ``model``; ``kept`` lives longer than the run, beside the model's."""

    def __init__(self, model: nn.Module, leaves: Leaves, kept: Iterable[Any]) -> None:
        super().__init__()
        self.model = model
        self.leaves = leaves
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.values = Values(self)
        self.storages = StorageHistory()
        self.side_outputs = SideOutputs(self)
        self.calls: Counter[str] = Counter()
        self.scope: list[str] = [""]
        self.in_leaf = 0
        self.leaf_draws = False
        self.arrays: list[tuple[ValueGuard, np.ndarray[Any, Any], Tensor, int]] = []
        self._lifted: list[tuple[str, np.ndarray[Any, Any]]] = []
        self.thread = threading.get_ident()
        self.ambient = Region.current()
        state = [*model.named_buffers(), *model.named_parameters()]
        self.fqns = {id(tensor): fqn for fqn, tensor in state}
        owned = [tensor for module in model.modules() for tensor in own_tensors(module)]
        self.owned = {id(tensor): tensor for tensor in owned}
        self.use = StateUse(model)
        owned_values = [value for module in model.modules() for value in own_values(module)]
        self.kept = frozenset(map(id, [*kept, *owned_values]))
        self.draws = Draws(model)
        self.recorder = GlueRecorder(self.ambient, leaves, (*self.fqns, *self.owned))

    # ---- entry points -------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.in_leaf:
            self.leaf_draws = self.leaf_draws or is_random(func, args, kwargs)
            self.side_outputs.use((args, kwargs), reads_values=func in VALUE_READS)
            return self.use.call(func, args, kwargs)
        if func is Tensor.__iter__:  # an iterator would hide what it yields
            return iter(self.__torch_function__(torch.unbind, types, args, kwargs))
        if func is Tensor.__deepcopy__:  # whose memo holds memory
            return self.__torch_function__(torch.clone, types, args[:1])
        with self._untraced():
            versions = self.storages.versions((args, kwargs))
            call = self._described(func, (args, kwargs))
            result = self.use.call(func, args, kwargs)
            call.node = self._record(func, args, kwargs, result, versions)
            call.reads_values = func in VALUE_READS or (
                func in SHAPE_READS and call.node is not None
            )
            self._add(call, (args, kwargs), result)
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
        refuse_other_parameters(module, fqn, self.fqns)
        self.attributes[fqn] = module
        self.draws.note()
        with self._untraced():
            return self._leaf_call(original, module, args, kwargs)

    def _leaf_call(self, original: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        objects = objects_among(args, kwargs, self.kept)
        places = Places(module)
        if objects:
            result, call = self._object_call(original, module, args, kwargs, objects)
        else:
            versions = self._versions(module, args, kwargs)
            call = self._described(module, (args, kwargs))
            with self.side_outputs.noting():
                result = original(module, *args, **kwargs)
            call.node = self._plain_call(module, args, kwargs, result, versions)
        assert call.node is not None
        call.node.meta["draws"] = self.draws.note(self.leaves.names[id(module)])
        self.side_outputs.note(call, module, places)
        self._add(call, (args, kwargs), result)
        return result

    def _described(self, target: Any, arguments: Any) -> Call:
        """Return the record of a call before it is made."""
        call = Call(target, self.recorder.describe(arguments), Region.current())
        call.where = self.where()
        if isinstance(target, nn.Module):
            call.parts = tuple(target.modules())
            call.modes = tuple(part.training for part in call.parts)
        return call

    def _plain_call(
        self, module: nn.Module, args: Any, kwargs: Any, result: Any, versions: Versions
    ) -> fx.Node:
        """Record a call of a leaf that was given tensors and plain values only."""
        node = self._call("call_module", self.leaves.names[id(module)], args, kwargs)
        self._open_block(node, module)
        self.finish(node, args, kwargs, result, versions)
        return node

    def _versions(self, module: nn.Module, *given: Any) -> Versions:
        """Return the versions of all that a call of a leaf may write to, its statistics as well."""
        return self.storages.versions((given, list(module.buffers())))

    def _open_block(self, node: fx.Node, module: nn.Module) -> None:
        node.meta["random"] = self.leaf_draws
        if self.leaves.starts_block(module):
            fqn = self.leaves.names[id(module)]
            node.meta["starts"] = self._count(fqn)
            node.meta["module"] = fqn

    def _object_call(
        self, original: Any, module: nn.Module, args: Any, kwargs: Any, objects: Any
    ) -> tuple[Any, Call]:
        """Run a leaf that is given objects: the node takes and returns the tensors in them."""
        before, used_tensors = self._snapshot(objects), FreeTensors()
        versions = self._versions(module, args, kwargs, before.tensors)
        call = self._described(module, apart((args, kwargs), objects)[0])
        contents = self.recorder.describe.objects(objects)
        with used_tensors, self.side_outputs.noting():
            result = original(module, *args, **kwargs)
        after = self._snapshot(objects)
        if not needs_objects(objects, before, after):
            call.arguments = self.recorder.describe((args, kwargs))
            call.node = self._plain_call(module, args, kwargs, result, versions)
            return result, call
        call.arguments = call.arguments, contents
        call.after = self.recorder.contents(objects)
        seen = {id(tensor) for tensor in (*used_tensors.free, *tensors_in(result))}
        used = [n for n, tensor in enumerate(before.tensors) if id(tensor) in seen]
        written = {id(tensor) for tensor in self.storages.written(versions)}
        fresh = [
            n
            for n, tensor in enumerate(after.tensors)
            if self.values.known(tensor) is None or id(tensor) in written
        ]
        holder = RegionCall(
            ObjectCall(module, before, used, after, fresh), Region.current(), self.ambient
        )
        given = tuple(before.tensors[n] for n in used)
        rest, named = apart((args, kwargs), objects)[0]
        node = self.held_call(holder, (given, rest, named), {}, type(module).__name__)
        self._open_block(node, module)
        results = (result, tuple(after.tensors[n] for n in fresh))
        self.finish(node, (given, rest, named), {}, results, versions)
        call.node = node
        return result, call

    def _snapshot(self, objects: Mapping[Any, Any]) -> Snapshot:
        try:
            return Snapshot.of(objects)
        except Exception as error:  # whatever a class does when it is copied
            first = next(iter(objects.values()))
            raise CaptureError(
                f"{self.values.refusal(first)}; this one cannot be copied: {error}"
            ) from error

    def vmapped_call(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of ``vmap(f)``; in the glue it is one node with all that ``f`` reads."""
        if self.in_leaf or threading.get_ident() != self.thread:
            return original(*args, **kwargs)
        with self._untraced():
            used_tensors = FreeTensors()
            modes = modes_above(self)
            versions = self.storages.versions((args, kwargs))
            call = self._described("vmap", (original, args, kwargs))
            with used_tensors:
                result = original(*args, **kwargs)
            inner = LiftedCall(original, used_tensors.free, modes)
            holder = RegionCall(inner, Region.current(), self.ambient)
            arguments = (inner.free, args, kwargs)
            node = self.held_call(holder, arguments, {}, "vmap")
            node.meta["random"] = self.leaf_draws
            self.finish(node, arguments, {}, result, versions)
            self._add(call, (original, args, kwargs), result)
        return result

    def function_apply(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one ``autograd.Function.apply`` or whole method; in the glue it is one node."""
        if self.in_leaf or threading.get_ident() != self.thread:
            return original(*args, **kwargs)
        with self._untraced():
            versions = self.storages.versions((args, kwargs))
            call = self._described(original, (args, kwargs))
            result = original(*args, **kwargs)
            holder = RegionCall(original, Region.current(), self.ambient)
            owner = original.__self__  # a class, or the module of a method
            name = getattr(owner, "__name__", type(owner).__name__)
            node = self.held_call(holder, args, kwargs, name)
            node.meta["random"] = self.leaf_draws
            self.finish(node, args, kwargs, result, versions)
            call.node = node
            self._add(call, (args, kwargs), result)
        return result

    @contextlib.contextmanager
    def _untraced(self) -> Iterator[None]:
        """Say of a call that becomes one node, and of what is noted of it, that it is no glue."""
        self.leaf_draws = False
        self.use.start()
        self.in_leaf += 1
        try:
            yield
        finally:
            self.in_leaf -= 1

    # ---- recording ----------------------------------------------------------------------

    def _record(
        self, func: Any, args: Any, kwargs: Any, result: Any, versions: Any
    ) -> fx.Node | None:
        if func in VALUE_READS:
            return self._guard(func, args, kwargs, result, self.recorder.glue.session)
        if func is Tensor.register_hook:
            node = self.held_call(GradientHook(args[1]), args[:1], {}, "gradient_hook")
            node.meta["effect"] = True
            self.finish(node, args[:1], {}, args[0], versions)
            return node
        written = self.storages.written(versions)
        if is_assignment(func) and not self._may_assign(func, args[0]):
            raise CaptureError(
                f"{self.where()} assigns an attribute of a tensor ({attribute_name(func)}); such "
                "a write cannot be replayed: keep that module inside a block"
            )
        result = returned_after_write(func, args, result)
        if not written and not any(True for _ in tensors_in(result)):
            if self._tells_value_shape(func, args):
                return self._guard(func, args, {}, result, self.recorder.glue.session)
            return None  # shapes, dtypes, flags: constant for a given batch shape
        if getattr(func, "__name__", "") in CUTS and self._tells_value_shape(SHAPE, args):
            self._guard(SHAPE, args, {}, args[0].shape)  # how many parts it gives is in the graph
        kind, target, arguments = callable_form(func, args)
        node = self._call(kind, target, arguments, kwargs)
        if has_value_shape(func, args):
            node.meta["value_shape"] = True
        if self.leaves.granularity == "op" and name_of(func).split(".")[-1] in MATRIX_FUNCTIONS:
            node.meta["starts"] = self._count(f"{self.scope[-1]}.{func.__name__}".lstrip("."))
        node.meta["random"] = is_random(func, args, kwargs)
        self.finish(node, args, kwargs, result, versions)
        return node

    def _may_assign(self, func: Any, tensor: Tensor) -> bool:
        name = attribute_name(func)
        return name == "requires_grad" or (name == "data" and id(tensor) in self.fqns)

    def _call(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        region = Region.current()
        switched = region != self.ambient  # no_grad or autocast in the model's own glue
        if switched or (kind == "call_function" and not is_nameable(target)):
            held = self.attributes[target] if kind == "call_module" else target
            held = getattr(Tensor, target) if kind == "call_method" else held
            name = getattr(held, "__name__", type(held).__name__)
            return self.held_call(RegionCall(held, region, self.ambient), args, kwargs, name)
        arguments = self.values.to_nodes(args), self.values.to_nodes(kwargs)
        return self.new_node(kind, target, *arguments)

    def held_call(self, holder: nn.Module, args: Any, kwargs: Any, name: str) -> fx.Node:
        """Record a call of an object that generated code cannot name."""
        arguments = self.values.to_nodes(args), self.values.to_nodes(kwargs)
        target = f"_held.{name.strip('_')}_{len(self.attributes)}"
        self.attributes[target] = holder
        return self.new_node("call_module", target, *arguments)

    def _guard(
        self, func: Any, args: Any, kwargs: Any, result: Any, session: Session | None = None
    ) -> fx.Node:
        number = len(self.recorder.glue.calls)
        guard = ValueGuard(func, result, self.where(), session, number)
        if isinstance(result, np.ndarray):  # it may share the tensor's memory
            guard.expected = result.copy()
            self.arrays.append((guard, result, args[0], args[0]._version))
        node = self.held_call(guard, args, kwargs, "guard")
        node.meta["guard"] = True
        read = list(tensors_in((args, kwargs)))
        node.meta["reads"] = frozenset(self.use.named(read))
        node.meta["after"] = self.storages.record(node, read, [])
        if decided_by_chance(node):
            raise CaptureError(
                f"{self.where()} draws a random number and decides by it, in Python, what runs "
                "next; a captured graph would always decide the same: switch that off "
                "(layerdrop=0), or let the block that may be left out decide in its own forward"
            )
        return node

    def _tells_value_shape(self, func: Any, args: Any) -> bool:
        """Whether a call tells a shape that depends on values: another one for another batch."""
        node = self.values.known(args[0]) if func in SHAPE_READS else None
        return node is not None and bool(node.meta.get("value_shape"))

    def finish(self, node: fx.Node, args: Any, kwargs: Any, result: Any, versions: Any) -> None:
        """Note what the call of ``node`` has read and changed, and what its result is."""
        use = self.use
        changed = [use.tensors[name] for name in use.writes]
        written = [*self.storages.written(versions), *changed]
        read = [*tensors_in((args, kwargs)), *(use.tensors[name] for name in use.reads)]
        node.meta["after"] = self.storages.record(node, [*read, *changed], written)
        node.meta["writes"] = frozenset(map(storage_key, written))
        node.meta["reads"] = frozenset(use.reads | use.named(tensors_in((args, kwargs))))
        node.meta["state"] = frozenset(use.writes | use.named(written))
        self.values.bind_result(result, node)
        for tensor in written:
            if id(tensor) in self.fqns:  # what is read later is the buffer, not a result
                self.values.bind(tensor, self.attribute_node(tensor))

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
        if any(source.meta.get("value_shape") for source in node.all_input_nodes):
            node.meta["value_shape"] = True
        if meta_of is not None:
            node.meta["spec"] = TensorMeta.of(meta_of)
        return node

    def host_node(self, array: np.ndarray[Any, Any]) -> fx.Node:
        """Return an input of the graph for an array that Python gives in every run."""
        hosts = self.recorder.glue.hosts
        name = f"host_{len(hosts)}"
        hosts[name] = array.copy()
        self.recorder.glue.frozen = (
            f"{self.where()} turns a numpy array of shape {array.shape} into a tensor; a program "
            "that is compiled once would repeat this one array for every batch (SpecAugment draws "
            "its masks so: set mask_time_prob=0 and mask_feature_prob=0, or "
            "apply_spec_augment=False)"
        )
        self._lifted.append((name, array))
        return placeholder(self.graph, name)

    def _add(self, call: Call, arguments: Any, result: Any) -> None:
        """Record a call, and where its arguments are host values."""
        for name, array in self._lifted:
            call.lifted.update((path, name) for path in paths_of(arguments, array))
        self._lifted.clear()
        self.recorder.add(call, result)

    def attribute_node(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor that is no result of the trace: a parameter or constant."""
        fqn = self.fqns.get(id(tensor))
        if fqn is None:
            fqn = self._constant(tensor)
        self.attributes[fqn] = tensor
        return self.new_node("get_attr", fqn, meta_of=tensor)

    def module_node(self, module: nn.Module) -> fx.Node | None:
        """Return the node of a module of the model that is an argument of another one."""
        fqn = self.leaves.names.get(id(module))
        if fqn is None:
            return None
        self.attributes[fqn] = module
        return self.new_node("get_attr", fqn)

    def _constant(self, tensor: Tensor) -> str:
        if tensor.is_nested:
            raise CaptureError(
                f"{self.where()} passes a nested tensor from one block to the next; stages "
                "exchange plain tensors: pad it (torch.nn.utils.rnn.pad_sequence) with a mask, or "
                "keep that code inside a block"
            )
        if id(tensor) not in self.owned or tensor.requires_grad:
            raise CaptureError(
                f"{self.where()} uses a {tuple(tensor.shape)} {tensor.dtype} tensor that is "
                "neither a parameter, a buffer, an input nor the result of a recorded call: a "
                "captured graph would repeat it for every batch; return it from its module "
                "instead of storing it on the side, or make it a buffer"
            )
        return f"_constants.c{len(self.attributes)}"

    def _count(self, name: str) -> str:
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"

    def where(self) -> str:
        """Say whose code is running."""
        return f"the code of {self.scope[-1] or type(self.model).__name__!r}"
