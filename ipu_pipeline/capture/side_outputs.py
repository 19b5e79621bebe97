"""Side outputs: tensors that leave a block otherwise than as its result.

While a leaf runs in a capture, what it changes in :mod:`places <ipu_pipeline.capture.places>` is
noted. Where the glue then uses a tensor from there, the call of the leaf becomes one that returns
it as well: in every step the stage takes it out of the place, and leaves the place as it was.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ipu_pipeline.capture.places import Path, PlaceChange, Places, shown
from ipu_pipeline.capture.side_output_call import RepeatedChanges, SideOutputCall, Start, Taken
from ipu_pipeline.capture.values import SideFloat, SideInt, computed_from, tensor_paths, tensors_in
from ipu_pipeline.errors import CaptureError

if TYPE_CHECKING:
    from ipu_pipeline.capture.glue import Call
    from ipu_pipeline.capture.tracer import Tracer


@dataclass(frozen=True)
class _Side:
    """One tensor in a place, while the model is captured.

    Attributes:
        node: Stands for it; it has users if the glue uses it.
        original: The node of the same tensor where it is a value anyway.
    """

    taken: Taken
    sink: Any
    node: fx.Node
    original: fx.Node | None


@dataclass(frozen=True)
class _Noted:
    """One call of a leaf that put tensors in places, or found some there."""

    call: Call
    leaf: nn.Module
    places: Places
    changes: tuple[PlaceChange, ...]
    sides: tuple[_Side, ...]
    given: tuple[tuple[Path, Any, int], ...]
    sinks: frozenset[Any]
    carried: list[PlaceChange]


class SideOutputs:
    """The side outputs of one capture.

    Attributes:
        numbers_read: Whether the present leaf has made Python numbers of tensors.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._noted: list[_Noted] = []
        self._used: dict[int, tuple[Tensor, fx.Node]] = {}
        self._used_ids: set[int] = set()
        self._noting = False
        self.numbers_read = False

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Within it, a leaf runs; what earlier ones used is forgotten."""
        self._used.clear()
        self._used_ids.clear()
        self.numbers_read = False
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def release(self) -> None:
        """Drop all tensors: the trace is over."""
        self._used.clear()
        self._noted.clear()

    def use(self, given: Any, *, reads_values: bool) -> None:
        """Note what a function inside a leaf is given, and whether it reads values of it."""
        if not self._noting:
            return
        self.numbers_read |= reads_values
        for tensor in tensors_in(given):
            self._used_ids.add(id(tensor))
            node = self._tracer.values.known(tensor)
            if node is not None and node.op != "get_attr":
                self._used.setdefault(id(tensor), (tensor, node))

    def note(self, call: Call, leaf: nn.Module, places: Places) -> None:
        """Note what the ``call`` of ``leaf`` has put in ``places``, and found there.

        Raises:
            CaptureError: It used a tensor of the batch that it was not given and that is in none.
        """
        assert call.node is not None
        found, (given, sinks) = places.changes(), self._found(call.node, places)
        carried = [c for c in found if self._is_of_an_earlier_pass(c)]
        for change in places.new_numbers() if self.numbers_read else ():
            kind = SideFloat if isinstance(change.value, float) else SideInt
            places.put(change, kind(change.value))
        changes, sides = [], []
        for change in found:
            value = change.value
            if not change.is_recorded:
                # Another object for a tensor that is a value anyway: who uses it has read it here.
                value = tree_map_only(Tensor, self._alias, value)
                places.put(change, value)
            for inner, tensor in tensor_paths(value):
                side = self._side(call.node, change, _from_the_end(value, inner), tensor)
                sides += [side] if side is not None else []
            stand_in = self._tracer.recorder.stand_in
            changes.append(replace(change, value=tree_map_only(Tensor, stand_in, value)))
        noted = _Noted(
            call, leaf, places, tuple(changes), tuple(sides), tuple(given), sinks, carried
        )
        self._noted.append(noted)

    def _is_of_an_earlier_pass(self, change: PlaceChange) -> bool:
        known = self._tracer.values.by_id(change.was)
        return change.was in self._used_ids and known is None

    def _found(
        self, call: fx.Node, places: Places
    ) -> tuple[list[tuple[Path, Any, int]], frozenset[Any]]:
        """Let ``call`` take the tensors that its leaf found in places; return the entries."""
        tracer = self._tracer
        given: list[tuple[Path, Any, int]] = []
        sinks: set[Any] = set()
        nodes: list[fx.Node] = []
        read: list[Tensor] = []
        own = call.all_input_nodes
        for tensor, node in self._used.values():
            original = tracer.values.original(tensor)
            if node in own or original in own or not _is_of_the_batch(node):
                continue
            entries = places.holding(tensor)
            if not entries:
                raise CaptureError(
                    f"{type(tracer.model).__name__} hands a {tuple(tensor.shape)} tensor to "
                    f"{call.meta.get('module', call.target)!r} otherwise than as an argument, and "
                    "not in an attribute, list or dict that can be found: pass it as an argument"
                )
            given += [(path, key, len(nodes)) for path, key, _ in entries]
            sinks.update(sink for _, _, sink in entries)
            nodes.append(node)
            read.append(tensor)
        if nodes:
            call.update_kwarg("side_inputs", tuple(nodes))
            call.meta["after"] += tracer.storages.record(call, read, [])
        return given, frozenset(sinks)

    def finish(self) -> None:
        """Let the calls return what the glue has used, now that all of it has run.

        Raises:
            CaptureError: It used what a leaf makes of a tensor that an earlier pass left there.
        """
        sides = [side for one in self._noted for side in one.sides]
        read = {side.sink for side in sides if side.node.users}
        read = read.union(*(one.sinks for one in self._noted))
        for one in self._noted:
            for change in one.carried:
                if change.sink in read:
                    raise CaptureError(
                        f"{type(one.leaf).__name__} reads a tensor in {shown(change.path)} that it "
                        "put there in an earlier forward pass, and puts another one there, which "
                        "code outside of it reads; stages keep only buffers from batch to batch: "
                        "make it one"
                    )
        for side in reversed(sides):  # later ones may stand for earlier ones
            if side.original is not None:
                side.node.replace_all_uses_with(side.original)
                self._tracer.values.replace(side.node, side.original)
        for one in self._noted:
            taken = [side for side in one.sides if side.node.users]
            undone = [c for c in one.changes if c.sink in read and not c.is_recorded]
            isolated = [(c.path, c.key) for c in undone] + one.places.switched()
            if taken or isolated or one.given:
                self._returning(one, taken, isolated)
            again = [c for c in one.changes if c.is_recorded or c.sink in read]
            if again:
                paths = {change.path for change in again if not change.is_recorded}
                starts = {p: Start.of(*rest) for p, *rest in one.places if p in paths}
                one.call.repeated = RepeatedChanges(one.leaf, tuple(again), starts)
        for side in reversed(sides):
            self._tracer.graph.erase_node(side.node)

    def _alias(self, tensor: Tensor) -> Tensor:
        values = self._tracer.values
        node = values.known(tensor)
        if node is None:
            return tensor
        with torch.set_grad_enabled(tensor.requires_grad):
            alias = tensor.view_as(tensor)
        values.bind_alias(alias, node)
        return alias

    def _side(self, call: fx.Node, change: PlaceChange, inner: Any, tensor: Tensor) -> _Side | None:
        values = self._tracer.values
        original = values.original(tensor)
        if values.known(tensor) is not None and original is None:
            return None  # recorded, and a value anyway
        node = self._tracer.new_node("call_function", _side_output, (call, inner), meta_of=tensor)
        values.bind(tensor, node)
        return _Side(Taken(change.path, change.key, inner), change.sink, node, original)

    def _returning(self, one: _Noted, taken: list[_Side], undone: list[tuple[Path, Any]]) -> None:
        """Let one call return side outputs."""
        attributes, graph, call = self._tracer.attributes, self._tracer.graph, one.call.node
        assert call is not None
        holder = SideOutputCall(
            attributes[str(call.target)],
            one.leaf,
            recorded=one.places.recorded,
            taken=[side.taken for side in taken],
            given=one.given,
            undone=undone,
            starts={path: Start.of(place, before) for path, place, before in one.places},
        )
        users = [node for node in call.users if node.target is not _side_output]
        call.target = f"_held.side_outputs_{len(attributes)}"
        attributes[call.target] = holder
        with graph.inserting_after(call):
            sides = graph.call_function(operator.getitem, (call, 1))
            result = graph.call_function(operator.getitem, (call, 0))
        result.meta = {k: v for k, v in call.meta.items() if k in _OF_THE_RESULT}
        sides.meta["scope"] = call.meta["scope"]
        call.meta.pop("spec", None)
        self._tracer.values.replace(call, result)
        for user in users:
            user.replace_input_with(call, result)
        for number, side in enumerate(taken):
            with graph.inserting_after(sides):
                item = graph.call_function(operator.getitem, (sides, number))
            item.meta = dict(side.node.meta)
            side.node.replace_all_uses_with(item)
            self._tracer.values.replace(side.node, item)


def _from_the_end(value: Any, inner: Any) -> Any:
    """Count in a list from its end: ``kept = [*kept, new]`` has the new one there."""
    if not isinstance(value, list | tuple):
        return inner
    (access, number), *rest = inner
    return ((access, number - len(value)), *rest)


def _is_of_the_batch(node: fx.Node) -> bool:
    """Whether a value may be another one for another batch."""
    drawn_or_given = ("placeholder", "call_module")
    return any(n.op in drawn_or_given or n.meta.get("random") for n in computed_from(node))


_OF_THE_RESULT = ("scope", "spec", "storage", "value_shape")


def _side_output(*_: Any) -> None:
    """Stand for a side output until the end of a capture."""
