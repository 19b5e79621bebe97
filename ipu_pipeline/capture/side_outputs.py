"""Side outputs: tensors that leave a block otherwise than as its result.

While a leaf runs in a capture, what it changes in :mod:`places <ipu_pipeline.capture.places>` is
noted. Where the glue then uses a tensor from there, the call of the leaf becomes one that returns
it as well: in every step the stage takes it out of the place, and leaves the place as it was.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ipu_pipeline.capture.places import (
    LISTS,
    RECORDERS,
    Path,
    PlaceChange,
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
from ipu_pipeline.capture.values import SideFloat, SideInt, tensor_paths, tensors_in
from ipu_pipeline.errors import CaptureError, GuardError

if TYPE_CHECKING:
    from ipu_pipeline.capture.glue import Call
    from ipu_pipeline.capture.tracer import Tracer

# Held while a block runs whose side outputs are in a place that other threads reach too.
SHARED_PLACES = threading.RLock()


@dataclass(frozen=True)
class Taken:
    """One side output: a tensor in what a call put in a place."""

    path: Path
    key: Any
    inner: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class Start:
    """How a place was when a call began, at capture.

    Attributes:
        kind: Its class.
        length: Number of entries of a list.
        entries: What was in anything else, nothing in place of tensors.
        plain: Entries that were no tensors and had none.
    """

    kind: type
    length: int
    entries: Mapping[Any, Any]
    plain: frozenset[Any] = frozenset()

    @classmethod
    def of(cls, place: Any, before: Any) -> Start:
        """Describe ``place``, in which ``before`` was."""
        if isinstance(place, LISTS):
            return cls(type(place), len(before), {})
        without = {key: tree_map_only(Tensor, lambda _: None, v) for key, v in before.items()}
        plain = (key for key, value in before.items() if not any(True for _ in tensors_in(value)))
        return cls(type(place), 0, without, frozenset(plain))

    def copied(self, key: Any) -> dict[Any, Any]:
        """Return the entry by its key, if there was one; who gets a list may change it."""
        if key not in self.entries:
            return {}
        value = self.entries[key]
        return {key: copy.copy(value) if isinstance(value, (*LISTS, dict)) else value}


class SideOutputCall(nn.Module):
    """Calls a leaf and returns, beside its result, what it put in places.

    Args:
        function: The leaf, or what calls it.
        leaf: Where the paths begin.
        recorded: Lengths of the recorders' lists at capture.
        taken: What to return.
        given: Path and entry of every tensor that it finds in a place, and its number.
        undone: Path and entry of everything that is put back.
        starts: How these places were.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        leaf: nn.Module,
        *,
        recorded: Mapping[str, int],
        taken: Sequence[Taken],
        given: Sequence[tuple[Path, Any, int]],
        undone: Iterable[tuple[Path, Any]],
        starts: Mapping[Path, Start],
    ) -> None:
        super().__init__()
        self.function = function
        self.recorded = dict(recorded) if any(t.path[:1] == RECORDERS for t in taken) else {}
        self.taken = tuple(taken)
        self.given = tuple(given)
        self.undone: dict[Path, list[Any]] = {}
        for path, key in (*undone, *((path, key) for path, key, _ in given)):
            self.undone.setdefault(path, []).append(key)
        self._starts = {path: starts[path] for path in self.undone}
        self._leaf = (leaf,)  # no part of its own: it is one of ``function``

    def forward(
        self, *args: Any, side_inputs: Sequence[Tensor] = (), **kwargs: Any
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Call the leaf; return its result and the side outputs.

        Raises:
            GuardError: It does not put there what it did at capture.
        """
        with contextlib.ExitStack() as stack:
            if self.undone:
                stack.enter_context(SHARED_PLACES)
            if self.recorded:
                stack.enter_context(recording(self.recorded))
            places = {path: stack.enter_context(self._isolated(path)) for path in self.undone}
            for path, key, number in self.given:
                set_entry(places[path], key, side_inputs[number])
            recorders = {t.path for t in self.taken} - places.keys()
            places |= {path: place_at(self._leaf[0], path) for path in recorders}
            before = {path: entries_of(place) for path, place in places.items()}
            result = self.function(*args, **kwargs)
            now = {
                (path, change.key): change.value
                for path, place in places.items()
                for change in changed(path, place, before[path])
            }
            return result, tuple(self._tensor(taken, now) for taken in self.taken)

    @contextlib.contextmanager
    def _isolated(self, path: Path) -> Iterator[Any]:
        """Let a place be as it was at capture when the call began; put it back afterwards."""
        start, keys = self._starts[path], self.undone[path]
        place, made = self._place(path, start.kind)
        before = entries_of(place)
        if start.kind in LISTS:
            refill(place, [None] * start.length)
        for key in keys if start.kind not in LISTS else ():
            if (key in start.entries) != (key in before) or key in start.plain:
                put_back(place, key, start.copied(key))
        try:
            yield place
        finally:
            now = entries_of(place) or {}
            if start.kind in LISTS:
                refill(place, before)
            for key in keys if start.kind not in LISTS else ():
                if isinstance(now.get(key), Tensor):  # whoever logs it finds the last one
                    set_entry(place, key, now[key].detach())
                else:
                    put_back(place, key, before)
            if made is not None:
                put_back(*made, {})

    def _place(self, path: Path, kind: type) -> tuple[Any, tuple[Any, Any] | None]:
        """Return a place; a list or dict that the glue makes in every pass may have to be made."""
        if kind in (dict, *LISTS) and path:
            parent, (_, key) = place_at(self._leaf[0], path[:-1]), path[-1]
            entries = entries_of(parent)
            if isinstance(entries, dict) and key not in entries:
                set_entry(parent, key, kind())
                return place_at(self._leaf[0], path), (parent, key)
        return place_at(self._leaf[0], path), None

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

    def extra_repr(self) -> str:
        """Return what tells this call from others."""
        return f"{[(t.path, t.key) for t in self.taken]}, {self.given}, {sorted(self.recorded)}"


@dataclass(frozen=True)
class RepeatedChanges:
    """What a leaf did to places that the glue reads, to be done again without running it.

    Attributes:
        leaf: Where the paths begin.
        changes: Their values have stand-ins in place of tensors.
        starts: How the places were when the call began.
    """

    leaf: nn.Module
    changes: tuple[PlaceChange, ...]
    starts: Mapping[Path, Start]

    def apply(self) -> None:
        """Put the stand-ins in the places.

        Raises:
            GuardError: A place is not as it was when the call began at capture.
        """
        self._check()
        for change in self.changes:
            value = tree_map_only(Tensor, lambda tensor: tensor, change.value)  # containers anew
            place = place_at(self.leaf, change.path)
            if isinstance(place, LISTS):
                place.append(value)
            else:
                set_entry(place, change.key, value)

    def entries(self) -> Iterator[tuple[int, Any]]:
        """Yield the dicts, by id, and the keys in them in which stages leave the last tensors."""
        for change in self.changes:
            place = place_at(self.leaf, change.path)
            if not isinstance(place, (*LISTS, types.FunctionType)):
                yield id(place if isinstance(place, dict) else vars(place)), change.key

    def _check(self) -> None:
        for path, start in self.starts.items():
            place = place_at(self.leaf, path)
            now = Start.of(place, entries_of(place) or {})
            keys = [change.key for change in self.changes if change.path == path]
            if now.length != start.length or any(
                now.entries.get(key, start) != start.entries.get(key, start)
                if key in start.plain
                else (key in now.entries) != (key in start.entries)
                for key in keys
            ):
                raise GuardError(
                    f"{type(self.leaf).__name__} finds something else in {shown(path)} than when "
                    "the model was captured: empty it in the model's forward pass, or keep what is "
                    "to last from batch to batch in a buffer"
                )


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
    pending, seen = [node], {node}
    while pending:
        source = pending.pop()
        if source.op in ("placeholder", "call_module") or source.meta.get("random"):
            return True
        new = [n for n in source.all_input_nodes if n not in seen]
        seen.update(new)
        pending += new
    return False


_OF_THE_RESULT = ("scope", "spec", "storage", "value_shape")


def _side_output(*_: Any) -> None:
    """Stand for a side output until the end of a capture."""
