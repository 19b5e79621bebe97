"""The glue is recorded, and run again before every microbatch without computing anything.

What Python decides between the blocks may change from batch to batch: an attribute, a config, a
closure, a global, a random number, the time, the mode of a part. So the model's own code runs
before every microbatch, once, as in plain torch; its calls of torch functions and leaves give
stand-ins, and every call is compared with the recorded one. What differs is either a number, which
from then on is a *host value*, an input of the graph; or it is another capture.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.calls import COMPARISONS, Region, name_of
from ipu_pipeline.capture.leaves import Leaves
from ipu_pipeline.capture.objects import members
from ipu_pipeline.capture.patches import collected_outputs, patched_calls
from ipu_pipeline.capture.values import PLAIN, named_tensors
from ipu_pipeline.errors import CaptureError

Path = tuple[int, ...]
# A described value: the id of a tensor or object, (type, value), or (type, keys, members).
Described = Any

_CONTAINERS = (tuple, list, dict, set, slice)
# Numbers in these are values, never sizes or axes: whole numbers too.
_ARITHMETIC = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("add", "sub", "mul", "div", "truediv", "true_divide", "floor_divide", "pow",
                 "floordiv", "remainder", "fmod", "rsub", "tensor", "full_like", "fill",
                 "masked_fill", "clamp")
    for prefix in ("", "__", "__r", "__i")
    for suffix in ("", "_", "__")
)  # fmt: skip
# Numbers in these decide what shape the result has.
_SIZED = frozenset(
    {"arange", "range", "interpolate", "upsample", "fractional_max_pool2d",
     "fractional_max_pool3d", "linspace", "logspace"}
)  # fmt: skip
# A whole number that may be a size becomes a host value after so many captures for its sake.
INTEGER_CAPTURES = 3


class StandIn(Tensor):
    """Stands for a tensor while the glue is replayed; has its shape and dtype, and no values."""

    @classmethod
    def of(cls, tensor: Tensor) -> StandIn:
        """Make one."""
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return Tensor._make_subclass(cls, empty)  # type: ignore[return-value]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CaptureError(
            f"{name_of(func)} is called with a tensor that the model's own code kept from an "
            "earlier forward pass; between its blocks that code runs without values: keep the "
            "tensor in a buffer, or return it from forward"
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
        collected: What transformers' hooks collected meanwhile.
        lifted: Names of the host values by path.
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
    collected: Mapping[str, list[Any]] = field(default_factory=dict)
    lifted: dict[Path, str] = field(default_factory=dict)

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
        calls: In order.
        inputs: Stand-ins of the batch's tensors.
        results: Ids of what stands for the results, by name.
        hosts: Host values as they were in the recorded run.
    """

    ambient: Region
    leaves: Leaves
    calls: list[Call] = field(default_factory=list)
    inputs: dict[str, StandIn] = field(default_factory=dict)
    results: dict[str, int] = field(default_factory=dict)
    hosts: dict[str, Any] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)  # ids in descriptions stay theirs


