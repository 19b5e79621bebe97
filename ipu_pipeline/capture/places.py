"""Places in which a block can leave something otherwise than as its result.

A forward hook appends an activation to a list, a layer keeps its auxiliary loss as an attribute,
transformers' recorders gather router logits and attentions in a context variable. A place is
found by its path from a module: attributes of it and of its parts, what their hooks hold
(closures, defaults, bound objects, globals that they name), and the recorders of the thread.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.capture.values import tensors_in
from ipu_pipeline.errors import GuardError

Path = tuple[tuple[str, Any], ...]
_MAX_DEPTH = 5
_MAX_ITEMS = 4096  # of a list or mapping; longer ones are data
# Set by transformers' recorders, which stay in a model once they are installed.
INSTALLED = "_output_capturing_hooks_installed"
_OF_EVERY_MODULE = frozenset({*vars(nn.Module()), INSTALLED})
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
LISTS = (list, deque)
_FLAGS = (bool, str, types.NoneType)
_PLAIN = (Tensor, int, float, types.NoneType)
_FOREIGN = frozenset(
    {"torch", "numpy", "transformers", "accelerate", "ipu_pipeline", *sys.stdlib_module_names}
)
_MODEL_PACKAGES: set[str] = set()
# Functions and objects within others that are looked into for what a module keeps.
_BOUND_DEPTH = 3
RECORDERS: Path = (("recorders", None),)


@dataclass(frozen=True)
class PlaceChange:
    """What a call did to one entry of a place.

    Attributes:
        path: Where the place is, from the leaf.
        key: The entry; of a list its number, counted from what was there before the call.
        value: What is there now.
        sink: Identity of the entry: two leaves may reach it on different paths.
        was: Id of what was there before.
    """

    path: Path
    key: Any
    value: Any
    sink: Any
    was: int = 0

    @property
    def is_recorded(self) -> bool:
        """Whether transformers' recorders did it, which other threads do not see."""
        return self.path[:1] == RECORDERS


