"""Side outputs: tensors that leave a block otherwise than as its result.

While a leaf runs in a capture, what it changes in :mod:`places <ipu_pipeline.capture.places>` is
noted. Where the glue then uses a tensor from there, the call of the leaf becomes one that returns
it as well: in every step the stage takes it out of the place, and leaves the place as it was.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ipu_pipeline.capture.places import (
    LISTS,
    RECORDERS,
    Change,
    Path,
    Places,
    changed,
    entries_of,
    place_at,
    put_back,
    recording,
    refill,
    set_entry,
    shown,
)
from ipu_pipeline.capture.values import tensor_paths
from ipu_pipeline.errors import GuardError

if TYPE_CHECKING:
    from ipu_pipeline.capture.tracer import Tracer

# Held while a block runs whose side outputs are in a place that other threads reach too.
SHARED_PLACES = threading.RLock()


@dataclass(frozen=True)
class Taken:
    """One side output: a tensor in what a call put in a place."""

    path: Path
    key: Any
    inner: tuple[tuple[Any, Any], ...]


class SideOutputCall(nn.Module):
    """Calls a leaf and returns, beside its result, what it put in places.

    Args:
        function: The leaf, or what calls it.
        leaf: Where the paths begin.
        recorded: Lengths of the recorders' lists at capture; empty without any.
        taken: What to return.
        undone: Path and entry of everything that is put back.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        leaf: nn.Module,
        recorded: Mapping[str, int],
        taken: Sequence[Taken],
        undone: Iterable[tuple[Path, Any]],
    ) -> None:
        super().__init__()
        self.function = function
        self.recorded = dict(recorded) if any(t.path[:1] == RECORDERS for t in taken) else {}
        self.taken = tuple(taken)
        self.undone: dict[Path, list[Any]] = {}
        for path, key in undone:
            self.undone.setdefault(path, []).append(key)
        paths = (path for path in self.undone if path[:1] != RECORDERS)
        self._kinds = {path: type(place_at(leaf, path)) for path in paths}
        self._leaf = (leaf,)  # no part of its own: it is one of ``function``

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """Call the leaf; return its result and the side outputs.

        Raises:
            GuardError: It does not put there what it did at capture.
        """
        with contextlib.ExitStack() as stack:
            if self.undone:
                stack.enter_context(SHARED_PLACES)
            if self.recorded:
                stack.enter_context(recording(self.recorded))
            paths = dict.fromkeys([*self.undone, *(t.path for t in self.taken)])
            places = {path: self._place(path) for path in paths}
            before = {path: entries_of(place) for path, place in places.items()}
            try:
                result = self.function(*args, **kwargs)
                now = {
                    (path, change.key): change.value
                    for path, place in places.items()
                    for change in changed(path, place, before[path])
                }
            finally:
                self._undo(places, before)
        return result, tuple(self._tensor(taken, now) for taken in self.taken)

    def _place(self, path: Path) -> Any:
        """Return a place; a list or dict that the glue makes in every pass is empty here."""
        kind = self._kinds.get(path)
        if kind not in (dict, *LISTS):
            return place_at(self._leaf[0], path)
        parent, (_, key) = place_at(self._leaf[0], path[:-1]), path[-1]
        entries = entries_of(parent)
        if isinstance(entries, dict) and key not in entries:
            set_entry(parent, key, kind())
        return place_at(self._leaf[0], path)

    def _tensor(self, taken: Taken, now: Mapping[Any, Any]) -> Tensor:
        value = now.get((taken.path, taken.key))
        for access, key in taken.inner:
            try:
                value = access(value, key)
            except (TypeError, KeyError, IndexError, AttributeError):
                value = None
        if not isinstance(value, Tensor):
            raise GuardError(
                f"{type(self._leaf[0]).__name__} put a tensor in {shown(taken.path)} when it was "
                "captured, and none for this batch; capture it again with this batch"
            )
        return value

    def _undo(self, places: Mapping[Path, Any], before: Mapping[Path, Any]) -> None:
        for path, keys in self.undone.items():
            place = places[path]
            if isinstance(place, LISTS):
                refill(place, before[path])
                continue
            now = entries_of(place) or {}
            for key in keys:
                if isinstance(now.get(key), Tensor):  # whoever logs it finds the last one
                    set_entry(place, key, now[key].detach())
                else:
                    put_back(place, key, before[path])

    def extra_repr(self) -> str:
        """Return what tells this call from others."""
        return f"{[(t.path, t.key) for t in self.taken]}, {sorted(self.recorded)}"