class Recorder:
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
        self.glue.calls.append(call)

    def contents(self, objects: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return copies of objects, stand-ins for their tensors."""
        memo: dict[int, Any] = {id(t): self.stand_in(t) for t in members(objects)[0]}
        return copy.deepcopy(dict(objects), memo)

    def finish(self, output: Any) -> Glue:
        """Return what was recorded of a run with this output."""
        self.glue.results = {
            name: id(self.stand_in(tensor)) for name, tensor in named_tensors(output)
        }
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
        if kind in _ATOMS:
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


_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range,
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


# ---- following a record -----------------------------------------------------------------------


class Differs(BaseException):
    """The glue does something else than recorded. User code must not catch it by accident.

    Attributes:
        place: Number of the call, and the path of the argument that differs.
    """

    def __init__(self, text: str, place: tuple[int, Path] | None = None) -> None:
        super().__init__(text)
        self.place = place


@dataclass(frozen=True)
class Followed:
    """A replay that met nothing but the recorded calls.

    Attributes:
        hosts: Host values of this run by name.
        changed: Numbers that differ and are no host values yet: number of the call, and path.
        said: What has changed, for the log.
        values: Values of ``changed``.
    """

    hosts: Mapping[str, Any]
    changed: tuple[tuple[int, Path], ...] = ()
    said: str = ""
    values: tuple[Any, ...] = ()


class Replay(TorchFunctionMode):
    """Follows one run of the glue; see the module.

    Args:
        glue: What was recorded.
        integers: Places where whole numbers may become host values too.
    """

    def __init__(
        self, glue: Glue, integers: frozenset[tuple[int, Path]] = frozenset()
    ) -> None:
        super().__init__()
        self.glue = glue
        self.integers = integers
        self.position = 0
        self.hosts: dict[str, Any] = {}
        self.changed: dict[tuple[int, Path], Any] = {}
        self.said = ""
        self.comparing = False
        self.failure: Differs | None = None
        self._thread = threading.get_ident()
        self._depth = Region.current().autocast_depth - glue.ambient.autocast_depth
        self._describe = Description({})

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> Followed:
        """Run the glue of ``model(**batch)``; ``batch`` may hold tensors of the recorded shapes.

        Raises:
            Differs: It does something else than recorded.
        """
        given = {**batch, **self.glue.inputs}
        hooks = self._module_call, self._function_apply, self._vmapped_call
        try:
            with patched_calls(*hooks), self:
                output = model(**given)
        except Exception as error:
            raise self.failure or Differs(f"{type(error).__name__}: {error}") from error
        if self.failure is not None:
            raise self.failure
        if self.position < len(self.glue.calls):
            self._differs("ends earlier than when it was captured")
        if {name: id(tensor) for name, tensor in named_tensors(output)} != self.glue.results:
            self._differs("returns other results than when it was captured")
        return Followed(self.hosts, tuple(self.changed), self.said, tuple(self.changed.values()))

    # ---- entry points -------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.comparing:
            return func(*args, **(kwargs or {}))
        if func is Tensor.__iter__:
            return iter(self.__torch_function__(torch.unbind, types, args, kwargs))
        return self._follow(func, (args, kwargs or {}))

    def _module_call(
        self, original: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread or not self.glue.leaves.is_leaf(module):
            return original(module, *args, **kwargs)
        return self._follow(module, (args, kwargs))

    def _function_apply(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return original(*args, **kwargs)
        return self._follow(original, (args, kwargs))

    def _vmapped_call(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return original(*args, **kwargs)
        return self._follow("vmap", (original, args, kwargs))

    # ---- comparing ----------------------------------------------------------------------

    def _follow(self, target: Any, arguments: tuple[Any, ...]) -> Any:
        if self.failure is not None:
            raise self.failure
        self.comparing = True
        try:
            return self._next(target, arguments)
        finally:
            self.comparing = False

    def _next(self, target: Any, arguments: tuple[Any, ...]) -> Any:
        number, calls = self.position, self.glue.calls
        if number == len(calls):
            self._differs(f"goes on with {_shown(target)}")
        call = calls[number]
        self.position += 1
        if call.target is not target and call.target != target:
            self._differs(f"calls {_shown(target)} instead of {call.name}")
        self._compare_modes(call)
        objects = {}
        if call.after:
            arguments, objects = apart(arguments, call.after)
            given = self._describe(arguments), self._describe.objects(objects)
        else:
            given = self._describe(arguments)
        if given != call.arguments or call.lifted:
            self._compare(number, call, given)
        for place, contents in call.after.items():
            become(objects[place], contents)
        if call.collected:
            for key, tensors in call.collected.items():
                collected_outputs()[key].extend(tensors)
        result = call.result
        return result if isinstance(result, Tensor) else substituted(result, _same)

    def _compare_modes(self, call: Call) -> None:
        region, ambient = Region.current(), call.region
        if region != ambient and (
            (region.grad, region.autocast, region.autocast_dtype)
            != (ambient.grad, ambient.autocast, ambient.autocast_dtype)
            or region.autocast_depth - ambient.autocast_depth != self._depth
        ):
            self._differs(f"calls {call.name} with other modes of torch (gradients, autocast)")
        for part, mode in zip(call.parts, call.modes, strict=True):
            if part.training is not mode:
                self._differs(
                    f"calls {call.name} while a {type(part).__name__} in it is in "
                    f"{'evaluation' if mode else 'training'} mode"
                )

    def _compare(self, number: int, call: Call, given: Described) -> None:
        if call.after:
            if given != call.arguments:
                self._differs(f"calls {call.name} with other contents of an object")
            return
        for path, old, new in differences(call.arguments, given):
            if path in call.lifted and _is_number(new, of=old):
                continue
            text = f"calls {call.name} with {_value(new)} instead of {_value(old)}"
            if not self._may_be_host(number, call, path, old, new):
                self._differs(text, (number, path))
            self.changed[number, path] = new[1]
            self.said = self.said or f"{call.where} {text}"
        for path, name in call.lifted.items():
            self.hosts[name] = value_at(given, path)

    def _may_be_host(
        self, number: int, call: Call, path: Path, old: Described, new: Described
    ) -> bool:
        if call.node is None or not _is_number(new, of=old):
            return False
        name = getattr(call.target, "__name__", "")
        if name in COMPARISONS or name in _SIZED or _reaches_guard(call.node):
            return False
        whole = new[0] is not float and name not in _ARITHMETIC
        return not whole or (number, path) in self.integers

    def _differs(self, text: str, place: tuple[int, Path] | None = None) -> None:
        calls = self.glue.calls
        where = calls[min(self.position, len(calls)) - 1].where if calls else "the model"
        self.failure = Differs(f"{where} {text}", place)
        raise self.failure


def differences(
    old: Described, new: Described, path: Path = ()
) -> Iterator[tuple[Path, Described, Described]]:
    """Yield the innermost members that differ, with their path."""
    if old == new:
        return
    inside = (
        isinstance(old, tuple)
        and isinstance(new, tuple)
        and len(old) == len(new) == 3
        and old[:2] == new[:2]
        and old[0] in _CONTAINERS
        and len(old[2]) == len(new[2])
    )
    if not inside:
        yield path, old, new
        return
    for index, (one, other) in enumerate(zip(old[2], new[2], strict=True)):
        yield from differences(one, other, (*path, index))


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
    memo = {id(t): t for t in members(recorded)[0]}
    fresh = copy.deepcopy(recorded, memo)
    if isinstance(live, dict | set):
        live.clear()
        live.update(fresh)
    elif isinstance(live, list | deque):
        live.clear()
        live.extend(fresh)
    if hasattr(live, "__dict__"):
        vars(live).clear()
        vars(live).update(vars(fresh))
    for kind in type(live).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(fresh, name):
                setattr(live, name, getattr(fresh, name))


def apart(arguments: tuple[Any, ...], places: Mapping[Any, Any]) -> tuple[Any, dict[Any, Any]]:
    """Return a leaf's arguments without the objects at ``places``, and the objects."""
    args, kwargs = arguments
    objects = {p: args[p] if isinstance(p, int) else kwargs[p] for p in places}
    rest = tuple(None if n in places else value for n, value in enumerate(args))
    return (rest, {n: None if n in places else value for n, value in kwargs.items()}), objects


def value_at(described: Described, path: Path) -> Any:
    """Return the plain value at ``path`` of described arguments."""
    for index in path:
        described = described[2][index]
    return described[1]


def _is_number(new: Described, *, of: Described) -> bool:
    return (
        isinstance(new, tuple)
        and isinstance(of, tuple)
        and new[0] is of[0]
        and new[0] in (int, float, complex)
    )


def _reaches_guard(node: fx.Node) -> bool:
    """Whether a value that Python read depends on ``node``."""
    pending, seen = [node], {node}
    while pending:
        one = pending.pop()
        if one.meta.get("guard"):
            return True
        fresh = [user for user in one.users if user not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _shown(target: Any) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else name_of(target)


def _value(described: Described) -> str:
    if not isinstance(described, tuple):
        return "another tensor or object"
    return repr(described[1])[:60] if described[0] in _ATOMS else f"another {described[0].__name__}"


def _same(tensor: Tensor) -> Tensor:
    return tensor
