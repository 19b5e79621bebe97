"""The glue in one run of the model: every call of a torch function or leaf, with stand-ins.

:mod:`~ipu_pipeline.capture.replay` compares later runs with it.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ipu_pipeline.capture.calls import Region, name_of
from ipu_pipeline.capture.leaves import Leaves
from ipu_pipeline.capture.objects import members
from ipu_pipeline.capture.reads import Session
from ipu_pipeline.capture.side_output_call import RepeatedChanges
from ipu_pipeline.capture.values import PLAIN, named_tensors, tensors_in
from ipu_pipeline.errors import CaptureError

Path = tuple[int, ...]
# A described value: the id of a tensor or object, (type, value), or (type, keys, members).
Described = Any


class StandIn(Tensor):
    """Stands for a tensor while the glue is replayed; has its shape and dtype, and no values."""

    has_no_values = True

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> StandIn:
        """Make one, perhaps of another dtype."""
        empty = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
        return Tensor._make_subclass(cls, empty)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CaptureError(
            f"{name_of(func)} is called with a tensor that the model's own code kept from an "
            "earlier forward pass; between its blocks that code runs without values, and only "
            "target='local' puts real ones in their place, in attributes, lists, dicts and "
            "closures of the model: keep the tensor in a buffer, or return it from forward"
        )


@dataclass(eq=False)
class Call:
    """One call of the glue.

    Attributes:
        target: The function, the leaf, or what else was called.
        arguments: Described positional and keyword arguments.
        region: Modes of the thread.
        parts: The leaf and the modules in it.
        modes: Their training flags.
        result: What it returned, stand-ins for tensors.
        node: Its node, where it has one whose arguments are those of the call.
        where: Whose code called it.
        after: Contents of the objects that it was given, by place, afterwards.
        repeated: What it left in lists and attributes that the glue reads.
        lifted: Names of the host values by path.
        sized: Those of ``lifted`` that are host values only because sizes differ.
        reads_values: It gives Python values of tensors.
        is_late: Those are values that only the stages compute.
    """

    target: Any
    arguments: Described
    region: Region
    parts: tuple[nn.Module, ...] = ()
    modes: tuple[bool, ...] = ()
    result: Any = None
    node: fx.Node | None = None
    where: str = ""
    after: Mapping[Any, Any] = field(default_factory=dict)
    repeated: RepeatedChanges | None = None
    lifted: dict[Path, str] = field(default_factory=dict)
    sized: set[Path] = field(default_factory=set)
    reads_values: bool = False
    is_late: bool = False

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors that it returned."""
        with torch._C.DisableTorchFunctionSubclass():
            return [tuple(tensor.shape) for tensor in tensors_in(self.result)]

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return type(self.target).__name__ if self.parts else name_of(self.target)


@dataclass(eq=False)
class Glue:
    """All calls of the glue in one run.

    Attributes:
        ambient: Modes of the thread around the model.
        leaves: The leaves of the model.
        calls: In order, those that do something.
        reads: Results of the others (shapes, types, flags) by function and described arguments.
        inputs: Stand-ins of the batch's tensors.
        results: Ids of what stands for the results, by name.
        hosts: Host values as they were in the recorded run.
        session: What the nodes of its reads, host values and kept tensors share.
        nodes: The node of what a stand-in stands for, by the stand-in's id.
        kept: Keys in ``nodes`` of what stages hand over, because this code keeps it.
        written_back: Names of the buffers that it replaces: stages write into the ones there are.
        unsteady: Why its reads cannot be checked against the recorded ones, if they cannot.
        frozen: What a program would repeat that is compiled once, if there is something.
        stand_ins: All of them.
        changing: Ids of those of the model's own tensors that the run changed.
    """

    ambient: Region
    leaves: Leaves
    calls: list[Call] = field(default_factory=list)
    reads: dict[tuple[Any, Described], list[Any]] = field(default_factory=dict)
    inputs: dict[str, StandIn] = field(default_factory=dict)
    results: dict[str, int] = field(default_factory=dict)
    hosts: dict[str, Any] = field(default_factory=dict)
    session: Session = field(default_factory=Session)
    nodes: dict[int, fx.Node] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    written_back: set[str] = field(default_factory=set)
    unsteady: str = ""
    frozen: str = ""
    stand_ins: list[Tensor] = field(default_factory=list)
    changing: frozenset[int] = frozenset()
    _kept: list[Any] = field(default_factory=list)  # ids in descriptions stay theirs

    @cached_property
    def references(self) -> list[int]:
        """How often each stand-in is referred to while nobody keeps one."""
        return [sys.getrefcount(stand_in) for stand_in in self.stand_ins]

    @cached_property
    def late_values(self) -> tuple[Any, ...]:
        """What Python read of values that only the stages compute, in order."""
        return tuple(call.result for call in self.calls if call.is_late)

    @cached_property
    def constants(self) -> dict[int, Tensor]:
        """Tensors that outlive a run and that calls were given and do not change, by id."""
        found = {id(value): value for value in self._kept if type(value) is Tensor}
        return {key: value for key, value in found.items() if key not in self.changing}

    def referenced(self) -> list[Tensor]:
        """Return the stand-ins that somebody keeps."""
        found = [sys.getrefcount(stand_in) for stand_in in self.stand_ins]
        pairs = zip(self.stand_ins, found, self.references, strict=True)
        return [stand_in for stand_in, now, before in pairs if now > before]

    def forget_references(self) -> None:
        """Take those that there are now for those of nobody who matters."""
        self.references[:] = [sys.getrefcount(stand_in) for stand_in in self.stand_ins]