@dataclass(frozen=True)
class RepeatedChanges:
    """What a leaf did to places that the glue reads, to be done again without running it.

    Attributes:
        leaf: Where the paths begin.
        changes: Their values have nodes in place of tensors.
    """

    leaf: nn.Module
    changes: tuple[Change, ...]

    def apply(self, tensor_of: Callable[[fx.Node], Tensor]) -> None:
        """Put the tensors that stand for the nodes in the places."""
        for change in self.changes:
            value = tree_map_only(fx.Node, tensor_of, change.value)
            place = place_at(self.leaf, change.path)
            if isinstance(place, LISTS):
                place.append(value)
            else:
                set_entry(place, change.key, value)


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
    """One call of a leaf that put tensors in places."""

    call: fx.Node
    leaf: nn.Module
    recorded: Mapping[str, int]
    changes: tuple[Change, ...]
    sides: tuple[_Side, ...]


class SideOutputs:
    """The side outputs of one capture."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._noted: list[_Noted] = []

    def note(self, call: fx.Node, leaf: nn.Module, places: Places) -> None:
        """Note what the ``call`` of ``leaf`` has put in ``places``."""
        found = places.changes()
        if not found:
            return
        changes, sides = [], []
        for change in found:
            value = change.value
            if not change.is_recorded:
                # Another object for a tensor that is a value anyway: who uses it has read it here.
                value = tree_map_only(Tensor, self._alias, value)
                places.put(change, value)
            for inner, tensor in tensor_paths(value):
                side = self._side(call, change, _from_the_end(value, inner), tensor)
                sides += [side] if side is not None else []
            changes.append(replace(change, value=tree_map_only(Tensor, self._node, value)))
        self._noted.append(_Noted(call, leaf, places.recorded, tuple(changes), tuple(sides)))

    def finish(self) -> None:
        """Let the calls return what the glue has used, now that all of it has run."""
        sides = [side for one in self._noted for side in one.sides]
        read = {side.sink for side in sides if side.node.users}
        for side in reversed(sides):  # later ones may stand for earlier ones
            if side.original is not None:
                side.node.replace_all_uses_with(side.original)
        becomes = {side.node: side.original for side in sides if side.original is not None}
        for one in self._noted:
            taken = [side for side in one.sides if side.node.users]
            undone = [c for c in one.changes if c.sink in read and not c.is_recorded]
            if taken or undone:
                becomes.update(self._returning(one, taken, undone))
        for one in self._noted:
            again = [
                replace(change, value=tree_map_only(fx.Node, _last(becomes), change.value))
                for change in one.changes
                if change.is_recorded or change.sink in read
            ]
            one.call.meta["repeated"] = RepeatedChanges(one.leaf, tuple(again))
        for side in reversed(sides):
            self._tracer.graph.erase_node(side.node)

    def _alias(self, tensor: Tensor) -> Tensor:
        values = self._tracer.values
        node = values.known(tensor)
        if node is None:
            return tensor
        with torch.set_grad_enabled(tensor.requires_grad):
            alias = self._tracer.untraced(tensor.view_as, tensor)
        values.bind_alias(alias, node)
        return alias

    def _node(self, tensor: Tensor) -> fx.Node:
        node = self._tracer.values.known(tensor)
        assert node is not None
        return node

    def _side(self, call: fx.Node, change: Change, inner: Any, tensor: Tensor) -> _Side | None:
        values = self._tracer.values
        original = values.original(tensor)
        if values.known(tensor) is not None and original is None:
            return None  # recorded, and a value anyway
        node = self._tracer.new_node("call_function", _side_output, (call, inner), meta_of=tensor)
        values.bind(tensor, node)
        return _Side(Taken(change.path, change.key, inner), change.sink, node, original)

    def _returning(
        self, one: _Noted, taken: list[_Side], undone: list[Change]
    ) -> dict[fx.Node, fx.Node]:
        """Let one call return side outputs; return which node becomes which."""
        attributes, graph, call = self._tracer.attributes, self._tracer.graph, one.call
        holder = SideOutputCall(
            attributes[str(call.target)],
            one.leaf,
            one.recorded,
            [side.taken for side in taken],
            [(change.path, change.key) for change in undone],
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
        for user in users:
            user.replace_input_with(call, result)
        becomes = {call: result}
        for number, side in enumerate(taken):
            with graph.inserting_after(sides):
                item = graph.call_function(operator.getitem, (sides, number))
            item.meta = dict(side.node.meta)
            side.node.replace_all_uses_with(item)
            becomes[side.node] = item
        return becomes


def _from_the_end(value: Any, inner: Any) -> Any:
    """Count in a list from its end: ``kept = [*kept, new]`` has the new one there."""
    if not isinstance(value, list | tuple):
        return inner
    (access, number), *rest = inner
    return ((access, number - len(value)), *rest)


def _last(becomes: Mapping[fx.Node, fx.Node]) -> Callable[[fx.Node], fx.Node]:
    def last(node: fx.Node) -> fx.Node:
        return last(becomes[node]) if node in becomes else node

    return last


_OF_THE_RESULT = ("scope", "spec", "storage", "value_shape")


def _side_output(*_: Any) -> None:
    """Stand for a side output until the end of a capture."""
