"""What a model keeps from one forward pass to the next: who reads it, who changes it.

Buffers, parameters that a forward pass writes to (a momentum encoder), and tensors that modules
keep as plain attributes. Which call changes what is seen while the model is traced: torch counts
the writes to a tensor, except those of normalisations to their running statistics.
"""

from __future__ import annotations

import operator
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ipu_pipeline.capture.glue import StandIn
from ipu_pipeline.capture.places import own_tensors
from ipu_pipeline.capture.values import storage_key

# They write to running statistics without counting it; the first flag says whether they do.
_STATISTICS = frozenset(
    {"batch_norm", "instance_norm", "native_batch_norm", "_batch_norm_impl_index"}
)
_DESCRIBING = ("__get__", "untyped_storage", "size", "dim", "numel")
# What every module has: hooks, parameters, children.
_COMMON = frozenset(vars(nn.Module())) - {"training"}


class StateUse:
    """Notes which of a model's tensors the calls of one run read and change.

    Attributes:
        reads: Names of those that were read since :meth:`start`.
        writes: Names of those that were changed since then.
        tensors: All of them by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.reads: set[str] = set()
        self.writes: set[str] = set()
        self._places = [
            (f"{fqn}.{name}".lstrip("."), module, name, value)
            for fqn, module in model.named_modules()
            for name, value in [*module._buffers.items(), *vars(module).items()]
            if isinstance(value, Tensor) and not getattr(type(value), "has_no_values", False)
        ]
        # In lists and maps, too.
        own = (tensor for module in model.modules() for tensor in own_tensors(module))
        self.tensors: dict[str, Tensor] = {f"_tensors.{n}": t for n, t in enumerate(own)}
        self.tensors |= {fqn: tensor for fqn, _, _, tensor in self._places}
        self.tensors |= {**dict(model.named_buffers()), **dict(model.named_parameters())}
        self._names: dict[int, str] = {}
        self._saved: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, tensor in reversed(self.tensors.items()):
            key = key_of(tensor)
            if key is not None:
                self._names.setdefault(key, name)

    def start(self) -> None:
        """Forget the last call."""
        self.reads, self.writes = set(), set()

    def named(self, tensors: Iterable[Tensor]) -> set[str]:
        """Return the names of those that are the model's, or views of one that is."""
        found = (self._names.get(key_of(tensor) or 0) for tensor in tensors)
        return {name for name in found if name is not None}

    def call(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run one torch function and note what it reads and changes."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        names = {id(t): name for t in given if (name := self._names.get(key_of(t) or 0))}
        used = [(t, names[id(t)], t._version) for t in given if id(t) in names]
        if not used:
            return func(*args, **kwargs)
        word = getattr(func, "__name__", "").split(".")[0]
        # The gradient of a tensor is none of its values.
        sets_data = word == "__set__" and getattr(func, "__self__", None) is Tensor.data
        if sets_data or _may_write(word, kwargs):
            self._save(names[id(t)] for t in tree_leaves((args[:1], kwargs.get("out")))
                       if id(t) in names)  # fmt: skip
        result = func(*args, **kwargs)
        if word in _DESCRIBING and not isinstance(result, Tensor):
            return result  # its shape, its memory, the number of writes: no value
        self.reads.update(names.values())
        self.writes.update(name for t, name, version in used if t._version != version)
        if word in _STATISTICS and _first_flag(args, kwargs):
            self.writes.update(n for t, n, _ in used if not isinstance(t, nn.Parameter))
        if sets_data and id(args[0]) in names:
            self.writes.add(names[id(args[0])])
            self._names[key_of(args[0]) or 0] = names[id(args[0])]
        return result

    def replaced(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, old and new tensor of every buffer and attribute that is another one now."""
        for fqn, module, name, was in self._places:
            now = module._buffers.get(name, vars(module).get(name))
            if isinstance(now, Tensor) and now is not was:
                yield fqn, was, now

    def put_back(self) -> None:
        """Give parameters and plain tensors that the run has changed the values from before it."""
        with torch.no_grad():
            for tensor, memory, values in self._saved.values():
                tensor.data = memory
                tensor.data.copy_(values)
        self._saved.clear()

    def _save(self, names: Iterable[str]) -> None:
        for name in set(names) - self._saved.keys():
            tensor = self.tensors[name]
            self._saved[name] = (tensor, tensor.data, tensor.detach().clone())


class PutBack(TorchFunctionMode):
    """Puts back the parameters and plain tensors of a model that runs within it have changed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._use = StateUse(model)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._use.call(func, args, kwargs or {})

    def put_back(self) -> None:
        """Put them back now."""
        self._use.put_back()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.put_back()


class WriteBack(nn.Module):
    """Writes a value into the tensor that a module would have replaced by it."""

    def forward(self, tensor: Tensor, value: Tensor) -> None:
        """Copy ``value``."""
        with torch.no_grad():
            tensor.copy_(value)


def key_of(tensor: Tensor) -> int | None:
    """Return the key of the memory; ``None`` for tensors that have none (sparse, batched)."""
    try:
        return storage_key(tensor)
    except (NotImplementedError, RuntimeError):
        return None


def _may_write(word: str, kwargs: Mapping[str, Any]) -> bool:
    if word.startswith("__"):
        return word.startswith("__i") or word == "__setitem__"
    return word.endswith("_") or kwargs.get("out") is not None


def _first_flag(args: Any, kwargs: Mapping[str, Any]) -> bool:
    given = kwargs.get("training", kwargs.get("use_input_stats"))
    return bool(next((a for a in args if isinstance(a, bool)), False) if given is None else given)


class PlainState:
    """Attributes of modules that are no modules, and which tensors their buffers are.

    Containers are remembered with what is in them; values of tensors are not. Without ``buffers``,
    those are not put back.
    """

    def __init__(self, modules: Iterable[nn.Module], *, buffers: bool = True) -> None:
        self._buffers = buffers
        self._before = [
            (module, _plain(module), dict(module._buffers), dict(module._parameters))
            for module in modules
        ]
        values = [value for _, plain, _, _ in self._before for value in plain.values()]
        containers = [value for value in values if type(value) in _CONTAINERS]
        objects = [
            v for v in values if type(v).__module__ not in _ATOMIC and hasattr(v, "__dict__")
        ]
        containers += [
            vars(v)
            for v in objects
            if not isinstance(v, Tensor | nn.Module | type | types.FunctionType)
        ]
        self._contents = [(container, container.copy()) for container in containers]

    def new_tensors(self) -> list[str]:
        """Return the attributes that hold other tensors than before."""
        grown = {id(c) for c, contents in self._contents if not _same(c, contents) and _holds(c)}
        return [
            f"{type(module).__name__}.{name}"
            for module, plain, _, _ in self._before
            for name, value in _plain(module).items()
            if id(value) in grown or (_holds(value) and plain.get(name) is not value)
        ]

    def changed(self) -> list[str]:
        """Return the attributes and buffers that are not what they were; equal numbers are."""
        grown = {id(c) for c, contents in self._contents if not _same(c, contents)}
        return [
            f"{type(module).__name__}.{name}"
            for module, plain, buffers, _ in self._before
            for then, now in ((plain, _plain(module)), (buffers, module._buffers))
            for name in dict.fromkeys((*then, *now))
            if not _equal(then.get(name, _ABSENT), now.get(name, _ABSENT))
            or {id(now.get(name)), id(getattr(now.get(name), "__dict__", None))} & grown
        ]

    def put_back(self, *, tensors: bool = True, but: Iterable[Tensor] = ()) -> None:
        """Make the attributes what they were; without ``tensors`` those of them stay.

        Those that were one of the tensors ``but`` stay, too.
        """
        kept = set(map(id, but))
        for module, plain, buffers, parameters in self._before:
            own = vars(module)
            for name in {*own, *plain} - _COMMON:
                now, before = own.get(name, _ABSENT), plain.get(name, _ABSENT)
                if now is before or (_holds(now) and not tensors) or id(before) in kept:
                    continue
                if before is _ABSENT:
                    del own[name]
                else:
                    own[name] = before
            if tensors and self._buffers:
                _put_back(module._buffers, buffers)
                _put_back(module._parameters, parameters)
        for container, contents in self._contents:
            if not _same(container, contents) and (tensors or not _holds(container)):
                container.clear()
                grow = container.update if isinstance(container, dict | set) else container.extend
                grow(contents)


_ABSENT = object()


def _put_back(now: Any, before: Any) -> None:
    if not _same(now, before):
        now.clear()
        now.update(before)


# Most attributes are of these types, which have none of their own.
_ATOMIC = frozenset({"builtins", "torch"})
_CONTAINERS = (list, dict, set, deque)
_NUMBERS = (bool, int, float, str)


def _same(container: Any, contents: Any) -> bool:
    if isinstance(container, dict):
        return _same(list(container), list(contents)) and all(
            container[key] is value for key, value in contents.items()
        )
    return len(container) == len(contents) and all(map(operator.is_, container, contents))


def _holds(value: Any) -> bool:
    """Whether ``value`` is a tensor or holds one."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set | deque):
        return any(isinstance(member, Tensor) for member in value)
    return isinstance(value, Tensor)


def kept_tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield class, name and tensor of every parameter, buffer and plain attribute."""
    for module in modules:
        for name, value in (*module._parameters.items(), *module._buffers.items(),
                            *_plain(module).items()):  # fmt: skip
            if isinstance(value, Tensor) and not value.is_inference():  # those count no writes
                yield f"{type(module).__name__}.{name}", value


def _equal(before: Any, now: Any) -> bool:
    return before is now or (type(before) is type(now) in _NUMBERS and before == now)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _COMMON}


@contextmanager
def without_stand_ins(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back tensors that modules keep where a replay of their code has left stand-ins.

    What they did not keep before says so itself when it is used.
    """
    before = [(live, dict(live)) for m in modules for live in (vars(m), m._buffers)]
    try:
        yield
    finally:
        for live, kept in before:
            for name in [name for name, value in live.items() if type(value) is StandIn]:
                if isinstance(kept.get(name), Tensor):
                    live[name] = kept[name]


@contextmanager
def values_of(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> Iterator[None]:
    """Let ``tensors`` have other memory within the block; what is written goes there."""
    newest = [(tensor, tensor.data) for tensor in tensors]
    for (tensor, _), value in zip(newest, values, strict=True):
        tensor.data = value
    try:
        yield
    finally:
        for tensor, data in newest:
            tensor.data = data