class GlueRecorder:
    """Makes the :class:`Glue` of a trace; ``owned`` are ids of tensors that live longer."""

    def __init__(self, ambient: Region, leaves: Leaves, owned: Iterable[int]) -> None:
        self.glue = Glue(ambient, leaves)
        self._own = set(owned)
        self._stand_ins: dict[int, Tensor] = {}
        self.describe = Description(self._stand_ins, self._seen)

    def input(self, name: str, tensor: Tensor) -> None:
        """Note a tensor of the batch."""
        self.glue.inputs[name] = self.stand_in(tensor)  # type: ignore[assignment]

    def stand_in(self, tensor: Tensor) -> Tensor:
        """Return what stands for ``tensor``: itself if it lives longer than the run."""
        if id(tensor) in self._own:
            return tensor
        if id(tensor) not in self._stand_ins:
            self._stand_ins[id(tensor)] = StandIn.of(tensor)
        return self._stand_ins[id(tensor)]

    def add(self, call: Call, result: Any) -> None:
        """Record a call that returned ``result``."""
        call.result = substituted(result, self.stand_in)
        if call.node is not None or call.parts or call.target == "vmap" or call.reads_values:
            self.glue.calls.append(call)
        else:
            self.glue.reads.setdefault((call.target, call.arguments), []).append(call.result)

    def contents(self, objects: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return copies of objects, stand-ins for their tensors."""
        memo: dict[int, Any] = {id(t): self.stand_in(t) for t in members(objects)[0]}
        return copy.deepcopy(dict(objects), memo)

    def finish(self, output: Any, node_of: Callable[[int], fx.Node | None]) -> Glue:
        """Return what was recorded of a run with this output; nodes are found by tensors' ids."""
        self.glue.results = {
            name: id(self.stand_in(tensor)) for name, tensor in named_tensors(output)
        }
        found = ((id(stand_in), node_of(i)) for i, stand_in in self._stand_ins.items())
        self.glue.nodes = {i: node for i, node in found if node is not None}
        self.glue.stand_ins = list(self._stand_ins.values())
        self._stand_ins.clear()
        return self.glue

    def _seen(self, value: Any) -> None:
        self.glue._kept.append(value)
        if isinstance(value, Tensor):
            self._own.add(id(value))


class Description:
    """Describes arguments, so that equal descriptions are equal calls.

    Args:
        stand_ins: What stands for a tensor, by the tensor's id.
        seen: Is told of every tensor and object that is described by its id.
    """

    def __init__(
        self, stand_ins: Mapping[int, Tensor], seen: Callable[[Any], None] = lambda _: None
    ) -> None:
        self._stand_ins = stand_ins
        self._seen = seen

    def __call__(self, value: Any) -> Described:
        """Describe ``value``."""
        kind = type(value)
        if kind is StandIn:
            return id(value)
        if kind in ATOMS:
            return kind, value if value == value else math.nan  # one object: equal to itself
        if kind is tuple or kind is list or kind is torch.Size:
            return (list if kind is list else tuple), None, tuple([self(item) for item in value])
        if kind is dict:
            return kind, tuple(value), tuple([self(item) for item in value.values()])
        return self._rare(value)

    def _rare(self, value: Any) -> Described:
        if isinstance(value, Tensor):
            known = self._stand_ins.get(id(value))
            if known is not None:
                return id(known)
        elif isinstance(value, np.generic):
            return self(value.item())
        elif isinstance(value, np.ndarray):
            return np.ndarray, (value.dtype.str, value.shape, value.tobytes())
        elif isinstance(value, slice):
            return slice, None, (self(value.start), self(value.stop), self(value.step))
        elif isinstance(value, set):
            return set, None, tuple(sorted(map(self, value), key=repr))
        elif isinstance(value, functools.partial):
            return (
                functools.partial,
                None,
                tuple(self(part) for part in (value.func, value.args, value.keywords)),
            )
        elif isinstance(value, types.FunctionType):
            return self._function(value)
        elif isinstance(value, PLAIN):
            return type(value), value
        self._seen(value)
        return id(value)

    def _function(self, function: types.FunctionType) -> Described:
        cells = []
        for cell in function.__closure__ or ():
            content = getattr(cell, "cell_contents", None)
            cells.append("itself" if content is function else self(content))
        defaults = function.__defaults__, function.__kwdefaults__
        return types.FunctionType, function.__code__, (*map(self, defaults), *cells)

    def objects(self, objects: Mapping[Any, Any]) -> Described:
        """Describe objects that a call may change, by what is in them."""
        tensors, plain = members(objects)
        return tuple(objects), tuple(map(self, tensors)), plain


ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range,
                    torch.dtype, torch.device, torch.layout, torch.memory_format})  # fmt: skip


