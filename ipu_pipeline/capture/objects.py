"""Objects that a model hands from one block to the next, and that blocks read and change.

A cache of keys and values, a dict that layers share: a stage cannot be given such an object, but
it can be given the tensors inside. A call of a block with an object becomes a call with those of
its tensors that the block uses; the object is built anew around them, and the tensors that the
block put into it become results. What is not a tensor in it is a constant of the capture, and is
compared after every call.
"""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ipu_pipeline.capture.values import PLAIN
from ipu_pipeline.errors import GuardError

Place = int | str  # position or keyword of an argument
_NO_OBJECTS = (
    Tensor, *PLAIN, np.generic, np.ndarray, torch.Size, slice, tuple, set, frozenset, nn.Module,
    type, torch.Generator, np.random.Generator, np.random.RandomState,
)  # fmt: skip
_ATOMS = (Tensor, *PLAIN, np.generic, torch.Size, type, types.FunctionType)
_PLAIN_CONTAINERS = (dict, list)


@dataclass(frozen=True)
class Snapshot:
    """Objects at one moment.

    Attributes:
        objects: Copies of them by place; in place of every tensor there is a slot.
        slots: What stands for the tensors, in order.
        tensors: The tensors.
        plain: All else that is in them, by path.
    """

    objects: Mapping[Place, Any]
    slots: tuple[_Unused, ...]
    tensors: tuple[Tensor, ...]
    plain: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, objects: Mapping[Place, Any]) -> Snapshot:
        """Take one.

        Raises:
            TypeError: Something in them cannot be copied.
        """
        tensors, plain = members(objects)
        slots = tuple(_Unused() for _ in tensors)
        memo: dict[int, Any] = {id(t): slot for t, slot in zip(tensors, slots, strict=True)}
        return cls(copy.deepcopy(dict(objects), memo), slots, tensors, plain)

    def filled(self, used: Sequence[int], given: Sequence[Tensor]) -> dict[Place, Any]:
        """Build the objects around other tensors; those that are not given must not be used."""
        memo: dict[int, Any] = {id(slot): slot for slot in self.slots}
        memo.update({id(self.slots[n]): t for n, t in zip(used, given, strict=True)})
        return copy.deepcopy(dict(self.objects), memo)


class ObjectCall(nn.Module):
    """Calls a module with objects that are built around the tensors given to it.

    Args:
        module: What to call.
        before: The objects that it was given at capture.
        used: Which of their tensors it used.
        after: What else was in the objects afterwards.
        fresh: Which of their tensors afterwards are results of the call.
    """

    def __init__(
        self,
        module: nn.Module,
        before: Snapshot,
        used: Iterable[int],
        after: Snapshot,
        fresh: Iterable[int],
    ) -> None:
        super().__init__()
        self.module = module
        self.before = replace(before, tensors=())  # their memory is not held
        self.used = tuple(used)
        self.after = after.plain
        self.fresh = tuple(fresh)

    def forward(
        self, given: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Call the module; return its result and the tensors that it put into the objects.

        Raises:
            GuardError: It left something else in the objects than at capture.
        """
        objects = self.before.filled(self.used, given)
        positional = [objects.get(n, value) for n, value in enumerate(args)]
        result = self.module(*positional, **{k: objects.get(k, v) for k, v in kwargs.items()})
        tensors, plain = members(objects)
        if plain != self.after:
            changed = [one for one, other in zip(plain, self.after, strict=False) if one != other]
            raise GuardError(
                f"{type(self.module).__name__} left something else than a tensor in an object that "
                f"blocks share, and not what it left there when the model was captured: "
                f"{(changed or [(len(plain), 'members')])[0]}; capture it again with this batch"
            )
        return result, tuple(tensors[n] for n in self.fresh)

    def extra_repr(self) -> str:
        """Return what tells this call from others."""
        return f"{self.used}, {self.fresh}, {self.before.plain}, {self.after}"


def members(value: Any) -> tuple[tuple[Tensor, ...], tuple[tuple[Any, ...], ...]]:
    """Return the distinct tensors in ``value``, and the path of every member with what it is."""
    tensors: dict[int, tuple[int, Tensor]] = {}
    plain: list[tuple[Any, ...]] = []
    for path, item in _walk(value, (), set()):
        if isinstance(item, Tensor):
            number, _ = tensors.setdefault(id(item), (len(tensors), item))
            plain.append((*path, f"tensor {number}"))
        else:
            plain.append((*path, item))
    return tuple(tensor for _, tensor in tensors.values()), tuple(plain)


def objects_among(
    args: Sequence[Any], kwargs: Mapping[str, Any], owned: frozenset[int]
) -> dict[Place, Any]:
    """Return the arguments that are objects or containers which a call may change.

    Not those with ids in ``owned``, which live longer than one run of the model: they are
    constants or state of the model itself, which a stage cannot keep.
    """
    places: dict[Place, Any] = dict([*enumerate(args), *kwargs.items()])
    return {
        place: value
        for place, value in places.items()
        if not isinstance(value, _NO_OBJECTS) and not callable(value) and id(value) not in owned
    }


def needs_objects(objects: Mapping[Place, Any], before: Snapshot, after: Snapshot) -> bool:
    """Whether a call is more than one of plain values: dicts and lists that it left alone are."""
    if any(type(value) not in _PLAIN_CONTAINERS for value in objects.values()):
        return True
    same = len(before.tensors) == len(after.tensors) and before.plain == after.plain
    return not (same and all(a is b for a, b in zip(before.tensors, after.tensors, strict=True)))


class _Unused(Tensor):
    """Stands for a tensor in a copy of an object; where none is given for it, it refuses use."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise GuardError(
            f"a block uses ({getattr(func, '__name__', func)}) a tensor of an object that blocks "
            "share, which it did not use when the model was captured; capture it again with this "
            "batch"
        )


def _walk(value: Any, path: tuple[Any, ...], seen: set[int]) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, nn.Module):
        raise TypeError("a module inside an object")
    if isinstance(value, _ATOMS):
        yield path, value
        return
    yield path, type(value).__name__
    if id(value) in seen:
        return
    seen.add(id(value))
    for name, item in _parts(value):
        yield from _walk(item, (*path, name), seen)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple | collections.deque):
        yield from enumerate(value)
    elif isinstance(value, set | frozenset):
        yield "", tuple(sorted(value, key=repr))
    elif isinstance(value, np.ndarray):
        yield "", (value.shape, value.tobytes())
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(value, name):
                yield name, getattr(value, name)
