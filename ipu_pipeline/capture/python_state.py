"""What a model keeps in Python: plain attributes, containers, configs, generators of numbers.

Captures and replays run the user's code more often than plain torch does; what it counts, appends
or draws meanwhile is put back.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import random
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import _lru_cache_wrapper, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ipu_pipeline.capture.places import is_foreign, note_packages, refill
from ipu_pipeline.errors import CaptureError

_MODULE = vars(nn.Module())
_INTERNAL = frozenset(_MODULE) - {"training", "_buffers", "_parameters", "_modules"}
_HOOKS = tuple(name for name in _MODULE if name.startswith("_forward_") and "hooks" in name)
_UNSEEN = (
    bool, int, float, str, type(None), Tensor, nn.Module, type, types.ModuleType,
    types.FunctionType, types.MethodType,
    types.BuiltinFunctionType,
)  # fmt: skip
_NUMBERS = (bool, int, float, str, type(None))
_PLAIN = (*_NUMBERS, Tensor)
_NOTED = (list, dict, set, deque, type, types.SimpleNamespace, types.FunctionType, threading.local)
# As deep as `places` look: what only one of both put back would be moved by plans without a word.
_DEPTH = 5


_State = tuple[Callable[[], Any], Callable[[Any], object]]


class Generators:
    """Python's and numpy's generators of random numbers, and those that modules keep.

    Args:
        modules: Modules whose attributes may be generators.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        kept = {id(value): value for module in modules for value in vars(module).values()}
        self._states: list[_State] = [
            (random.getstate, random.setstate),
            (np.random.get_state, np.random.set_state),
        ]
        for value in kept.values():
            self.add(value)

    def add(self, value: Any) -> bool:
        """Let ``value`` be one of them if it is a generator; say whether it is."""
        found = _state_of(value)
        self._states += [] if found is None else [found]
        return found is not None

    def states(self) -> list[Any]:
        """Return the state of each one."""
        return [get() for get, _ in self._states]

    def put_back(self, states: Iterable[Any]) -> None:
        """Give each one the state that it had."""
        for (_, put_back), state in zip(self._states, states, strict=True):
            put_back(state)

    def drawn(self, before: Iterable[Any], after: Iterable[Any]) -> set[int]:
        """Return which of them have given numbers between two times."""
        pairs = enumerate(zip(before, after, strict=True))
        return {n for n, (old, new) in pairs if _bytes_of(old) != _bytes_of(new)}


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Put back Python's and numpy's generators: some libraries draw while they are imported."""
    generators = Generators()
    states = generators.states()
    try:
        yield
    finally:
        generators.put_back(states)


def seed_torch(seed: int) -> None:
    """Seed the CPU's generator, and those of GPUs where they are used.

    For a device that is not used, ``torch.manual_seed`` would note each seed with a stack trace,
    and the last one would be that of the user's numbers.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class PythonState:
    """A copy of what modules keep in Python, to be put back by :meth:`restore`.

    Args:
        modules: The modules whose code may run.
        others: Modules whose attributes that code may assign.

    Attributes:
        thread_locals: What that code reads, and what another thread would not see.
        cached: Functions whose results functools keeps: namespace or class, name, function.
    """

    def __init__(self, modules: Iterable[nn.Module], others: Iterable[nn.Module] = ()) -> None:
        self.thread_locals: list[threading.local] = []
        self.cached: list[tuple[Any, str, Any]] = []
        self._generators = Generators()
        self._copies: list[tuple[Any, Any]] = [(vars(m), vars(m).copy()) for m in others]
        self._attributes = {id(live) for live, _ in self._copies}
        self._seen: dict[int, int] = {}  # how deep it was looked into from there, by id
        modules = list(modules)
        note_packages(modules)
        for module in modules:
            attributes = vars(module)
            kept = {k: v for k, v in attributes.items() if k not in _INTERNAL}
            kept |= {k: copy(v) for k, v in kept.items() if type(v) is itertools.count}
            self._copies.append((attributes, kept))
            self._attributes.add(id(attributes))
            self._copies.extend((attributes[n], dict(attributes[n])) for n in _HOOKS)
            for value in kept.values():
                self._note(value, _DEPTH)
            for kind in type(module).__mro__:
                self._note_class(kind)
        self._random = self._generators.states()

    def restore(self, *, tensors: bool = True) -> None:
        """Put everything back; objects stay the same objects (but for ``itertools.count``).

        Without ``tensors``, attributes of modules and what holds tensors stay as they are.
        """
        self._generators.put_back(self._random)
        for live, copied in self._copies:
            if not tensors and (id(live) in self._attributes or _holds_tensor(live, copied)):
                continue
            if isinstance(live, types.CellType):
                live.cell_contents = copied
            elif isinstance(live, list | deque):
                refill(live, copied)
            elif isinstance(live, type):
                for name, value in copied.items():
                    if vars(live).get(name, live) is not value:
                        setattr(live, name, value)
            elif isinstance(live, set):
                live.clear()
                live.update(copied)
            else:
                _restore_dict(live, copied)

    def changed(self) -> bool:
        """Whether anything that it has a copy of is not as it was; generators aside."""
        return any(_is_changed(live, copied) for live, copied in self._copies)

    def entries(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yield container, key and value of everything that it has a copy of."""
        for live, copied in self._copies:
            if isinstance(copied, dict):
                yield from ((live, key, value) for key, value in copied.items())
            elif isinstance(copied, list):
                keys = copied if isinstance(live, set) else range(len(copied))
                yield from zip(itertools.repeat(live), keys, copied, strict=False)
            else:
                yield live, None, copied

    def _note(self, value: Any, depth: int) -> None:
        if isinstance(value, types.FunctionType | types.MethodType):
            self._note_function(value)
        if isinstance(value, types.MethodType):
            value = value.__self__
        if isinstance(value, type):
            self._note_class(value)
        if isinstance(value, _UNSEEN) or self._seen.get(id(value), 0) >= depth:
            return  # a longer way led to it before: then less of what is in it was noted
        self._seen[id(value)] = depth
        if self._generators.add(value):
            return
        self.thread_locals += [value] if isinstance(value, threading.local) else []
        attributes = getattr(value, "__dict__", None)
        for container in (value, attributes):
            if isinstance(container, dict):
                self._copies.append((container, dict(container)))
            elif isinstance(container, list | deque | set):
                self._copies.append((container, list(container)))
        inner = (value.func, *value.args, value.keywords) if isinstance(value, partial) else value
        for item in (*_items_of(inner), *_items_of(attributes)):
            self._note(item, depth - 1)

    def _note_class(self, kind: type) -> None:
        """Note the attributes of a class of the user, which all of its objects share."""
        if id(kind) in self._seen or is_foreign(kind):
            return
        self._seen[id(kind)] = _DEPTH
        shared = {n: v for n, v in vars(kind).items() if not n.startswith("__") or callable(v)}
        numbers = {n: v for n, v in shared.items() if isinstance(v, _NUMBERS)}
        if numbers:
            self._copies.append((kind, _Some(numbers)))
        self._note_cached(kind, shared)
        for value in shared.values():  # of a class method, of a property
            inner = getattr(value, "__func__", getattr(value, "fget", value))
            self._note(getattr(inner, "__wrapped__", inner), _DEPTH)

    def _note_cached(self, place: Any, entries: dict[str, Any]) -> None:
        for name, value in entries.items():
            function = getattr(value, "__func__", value)  # of a static or class method
            if isinstance(function, _lru_cache_wrapper) and not is_foreign(function):
                self.cached.append((place, name, value))
                self._note(function.__wrapped__, _DEPTH)

    def _note_function(self, called: types.FunctionType | types.MethodType) -> None:
        """Note the plain variables that a function of the user reads outside itself."""
        function: Any = called.__func__ if isinstance(called, types.MethodType) else called
        if id(function) in self._seen or is_foreign(function):
            return
        self._seen[id(function)] = _DEPTH
        if vars(function):
            self._copies.append((vars(function), dict(vars(function))))
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._copies.append((cell, content))
            self._note(content, _DEPTH)
        for known in _spaces(function):
            kept = {n: known[n] for n in function.__code__.co_names if n in known}
            plain = {n: v for n, v in kept.items() if isinstance(v, _PLAIN)}
            if plain:
                self._copies.append((known, _Some(plain)))
            self._note_cached(known, kept)
            for value in kept.values():
                if type(value) in _NOTED or not is_foreign(type(value)):
                    self._note(value, _DEPTH)


class Draws:
    """Notes who draws from generators of Python while ``model`` runs: blocks, or the glue."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._generators = Generators(model.modules())
        self._states = self._generators.states()
        self._in_glue: set[int] = set()
        self._in_leaves: dict[int, str] = {}

    def note(self, leaf: str | None = None) -> bool:
        """Note what was drawn since the last time by ``leaf``, else by the glue; say if it was."""
        before, self._states = self._states, self._generators.states()
        drawn = self._generators.drawn(before, self._states)
        if leaf is None:
            self._in_glue |= drawn
        else:
            self._in_leaves.update(dict.fromkeys(drawn, leaf))
        return bool(drawn)

    def finish(self) -> None:
        """Refuse blocks and glue that draw from one generator.

        Raises:
            CaptureError: They do.
        """
        self.note()
        for number in sorted(self._in_glue & self._in_leaves.keys()):
            raise CaptureError(
                f"block {self._in_leaves[number]!r} and the code between the blocks of "
                f"{type(self._model).__name__} draw from one generator of Python or numpy; that "
                "code runs before the blocks of all microbatches, so that the numbers would come "
                "in another order than in plain torch: give one of them a generator of its own "
                "(random.Random(seed)), or draw with torch"
            )


def _state_of(value: Any) -> _State | None:
    """Return how the state of a generator of random numbers is read, and how it is set."""
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return partial(getattr, bits, "state"), partial(setattr, bits, "state")
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    return None


def _spaces(function: types.FunctionType) -> Iterator[dict[str, Any]]:
    """Yield its globals, and those of the user's modules that it names."""
    yield function.__globals__
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType) and not is_foreign(value):
            yield vars(value)