class Places:
    """The places that can be reached from ``leaf``, with what is in them now.

    Args:
        leaf: Where paths begin.
        with_values: Keep the values of tensors in them, too, for :meth:`restore`.
    """

    def __init__(self, leaf: nn.Module, *, with_values: bool = False) -> None:
        self._found: dict[int, tuple[Path, Any, Any]] = {}
        self._inside = {id(module) for module in leaf.modules()}
        recorders = _recorders()
        self._add(RECORDERS, recorders, 0)
        for n, hook in enumerate(_hooks_of_all()):
            self._add((("hook of all modules", n),), hook, 0)
        self._add((), leaf, 0)
        self._values = self._copies(leaf) if with_values else []
        lists = (recorders or {}).items()
        self.recorded = {key: len(value) for key, value in lists if isinstance(value, list)}

    def changes(self) -> list[PlaceChange]:
        """Return the entries that are new or others, of places that got a tensor."""
        found: dict[Any, PlaceChange] = {}
        for path, place, before in self._found.values():
            own = list(changed(path, place, before))
            tensors = any(True for change in own for _ in tensors_in(change.value))
            if tensors or path[:1] == RECORDERS:
                found.update({(change.sink, change.key): change for change in own})
        return list(found.values())

    def __iter__(self) -> Iterator[tuple[Path, Any, Any]]:
        """Yield path, place, and what was in it."""
        return iter(self._found.values())

    def holding(self, tensor: Tensor) -> list[tuple[Path, Any, Any]]:
        """Return path, entry and sink of all entries that were this tensor."""
        return [
            (path, key, id(place) if isinstance(place, LISTS) else _sink(place, key))
            for path, place, key, value in self._entries()
            if value is tensor
        ]

    def new_numbers(self) -> list[PlaceChange]:
        """Return the entries that are new or other numbers."""
        return [
            change
            for path, place, before in self._found.values()
            for change in changed(path, place, before)
            if type(change.value) in (int, float)
        ]

    def switched(self) -> list[tuple[Path, Any]]:
        """Return path and entry of every flag and text that the glue has changed since."""
        return [
            (path, key)
            for path, place, before in self._found.values()
            for key, value in (before.items() if isinstance(before, dict) else ())
            if isinstance(value, _FLAGS)
            for now in [(entries_of(place) or {}).get(key, before)]
            if isinstance(now, _FLAGS) and now != value
        ]

    def put(self, change: PlaceChange, value: Any) -> None:
        """Put another value where ``change`` put one."""
        place, before = next(
            (place, before) for path, place, before in self._found.values() if path == change.path
        )
        key = change.key + len(before) if isinstance(before, list) else change.key
        set_entry(place, key, value)

    def restore(self) -> None:
        """Put back what was in every place."""
        with torch.no_grad():
            for tensor, version, value in self._values:
                if tensor._version != version:
                    tensor.copy_(value)
        for _, place, before in self._found.values():
            if isinstance(place, LISTS):
                refill(place, before)
                continue
            now = entries_of(place) or {}
            for key in [key for key, value in now.items() if before.get(key, now) is not value]:
                put_back(place, key, before)
            for key in before.keys() - now.keys():
                set_entry(place, key, before[key])

    def _entries(self) -> Iterator[tuple[Path, Any, Any, Any]]:
        for path, place, before in self._found.values():
            for key, value in before.items() if isinstance(before, dict) else enumerate(before):
                yield path, place, key, value

    def _copies(self, leaf: nn.Module) -> list[tuple[Tensor, int, Tensor]]:
        own = {id(tensor) for tensor in (*leaf.parameters(), *leaf.buffers())}
        found = {
            id(value): value
            for *_, value in self._entries()
            if type(value) is Tensor and id(value) not in own  # no stand-in of a replay
        }
        return [(t, t._version, t.detach().clone()) for t in found.values()]

    def _add(self, path: Path, place: Any, depth: int) -> None:
        if place is None or id(place) in self._found or depth > _MAX_DEPTH:
            return
        entries = entries_of(place)
        if entries is None:
            return
        self._found[id(place)] = path, place, entries
        for step, child in _children(place, entries, self._inside):
            self._add((*path, step), child, depth if step[0] == "module" else depth + 1)


@contextlib.contextmanager
def restored_places(module: nn.Module) -> Iterator[None]:
    """Let everything that ``module`` can reach hold afterwards what it holds now."""
    places = Places(module, with_values=True)
    try:
        yield
    finally:
        places.restore()


def entries_of(place: Any) -> Any:
    """Return a copy of what is in ``place``; ``None`` if it is none."""
    if isinstance(place, (*LISTS, dict)):
        if len(place) > _MAX_ITEMS:
            return None
        return dict(place) if isinstance(place, dict) else list(place)
    if isinstance(place, nn.Module):
        return {n: v for n, v in vars(place).items() if n not in _OF_EVERY_MODULE}
    if isinstance(place, types.FunctionType):
        return {} if is_foreign(place) else {**_cells(place), **_globals(place)}
    if isinstance(place, types.MethodType | functools.partial | tuple):
        return {}
    if isinstance(place, type | types.ModuleType | Tensor) or hasattr(type(place), "to_dict"):
        return None
    if isinstance(place, types.SimpleNamespace) or not is_foreign(type(place)):
        return dict(getattr(place, "__dict__", {}))
    return None


def is_foreign(defined: Any) -> bool:
    """Whether a class, function or module is of a library, none that parts of models are from.

    What a library keeps for itself (locks, queues of a test runner, connections) is no state of a
    model, and is not put back after a trial run of it.
    """
    of_module = isinstance(defined, types.ModuleType)
    name = defined.__name__ if of_module else getattr(defined, "__module__", None)
    package = (name or "").partition(".")[0]
    return package in _FOREIGN or (package not in _MODEL_PACKAGES and _is_installed(package))