def substituted(value: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of a call's result with ``of(tensor)`` for every tensor; containers anew."""
    if isinstance(value, Tensor):
        return of(value)
    kind = type(value)
    if kind in (list, tuple, set, deque):
        return kind(substituted(item, of) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(substituted(item, of) for item in value))
    if isinstance(value, Mapping) and hasattr(value, "__setitem__"):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = substituted(item, of)
        return made
    if isinstance(value, np.ndarray):
        return value.copy()
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        made = copy.copy(value)
        for name in value.__dataclass_fields__:
            object.__setattr__(made, name, substituted(getattr(value, name), of))
        return made
    return value


def placed(value: Any, path: Path, new: Any) -> Any:
    """Return ``value``, arguments of a node, with ``new`` at ``path``."""
    if not path:
        return new
    first, rest = path[0], path[1:]
    if isinstance(value, slice):
        parts = [value.start, value.stop, value.step]
        return slice(*(placed(p, rest, new) if i == first else p for i, p in enumerate(parts)))
    if isinstance(value, Mapping):
        return {
            key: placed(item, rest, new) if i == first else item
            for i, (key, item) in enumerate(value.items())
        }
    items = (placed(item, rest, new) if i == first else item for i, item in enumerate(value))
    return list(items) if isinstance(value, list) else tuple(items)


def become(live: Any, recorded: Any) -> None:
    """Give the object ``live`` the contents of ``recorded``."""
    memo = {id(t): t for t in members(recorded)[0]} | {id(recorded): live}

    def fresh(value: Any) -> Any:
        return copy.deepcopy(value, memo)

    if isinstance(live, dict):
        items = {key: fresh(value) for key, value in recorded.items()}
        live.clear()
        live.update(items)
    elif isinstance(live, list | deque | set):
        contents = [fresh(value) for value in recorded]
        live.clear()
        (live.update if isinstance(live, set) else live.extend)(contents)
    if hasattr(live, "__dict__"):
        attributes = {name: fresh(value) for name, value in vars(recorded).items()}
        vars(live).clear()
        vars(live).update(attributes)
    for name in (n for kind in type(live).__mro__ for n in getattr(kind, "__slots__", ())):
        if hasattr(recorded, name):
            setattr(live, name, fresh(getattr(recorded, name)))


def apart(arguments: tuple[Any, ...], places: Mapping[Any, Any]) -> tuple[Any, dict[Any, Any]]:
    """Return a leaf's arguments without the objects at ``places``, and the objects."""
    args, kwargs = arguments
    objects = {p: args[p] if isinstance(p, int) else kwargs[p] for p in places}
    rest = tuple(None if n in places else value for n, value in enumerate(args))
    return (rest, {n: None if n in places else value for n, value in kwargs.items()}), objects


def member_at(arguments: Any, path: Path) -> Any:
    """Return what stands at ``path`` of arguments."""
    for index in path:
        if isinstance(arguments, slice):
            arguments = (arguments.start, arguments.stop, arguments.step)
        elif isinstance(arguments, Mapping):
            arguments = list(arguments.values())
        arguments = arguments[index]
    return arguments


def paths_of(arguments: Any, value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield where the object ``value`` stands in arguments."""
    if arguments is value:
        yield path
    elif isinstance(arguments, tuple | list | dict):
        items = arguments.values() if isinstance(arguments, dict) else arguments
        for index, item in enumerate(items):
            yield from paths_of(item, value, (*path, index))