def _items_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | deque | set | tuple) else []


def _bytes_of(state: Any) -> bytes:
    if isinstance(state, Tensor):  # a pickled one names its memory; a trace would record this
        with torch._C.DisableTorchFunction():
            return state.numpy().tobytes()
    return pickle.dumps(state)


def _holds_tensor(*values: Any) -> bool:
    """Whether a cell, a container, or what it held, is or has a tensor."""
    for value in values:
        content = getattr(value, "cell_contents", value)
        items = content.values() if isinstance(content, dict) else content
        if isinstance(content, Tensor) or (
            isinstance(content, dict | list | set | deque)
            and any(isinstance(item, Tensor) for item in items)
        ):
            return True
    return False


class _Some(dict[str, Any]):
    """Some of the members of a dict: the others are left alone."""


def _is_changed(live: Any, copied: Any) -> bool:
    live = vars(live) if isinstance(live, type) else live
    if isinstance(live, types.CellType):
        return not _same(live.cell_contents, copied)
    if isinstance(live, list | deque):
        return len(live) != len(copied) or not all(map(_same, live, copied))
    if isinstance(live, set):
        return live != set(copied)
    now = live if isinstance(copied, _Some) else {n for n in live if n not in _INTERNAL}
    if not isinstance(copied, _Some) and now != {n for n in copied if n not in _INTERNAL}:
        return True
    return not all(_same(live.get(name), value) for name, value in copied.items())


def _same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, itertools.count):
        return repr(now) == repr(before)
    return isinstance(now, bool | int | float | str) and now == before


def _restore_dict(live: dict[str, Any], copied: dict[str, Any]) -> None:
    if not isinstance(copied, _Some):
        for name in [n for n in live if n not in copied and n not in _INTERNAL]:
            del live[name]
    for name, value in copied.items():
        if live.get(name, live) is not value:
            live[name] = copy(value) if type(value) is itertools.count else value