def note_packages(modules: Iterable[nn.Module]) -> None:
    """Note the packages that the classes of modules are from: no foreign ones."""
    _MODEL_PACKAGES.update({type(module).__module__.partition(".")[0] for module in modules})


@functools.cache
def _is_installed(package: str) -> bool:
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
    folders = {part for place in places for part in PurePath(place).parts}
    return not {"site-packages", "dist-packages"}.isdisjoint(folders)


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors that ``module`` keeps in attributes, as :func:`own_values` finds them."""
    tensors = [value for value in own_values(module) if isinstance(value, Tensor)]
    return [tensor for tensor in tensors if not getattr(type(tensor), "has_no_values", False)]


def own_values(module: nn.Module) -> list[Any]:
    """Return what ``module`` keeps in attributes, also in lists, maps, functions and objects."""
    values: list[Any] = list(vars(module).values())
    return [*values, *(held for value in values for held in _held(value, _BOUND_DEPTH))]


def _held(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (*LISTS, tuple)):
        yield from value
    elif depth:
        for inner in _bound(value):
            yield inner
            yield from _held(inner, depth - 1)


def _bound(value: Any) -> Iterable[Any]:
    """Return what a partial function, a closure, a bound method or an object of the user holds."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
        return [*_cells(value).values(), *defaults]
    kept = isinstance(value, type | types.ModuleType | Tensor | nn.Module)
    return () if kept or is_foreign(type(value)) else getattr(value, "__dict__", {}).values()


def _cells(function: types.FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """Return the globals that ``function`` names, without classes and what libraries hold."""
    known = function.__globals__
    named = {name: known[name] for name in function.__code__.co_names if name in known}
    kinds = (*_PLAIN, *LISTS, dict, nn.Module, types.FunctionType)
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, kinds) or (not callable(value) and not is_foreign(type(value)))
    }


def _children(place: Any, entries: Any, inside: set[int]) -> Iterator[tuple[tuple[str, Any], Any]]:
    """Yield what can be reached from ``place``, and the step that leads there."""
    attributes: tuple[str, ...] = ()
    if isinstance(place, types.MethodType):
        attributes = ("__self__", "__func__")
    elif isinstance(place, functools.partial):
        attributes = ("func", "args", "keywords")
    elif isinstance(place, types.FunctionType):
        attributes = ("__defaults__", "__kwdefaults__")
        yield from ((("variable", name), value) for name, value in entries.items())
    elif isinstance(place, (*LISTS, tuple)):
        yield from ((("item", n), item) for n, item in enumerate(place))
    else:
        step = "item" if isinstance(place, dict) else "attribute"
        yield from (((step, name), value) for name, value in entries.items())
    yield from ((("attribute", name), getattr(place, name)) for name in attributes)
    if isinstance(place, nn.Module) and id(place) in inside:
        yield from _of_module(place)


def _of_module(module: nn.Module) -> Iterator[tuple[tuple[str, Any], Any]]:
    for kind in _HOOKS:
        yield from (((kind, n), hook) for n, hook in enumerate(vars(module)[kind].values()))
    yield ("forward", None), _own_forward(module)
    for parent in type(module).__mro__:
        if not is_foreign(parent):
            shared = [n for n, v in vars(parent).items() if isinstance(v, (*LISTS, dict))]
            yield from ((("attribute", n), vars(parent)[n]) for n in shared)
    yield from ((("module", name), child) for name, child in module.named_children())


def _hooks_of_all() -> list[Any]:
    hooks = nn.modules.module
    return [*hooks._global_forward_pre_hooks.values(), *hooks._global_forward_hooks.values()]


def _own_forward(module: nn.Module) -> Any:
    # TorchScript's classes have none, and keep nothing in Python.
    scripted = isinstance(module, torch.jit.ScriptModule)
    return None if scripted else inspect.unwrap(type(module).forward)


