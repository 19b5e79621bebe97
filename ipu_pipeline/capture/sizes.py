"""A captured program at other sizes: its glue runs again, and only shapes are computed.

A batch of another length mostly does what the captured one did, with other numbers. So the glue is
replayed with stand-ins of the new shapes; what they are is computed from the recorded graph on
``meta``, call by call, and of equal leaves one alone. What this gives is another :class:`Glue` over
the same nodes, and the places of the numbers that differ: they become inputs of the graph, so that
one program, checked once, serves all sizes. Where the glue does anything else, that is another
program.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ipu_pipeline.capture.calls import ModeCall, RegionCall, name_of
from ipu_pipeline.capture.fused import grouped_without_values
from ipu_pipeline.capture.glue import (
    Call,
    Described,
    Description,
    Glue,
    Path,
    StandIn,
    placed,
    substituted,
)
from ipu_pipeline.capture.objects import ObjectCall, members
from ipu_pipeline.capture.patches import preserved_state
from ipu_pipeline.capture.programs import module_signature
from ipu_pipeline.capture.replay import DESCRIPTIONS, Differs, Replay, is_number
from ipu_pipeline.capture.side_output_call import SideOutputCall
from ipu_pipeline.capture.trace import Trace
from ipu_pipeline.capture.values import PLAIN, TensorMeta, tensors_in
from ipu_pipeline.ops.autocast import autocast_dtype

_META = torch.device("meta")


@dataclass(frozen=True)
class Sized:
    """A program at other sizes than when it was captured.

    Attributes:
        glue: Its glue, over the same nodes.
        specs: Description of every tensor value by name.
        changed: Numbers that differ and are no host values yet, by number of the call, and path.
    """

    glue: Glue
    specs: Mapping[str, TensorMeta]
    changed: Mapping[tuple[int, Path], Any]


class Resize(Replay):
    """Follows one run of the glue at other sizes; see the module.

    Args:
        trace: What was recorded.
        kinds: Signatures of leaves that are known already; those of others are added.
    """

    def __init__(self, trace: Trace, kinds: dict[nn.Module, str]) -> None:
        glue = trace.glue
        super().__init__(glue, lambda call: call.result)
        self._trace = trace
        self._kinds = kinds
        self._made = replace(
            glue, calls=[], reads={}, inputs={}, results={}, nodes={}, stand_ins=[], _kept=[]
        )
        self._describe: _AsRecorded = _AsRecorded(self._made._kept.append)
        self._stand_ins: dict[int, Tensor] = {}  # by the id of the recorded one
        self._shapes: dict[int, Tensor] = {}  # by the id of the stand-in: what it stands for

    def sized(self, model: nn.Module, batch: Mapping[str, Any]) -> Sized:
        """Run the glue of ``model(**batch)`` at the sizes of the batch.

        Raises:
            Differs: It does something else, or its shapes depend on values.
        """
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        nodes = {node.name: node for node in self._trace.graph.nodes}
        recorded = self.glue.inputs
        if self.glue.kept or any(node.meta.get("guard") for node in nodes.values()):
            raise Differs("the model reads or keeps values in Python between its blocks")
        for name in {**tensors, **recorded}:
            spec = TensorMeta.of(tensors[name]) if name in tensors else None
            if spec is None or name not in recorded or not _alike(spec, nodes[name].meta["spec"]):
                raise Differs(f"the model is given another {name}")
        self._values = _ShapeRun(self._trace, tensors, self.hosts, self._kinds)
        try:
            for name, old in recorded.items():
                self._made.inputs[name] = self._now(old)  # type: ignore[assignment]
            self.glue = replace(self.glue, inputs=self._made.inputs)
            with self.patches(model):
                self.run(model, batch)
            specs = self._values.specs()
        except Exception as error:  # whatever code does that is given tensors without values
            raise Differs(f"{type(error).__name__}: {error}") from error
        self._made.results = {name: self._id_now(i) for name, i in self.glue.results.items()}
        self._made.stand_ins = list(self._stand_ins.values())
        return Sized(self._made, specs, self.changed)

    def _next(self, target: Any, arguments: tuple[Any, ...]) -> Any:
        if isinstance(target, nn.Module):
            return self._called(target, arguments)
        if target in DESCRIPTIONS:
            self._require_known(target, arguments)
            with torch._C.DisableTorchFunctionSubclass():
                return target(*arguments[0], **arguments[1])
        given = self._describe(arguments)
        read = self.glue.reads.get((target, given))
        if read is None:
            return self._called(target, arguments)
        self._require_known(target, arguments)
        fixed = getattr(target, "__name__", "") == "__get__" and type(read[0]) is not int
        if not fixed:  # strides, say, are sizes
            read = [target(*substituted(arguments[0], self._value), **arguments[1])]
        self._made.reads[target, self._ids_now(given)] = read
        return super()._next(target, arguments) if fixed else read[0]

    def _require_known(self, target: Any, arguments: Any) -> None:
        for tensor in tensors_in(arguments):
            if type(tensor) is StandIn and id(tensor) not in self._describe.recorded:
                self._differs(f"asks ({name_of(target)}) what a tensor is that no block computes")

    def _is_host(self, call: Call, path: Path, old: Described, new: Described) -> bool:
        return path in call.lifted and is_number(new, of=old)

    def _may_be_host(
        self, number: int, call: Call, path: Path, old: Described, new: Described
    ) -> bool:
        del number, path
        return call.node is not None and is_number(new, of=old)

    def _settled(self, number: int, call: Call, given: Described) -> Call:
        """Return the call at these sizes."""
        if call.node is not None:
            numbers = {path: value for (n, path), value in self.changed.items() if n == number}
            found = self._values.settle(call.node, numbers)
            if not _is_like(call.result, found):
                self._differs(f"is given something else by {call.name}")
            if isinstance(found, Tensor):
                self._stand_in(call.result, found)
        elif call.parts or any(True for _ in tensors_in(call.result)):
            self._differs(f"calls {call.name}, whose results are not in the graph")
        memo: dict[int, Any] = {id(t): self._now(t) for t in members(dict(call.after))[0]}
        repeated = call.repeated
        if repeated is not None:
            changes = [
                replace(c, value=tree_map_only(Tensor, self._now, c.value))
                for c in repeated.changes
            ]
            repeated = replace(repeated, changes=tuple(changes))
        made = replace(
            call,
            result=substituted(call.result, self._now),
            after=copy.deepcopy(dict(call.after), memo),
            repeated=repeated,
        )
        made.arguments = self._ids_now(given)
        self._made.calls.append(made)
        return made

    def _now(self, tensor: Tensor) -> Tensor:
        """Return what stands at these sizes for what a recorded stand-in stands for."""
        node = self._trace.glue.nodes.get(id(tensor))
        if type(tensor) is not StandIn or node is None:
            return tensor
        if id(tensor) not in self._stand_ins:
            self._stand_in(tensor, self._values(node))
        return self._stand_ins[id(tensor)]

    def _stand_in(self, tensor: Tensor, value: Tensor) -> None:
        """Note what a recorded stand-in is at these sizes.

        Its node is the last call that writes to it, which may come later; its shape is known now.
        """
        node = self._trace.glue.nodes.get(id(tensor))
        if type(tensor) is not StandIn or node is None or id(tensor) in self._stand_ins:
            return
        with torch._C.DisableTorchFunctionSubclass():
            made = StandIn.of(value, tensor.dtype)
        self._stand_ins[id(tensor)] = made
        self._shapes[id(made)] = value
        self._describe.recorded[id(made)] = id(tensor)
        self._made.nodes[id(made)] = node

    def _value(self, tensor: Tensor) -> Tensor:
        return self._shapes.get(id(tensor), tensor)

    def _id_now(self, recorded: int) -> int:
        found = self._stand_ins.get(recorded)
        return recorded if found is None else id(found)

    def _ids_now(self, described: Described) -> Described:
        """Return a description in terms of recorded stand-ins in terms of these."""
        if type(described) is int:
            return self._id_now(described)
        if type(described) is not tuple or (len(described) == 2 and isinstance(described[0], type)):
            return described
        return tuple([self._ids_now(member) for member in described])


class _AsRecorded(Description):
    """Describes stand-ins by the ids of the recorded ones."""

    def __init__(self, seen: Any) -> None:
        super().__init__({}, seen)
        self.recorded: dict[int, int] = {}

    def __call__(self, value: Any) -> Described:
        if type(value) is StandIn:
            return self.recorded.get(id(value), id(value))
        return super().__call__(value)


class _ShapeRun:
    """Runs the nodes of a trace on tensors without values.

    Args:
        trace: The trace.
        inputs: Tensors of the batch by name.
        hosts: Host values by name, of the calls so far.
        kinds: Signatures of leaves.
    """

    def __init__(
        self,
        trace: Trace,
        inputs: Mapping[str, Tensor],
        hosts: Mapping[str, Any],
        kinds: dict[nn.Module, str],
    ) -> None:
        self._trace = trace
        self._hosts = hosts
        self._kinds = kinds
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self._results: dict[Any, Any] = {}
        self._inputs = {name: self._twin(tensor) for name, tensor in inputs.items()}
        self._known: dict[fx.Node, Any] = {}
        self._settled: set[fx.Node] = set()

    def __call__(self, node: fx.Node) -> Any:
        """Return the value of ``node``, without its values if it is a tensor."""
        if node not in self._known:
            self.compute(node, {})
        return self._known[node]

    def specs(self) -> dict[str, TensorMeta]:
        """Return what every value of the graph is: of the recorded dtype, in its shape here."""
        recorded = {n: n.meta["spec"] for n in self._trace.graph.nodes if "spec" in n.meta}
        return {
            node.name: spec
            if node.op == "get_attr"
            else replace(spec, shape=tuple(self(node).shape))
            for node, spec in recorded.items()
        }

    def settle(self, node: fx.Node, numbers: Mapping[Path, Any]) -> Any:
        """Compute a value that a call of this run gives; what was computed ahead is forgotten."""
        if numbers:
            self._known = {n: value for n, value in self._known.items() if n in self._settled}
        self._settled.add(node)
        return self.compute(node, numbers)

    def compute(self, node: fx.Node, numbers: Mapping[Path, Any]) -> Any:
        """Compute the value of ``node`` with other ``numbers`` at these paths of its arguments.

        Returns:
            What the call of the glue returns: the value without what a block leaves elsewhere.
        """
        args: Any = node.args
        kwargs: Any = node.kwargs
        for (kind, *inside), number in numbers.items():
            if kind == 0:
                args = placed(args, tuple(inside), number)
            else:
                kwargs = placed(kwargs, tuple(inside), number)
        with torch.no_grad(), _META:
            value = self._computed(node, fx.map_arg(args, self), fx.map_arg(kwargs, self))
            if autocast_dtype() is not None:  # which brings dtypes together, but not on meta
                value = tree_map_only(Tensor, _in_float32, value)
        self._known[node] = value
        held = self._trace.attributes.get(str(node.target))
        while isinstance(held, SideOutputCall | ObjectCall | RegionCall | ModeCall):
            value = value[0] if isinstance(held, SideOutputCall | ObjectCall) else value
            held = held.module if isinstance(held, ObjectCall) else held.function
        return value

    def _computed(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            found = self._trace.attributes[str(node.target)]
            return self._twin(found) if isinstance(found, Tensor) else found
        args, kwargs = tree_map_only(torch.device, lambda _: _META, (args, dict(kwargs)))
        if node.op == "call_module":
            return self._called(self._trace.attributes[str(node.target)], args, kwargs)
        target: Any = node.target
        function = getattr(args[0], target) if node.op == "call_method" else target
        return function(*(args[1:] if node.op == "call_method" else args), **kwargs)

    def _placeholder(self, node: fx.Node) -> Any:
        if node.name in self._inputs:
            return self._inputs[node.name]
        if node.name in self._hosts:
            return self._hosts[node.name]
        return torch.ones(())  # a factor of the loss

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module; leaves that are alike give what the first of them gave."""
        if not self._trace.glue.leaves.is_leaf(module):
            return self._run(module, args, kwargs)
        if module not in self._kinds:
            self._kinds[module] = module_signature(module)
        given, structure = tree_flatten((args, kwargs))
        shown = [(t.shape, t.stride(), t.dtype) if isinstance(t, Tensor) else t for t in given]
        key = self._kinds[module], repr(structure), repr(shown)
        if key not in self._results:
            self._results[key] = self._run(module, args, kwargs)
        return self._results[key]

    def _run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        with self._without_values(module), preserved_state(module), grouped_without_values():
            return module(*args, **kwargs)

    @contextlib.contextmanager
    def _without_values(self, module: nn.Module) -> Iterator[None]:
        """Put tensors without values in place of those of ``module`` and its parts."""
        before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for part in module.modules():
            every: list[Any] = [part._parameters, part._buffers, vars(part)]
            for own in every:
                found = {name: value for name, value in own.items() if isinstance(value, Tensor)}
                before.append((own, found))
                own.update({name: self._twin(value) for name, value in found.items()})
        try:
            yield
        finally:
            for own, found in before:
                own.update(found)

    def _twin(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._twins:
            made = torch.empty_like(tensor, device="meta", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            self._twins[id(tensor)] = tensor, made
        return self._twins[id(tensor)][1]


def _is_like(recorded: Any, value: Any) -> bool:
    """Whether a result has the parts of the recorded one, and the same plain values."""
    if isinstance(recorded, Tensor):
        return isinstance(value, Tensor)
    if isinstance(recorded, PLAIN):  # an assignment has no result
        return recorded is None or (type(recorded) is type(value) and recorded == value)
    if isinstance(recorded, Mapping):
        same = isinstance(value, Mapping) and list(recorded) == list(value)
        return same and all(_is_like(item, value[key]) for key, item in recorded.items())
    if isinstance(recorded, Sequence):
        same = isinstance(value, Sequence) and len(recorded) == len(value)
        return same and all(map(_is_like, recorded, value))
    if is_dataclass(recorded):
        parts = [f.name for f in fields(recorded) if hasattr(value, f.name)]
        same = len(parts) == len(fields(recorded))
        return same and all(_is_like(getattr(recorded, n), getattr(value, n)) for n in parts)
    return not any(True for _ in tensors_in(recorded))  # the handle of a hook


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _alike(one: TensorMeta, other: TensorMeta) -> bool:
    """Whether they differ at most in their sizes."""
    return replace(one, shape=()) == replace(other, shape=()) and len(one.shape) == len(other.shape)