def changed(path: Path, place: Any, before: Any) -> Iterator[PlaceChange]:
    """Yield the entries of ``place`` that are others than ``before``."""
    after = entries_of(place)
    if not isinstance(place, LISTS):
        for key, value in (after or {}).items():
            if before.get(key, after) is not value:
                yield PlaceChange(path, key, value, _sink(place, key), id(before.get(key)))
        return
    same = len(after or ()) >= len(before) and all(
        a is b for a, b in zip(before, after, strict=False)
    )
    for n, value in enumerate(after or ()):
        if n >= len(before) or not (same or before[n] is value):
            yield PlaceChange(path, n - len(before), value, id(place))


def _sink(place: Any, key: Any) -> Any:
    if isinstance(place, types.FunctionType):
        names = place.__code__.co_freevars
        if key in names:
            return id((place.__closure__ or ())[names.index(key)])
        return id(place.__globals__), key
    return id(place), key


def set_entry(place: Any, key: Any, value: Any) -> None:
    """Put ``value`` into ``place``, or into the variable that it is."""
    if isinstance(place, types.CellType):
        place.cell_contents = value
    elif isinstance(place, set):
        place.discard(key)
        place.add(value)
    elif isinstance(place, (*LISTS, dict)):
        place[key] = value
    elif isinstance(place, types.FunctionType):
        names = place.__code__.co_freevars
        if key in names:
            (place.__closure__ or ())[names.index(key)].cell_contents = value
        else:
            place.__globals__[key] = value
    else:
        vars(place)[key] = value


def put_back(place: Any, key: Any, before: Mapping[Any, Any]) -> None:
    """Let an entry be what it was ``before``, or not be there."""
    if key in before:
        set_entry(place, key, before[key])
    elif isinstance(place, types.FunctionType):
        place.__globals__.pop(key, None)
    else:
        (place if isinstance(place, dict) else vars(place)).pop(key, None)


def refill(place: Any, before: Sequence[Any]) -> None:
    """Let a list hold what it held ``before``."""
    if len(place) != len(before) or any(a is not b for a, b in zip(place, before, strict=True)):
        place.clear()
        place.extend(before)


def place_at(leaf: nn.Module, path: Path) -> Any:
    """Return the place at ``path``.

    Raises:
        GuardError: It is not there any more.
    """
    place: Any = leaf
    try:
        for kind, key in path:
            place = _STEPS[kind](place, key)
    except (KeyError, IndexError, AttributeError) as error:
        raise GuardError(
            f"{type(leaf).__name__} put a tensor in a place that is gone ({shown(path)}): do not "
            "change the model's hooks and attributes between steps, or compile it again"
        ) from error
    return place


def _hook(kind: str, module: nn.Module, number: int) -> Any:
    return list(vars(module)[kind].values())[number]


_STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "recorders": lambda *_: _recorders(),
    "hook of all modules": lambda _, n: _hooks_of_all()[n],
    "attribute": getattr,
    "item": lambda place, key: place[key],
    "module": lambda place, key: place._modules[key],
    "variable": lambda place, key: entries_of(place)[key],
    "forward": lambda place, _: _own_forward(place),
    **{kind: functools.partial(_hook, kind) for kind in _HOOKS},
}


def shown(path: Path) -> str:
    """Return how a message names a place."""
    return ".".join(str(kind if key is None else key) for kind, key in path) or "an attribute"


# ---- transformers' recorders ------------------------------------------------------------------


def _collector() -> Any:
    module = sys.modules.get("transformers.utils.output_capturing")
    return getattr(module, "_active_collector", None)


def _recorders() -> Any:
    """Return the lists in which transformers' hooks collect in this thread; or ``None``."""
    collector = _collector()
    return None if collector is None else collector.get()


@contextlib.contextmanager
def recording(recorded: Mapping[str, int]) -> Iterator[None]:
    """Let transformers' hooks collect in this thread what they collected in the capture.

    ``recorded``: how much there was by then; only the first one notes the first hidden state.
    """
    collector = _collector()
    token = collector.set({key: [None] * min(n, 1) for key, n in recorded.items()})
    try:
        yield
    finally:
        collector.reset(token)
