"""Functions of torch that a device program has in another form only.

Every rule computes what torch does, from operations whose shapes are known when the program is
built; or it refuses, and says what to write instead.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from .host_values import on_host, tensors_of
from .program_mode import ProgramMode
from .static_errors import refuse

Rule = Callable[[ProgramMode, Any, Any, Any], Any]
RULES: dict[str, Rule] = {}
READS = (
    "item tolist numpy __int__ __float__ __index__ __contains__ __array__ __complex__ is_nonzero "
    "equal allclose"
)
_DYNAMIC = "nonzero masked_select unique unique_consecutive argwhere nonzero_static"
_MOVES = "cpu cuda pin_memory"


def _rule(names: str) -> Callable[[Rule], Rule]:
    def put(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return put


# ---- reads ----------------------------------------------------------------------------------


@_rule(READS)
def _read(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    return mode.read(func, args, kwargs)


@_rule("__bool__")
def _truth(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    (asked,) = args
    question = mode.facts(asked).question if mode.is_program(asked) else None
    if question is None or mode.number(asked) is not None:
        return mode.read(func, args, kwargs)
    return question.answer(mode)


class _Pending:
    """What must follow an answer for it to be right.

    Args:
        what: Asked, for the message.
        source: The tensor that was asked about.
        followers: Functions whose call on ``source`` makes the answer right.
        left: Other calls allowed before.
    """

    def __init__(self, what: str, source: Tensor, followers: tuple[str, ...], left: int) -> None:
        self._followers = followers
        self._source = source
        self._left = left
        self.error = refuse(
            f"asks {what} in Python, and does something else than {' or '.join(followers)} if so",
            "write it with torch.where, which needs no question",
        )

    def seen(self, name: str, args: Any) -> Optional[_Pending]:
        """Return what is still pending after a call.

        Raises:
            StaticGraphError: Something else happens.
        """
        if name in self._followers and any(t is self._source for t in tensors_of(args)):
            return None
        self._left -= 1
        if self._left < 0:
            raise self.error
        return self


class _Overflow:
    """Whether values are not finite.

    A program always clamps. That changes no value but those between the clamp's bound and the
    largest number of the type (float16: 64504 to 65504).
    """

    def __init__(self, source: Tensor, *, when: bool) -> None:
        self.source = source
        self.when = when

    def inverted(self) -> _Overflow:
        return _Overflow(self.source, when=not self.when)

    def answer(self, mode: ProgramMode) -> bool:
        followers = ("clamp", "clamp_", "clip", "nan_to_num", "nan_to_num_")
        mode.pending = _Pending("whether values are finite", self.source, followers, 0)
        return self.when


class _AnyOf:
    """Whether a mask has a true element; writing where it has none changes nothing."""

    def __init__(self, source: Tensor) -> None:
        self.source = source

    def answer(self, mode: ProgramMode) -> bool:
        followers = ("__setitem__", "masked_fill", "masked_fill_", "where")
        mode.pending = _Pending("whether a mask has any true element", self.source, followers, 2)
        return True


@_rule("isinf isnan isfinite")
def _finite(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    result = mode.call(func, args, kwargs)
    if mode.is_program(args[0]):
        when = getattr(func, "__name__", "") != "isfinite"
        mode.facts(result).question = _Overflow(args[0], when=when)
    return result


@_rule("any all __or__ __and__ logical_or logical_and sum max amax")
def _joined(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    result = mode.call(func, args, kwargs)
    first = args[0] if args else None
    if not isinstance(result, Tensor) or not isinstance(first, Tensor):
        return result
    if mode.is_program(first) and mode.is_program(result):
        question = mode.facts(first).question
        if question is None and getattr(func, "__name__", "") == "any":
            question = _AnyOf(first)
        mode.facts(result).question = question
    return result


@_rule("logical_not __invert__ bitwise_not")
def _inverted(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    result = mode.call(func, args, kwargs)
    question = mode.facts(args[0]).question if mode.is_program(args[0]) else None
    if isinstance(question, _Overflow):
        mode.facts(result).question = question.inverted()
    return result


# ---- places and types -----------------------------------------------------------------------


@_rule("to")
def _to(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    given = [*args[1:], *kwargs.values()]
    dtype = next((v for v in given if isinstance(v, torch.dtype)), None)
    other = next((v for v in given if isinstance(v, Tensor)), None)
    if other is not None:
        dtype = other.dtype
    same = dtype is None or (isinstance(args[0], Tensor) and dtype == args[0].dtype)
    changes: dict[str, Any] = {} if same else {"dtype": dtype}
    if kwargs.get("copy"):
        changes["copy"] = True
    return mode.call(func, args[:1], changes) if changes else args[0]


@_rule("type_as")
def _type_as(mode: ProgramMode, _func: Any, args: Any, _kwargs: Any) -> Any:
    return mode.call(Tensor.to, args[:1], {"dtype": args[1].dtype})


@_rule(_MOVES)
def _stays(_mode: ProgramMode, _func: Any, args: Any, _kwargs: Any) -> Any:
    return args[0]


# ---- constants ------------------------------------------------------------------------------


@_rule("full")
def _full(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    names = ("size", "fill_value")
    given = {**dict(zip(names, args)), **kwargs}
    fill = given.pop("fill_value")
    size = mode.numbers(given.pop("size"))
    if not isinstance(fill, Tensor):
        return mode.call(func, (size, fill), given)
    given.setdefault("dtype", fill.dtype)
    if not mode.is_program(fill):
        return mode.call(func, (size, mode.read_number(fill)), given)
    return mode.call(torch.add, (mode.call(torch.zeros, (size,), given), fill), {})


@_rule("tensor as_tensor")
def _tensor(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    drawn = mode.drawn(args[0]) if args else None
    if drawn is not None:
        dtype = kwargs.get("dtype")
        return drawn if dtype is None else mode.call(Tensor.to, (drawn,), {"dtype": dtype})
    if args and isinstance(args[0], (list, tuple)) and any(map(mode.is_program, tensors_of(args))):
        parts = [mode.call(torch.as_tensor, (part,), {}) for part in args[0]]
        stacked = mode.call(torch.stack, (parts,), {})
        return _to(mode, Tensor.to, (stacked,), kwargs)
    return mode.call(func, args, kwargs)


# ---- repetition -----------------------------------------------------------------------------


@_rule("repeat_interleave")
def _repeat_interleave(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    if not any(map(mode.is_program, tensors_of((args, kwargs)))):
        return mode.call(func, args, kwargs)
    given = {**dict(zip(("input", "repeats", "dim"), args)), **kwargs}
    x, repeats, dim = (given.pop(name, None) for name in ("input", "repeats", "dim"))
    counted_there = isinstance(repeats, Tensor) and mode.is_program(repeats)
    if counted_there and given.get("output_size") is not None:
        return mode.call(func, args, kwargs)
    if repeats is None or counted_there:
        raise refuse(
            "repeat_interleave with counts that the device computes has no fixed shape",
            "give counts as Python numbers, or output_size",
        )
    if dim is None:
        x, dim = mode.call(Tensor.flatten, (x,), {}), 0
    dim = dim % x.dim()
    if isinstance(repeats, Tensor) and repeats.numel() > 1:
        places = mode.call(torch.arange, (x.shape[dim],), {})
        index = mode.call(torch.repeat_interleave, (places, repeats), {})
        return mode.call(torch.index_select, (x, dim, index), {})
    count = mode.read_number(repeats.reshape(())) if isinstance(repeats, Tensor) else repeats
    shape = list(x.shape)
    wide = mode.call(Tensor.unsqueeze, (x, dim + 1), {})
    wide = mode.call(Tensor.expand, (wide, *shape[: dim + 1], count, *shape[dim + 1 :]), {})
    return mode.call(
        Tensor.reshape, (wide, *shape[:dim], shape[dim] * count, *shape[dim + 1 :]), {}
    )


# ---- masks ----------------------------------------------------------------------------------


@_rule("__getitem__")
def _getitem(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    x, index = args
    parts = index if isinstance(index, tuple) else (index,)
    masks = [part for part in parts if _is_mask(part)]
    if any(mode.is_program(mask) and mode.number(mask) is None for mask in masks):
        raise refuse(
            "selects by a mask (x[mask]), whose number of true elements only the device knows",
            "use torch.where, or multiply by the mask",
        )
    if masks and any(map(mode.is_program, tensors_of((x, *parts)))):
        index = tuple(found for part in parts for found in _positions(mode, part))
    elif not masks and mode.is_program(x) and any(isinstance(part, slice) for part in parts):
        index = mode.numbers(index)
        empty = _empty_slice(mode, x, index)
        if empty is not None:
            return empty
    return mode.call(func, (x, index), kwargs)


def _empty_slice(mode: ProgramMode, x: Tensor, index: Any) -> Optional[Tensor]:
    """Return a slice without elements as a constant: the device has no such tensors."""
    if any(isinstance(value, Tensor) for value in tensors_of((index,))):
        return None
    like = on_host(torch.zeros, ((),), {"device": "cpu"})
    like = on_host(Tensor.expand, (like, x.shape), {})
    shape = on_host(Tensor.__getitem__, (like, index), {}).shape
    if 0 not in shape:
        return None
    found: Tensor = mode.call(torch.zeros, (shape,), {"dtype": x.dtype})
    return found


@_rule("split split_with_sizes")
def _split(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Make parts without elements constants: the device has no such tensors."""
    names = ("tensor", "split_size_or_sections", "dim")
    given = {**dict(zip(names, args)), **kwargs}
    x, dim = given.pop("tensor", None), given.pop("dim", 0)
    sizes = mode.numbers(next(iter(given.values())))
    if not isinstance(sizes, (list, tuple)) or 0 not in sizes or not mode.is_program(x):
        return mode.call(func, args, kwargs)
    ends = list(itertools.accumulate(sizes))
    parts = []
    for size, end in zip(sizes, ends):
        if size:
            parts.append(mode.call(torch.narrow, (x, dim, end - size, size), {}))
            continue
        shape = list(x.shape)
        shape[dim] = 0
        parts.append(mode.call(torch.zeros, (shape,), {"dtype": x.dtype}))
    return tuple(parts)


@_rule("cat concat concatenate")
def _cat(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Leave out parts without elements."""
    parts = args[0] if args else kwargs.get("tensors")
    if isinstance(parts, (list, tuple)):
        kept = [part for part in parts if part.numel()] or list(parts)
        if args:
            return mode.call(func, (kept, *args[1:]), kwargs)
        return mode.call(func, (), {**kwargs, "tensors": kept})
    return mode.call(func, args, kwargs)


@_rule("__setitem__")
def _setitem(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    x, index, value = args
    parts = index if isinstance(index, tuple) else (index,)
    masks = [part for part in parts if _is_mask(part)]
    if any(isinstance(part, Tensor) and not part.numel() for part in parts):
        return None  # it writes nothing
    if not any(map(mode.is_program, masks)):
        if masks and any(map(mode.is_program, tensors_of((x, value, *parts)))):
            index = tuple(found for part in parts for found in _positions(mode, part))
        return mode.call(func, (x, index, value), kwargs)
    full = [p for p in parts[:-1] if not (isinstance(p, slice) and p == slice(None))]
    if len(masks) != 1 or full or not _is_mask(parts[-1]):
        raise refuse(
            "writes by a mask together with other indices",
            "write x[mask] = value with the mask alone, or use torch.where",
        )
    (mask,) = masks
    skipped = len(parts) - 1
    after = x.dim() - skipped - mask.dim()
    if isinstance(value, Tensor) and value.dim() > after and value.numel() != 1:
        raise refuse(
            "writes as many values as a mask has true elements (x[mask] = values)",
            "use torch.where with values for every element",
        )
    shape = (*mask.shape, *([1] * after))
    wide = mode.call(Tensor.reshape, (mask, shape), {})
    if isinstance(value, Tensor):
        value = mode.call(Tensor.to, (value,), {"dtype": x.dtype})
        if value.dim() > after:
            value = mode.call(Tensor.reshape, (value, ()), {})
        chosen = mode.call(torch.where, (wide, value, x), {})
    else:
        chosen = mode.call(torch.masked_fill, (x, wide, value), {})
    mode.call(Tensor.copy_, (x, chosen), {})
    return None


@_rule("masked_scatter")
def _masked_scatter(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Give the n-th true element of the mask the n-th value."""
    if not any(map(mode.is_program, tensors_of((args, kwargs)))):
        return mode.call(func, args, kwargs)
    given = {**dict(zip(("input", "mask", "source"), args)), **kwargs}
    x, mask, source = given["input"], given["mask"], given["source"]
    wide = mode.call(Tensor.expand, (mask, x.shape), {})
    flat = mode.call(Tensor.reshape, (wide, (-1,)), {})
    order = mode.call(torch.cumsum, (mode.call(Tensor.long, (flat,), {}), 0), {})
    order = mode.call(torch.clamp, (mode.call(torch.sub, (order, 1), {}),), {"min": 0})
    values = mode.call(Tensor.reshape, (source, (-1,)), {})
    enough = mode.call(torch.le, (mode.call(torch.sum, (flat,), {}), values.shape[0]), {})
    if mode.number(enough) is not None and not mode.read(Tensor.item, (enough,), {}):
        raise refuse("masked_scatter has fewer values than its mask has true elements", "add some")
    order = mode.call(torch.clamp, (order,), {"max": values.shape[0] - 1})
    taken = mode.call(torch.index_select, (values, 0, order), {})
    taken = mode.call(Tensor.reshape, (taken, x.shape), {})
    return mode.call(torch.where, (wide, mode.call(Tensor.to, (taken,), {"dtype": x.dtype}), x), {})


class _Selected:
    """Elements that a mask selects, as padded rows: only a function that takes these may use it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


@_rule(_DYNAMIC)
def _dynamic(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    if not any(map(mode.is_program, tensors_of((args, kwargs)))):
        return mode.call(func, args, kwargs)
    name = getattr(func, "__name__", "")
    if name == "masked_select" and args[0].dim() == 2 and args[0].shape == args[1].shape:
        rows = _compact(mode, args[0], args[1])
        flat = mode.call(Tensor.reshape, (rows, (-1,)), {})
        mode.facts(flat).question = _Selected(rows)
        mode.unusable[id(flat)] = (flat, _without_shape(name))
        return flat
    return _fixed(mode, func, args, kwargs)


def _fixed(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Return what depends on the inputs only as a constant, checked for every batch."""
    numbers = [mode.number(t) for t in tensors_of((args, kwargs)) if mode.is_program(t)]
    if None in numbers:
        raise _without_shape(getattr(func, "__name__", ""))
    return mode.constant(mode.read(func, args, kwargs))


def _without_shape(name: str) -> Exception:
    return refuse(
        f"{name} has a shape that depends on values of the device",
        "use torch.where or a mask over all elements",
    )


def _compact(mode: ProgramMode, values: Tensor, mask: Tensor) -> Tensor:
    """Return rows whose selected elements come first, in order, then zeros."""
    chosen = mode.call(Tensor.to, (mask,), {"dtype": values.dtype})
    order = mode.call(torch.cumsum, (mode.call(Tensor.long, (mask,), {}), 1), {})
    order = mode.call(torch.clamp, (mode.call(torch.sub, (order, 1), {}),), {"min": 0})
    zeros = mode.mark(values * 0)
    return mode.call(
        torch.scatter_add, (zeros, 1, order, mode.call(torch.mul, (values, chosen), {})), {}
    )


@_rule("ctc_loss")
def _ctc_loss(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Take targets that a mask selected as padded rows."""
    given = {**dict(zip(("log_probs", "targets"), args)), **kwargs}
    question = mode.facts(given["targets"]).question
    if isinstance(question, _Selected):
        return mode.call(func, (given["log_probs"], question.values, *args[2:]), kwargs)
    return mode.call(func, args, kwargs)


@_rule("rand")
def _rand(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Draw; a single number may be compared in Python, to drop a layer."""
    result = mode.call(func, args, kwargs)
    if args and tuple(mode.numbers(args[0]) if isinstance(args[0], (list, tuple)) else args) == ():
        mode.facts(result).question = mode.draw(lambda: torch.rand([]).item())
    return result


@_rule("__lt__ __gt__ __le__ __ge__ lt gt le ge")
def _compared(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    first = args[0]
    if isinstance(args[1], float) and mode.is_program(first):
        drawn = mode.facts(first).question
        if isinstance(drawn, float):
            return getattr(operator, getattr(func, "__name__", "").strip("_"))(drawn, args[1])
    return mode.call(func, args, kwargs)


@_rule("_weight_norm")
def _weight_norm(mode: ProgramMode, _func: Any, args: Any, _kwargs: Any) -> Any:
    weight, scale, *dim = args
    norm = mode.call(torch.norm_except_dim, (weight, 2, *dim), {})
    return mode.call(torch.mul, (weight, mode.call(torch.div, (scale, norm), {})), {})


@_rule("where")
def _where(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) + len(kwargs) == 1 and any(map(mode.is_program, tensors_of((args, kwargs)))):
        return _fixed(mode, func, args, kwargs)
    return mode.call(func, args, kwargs)


@_rule("one_hot")
def _one_hot(mode: ProgramMode, func: Any, args: Any, kwargs: Any) -> Any:
    given = {**dict(zip(("tensor", "num_classes"), args)), **kwargs}
    x, count = given["tensor"], mode.numbers(given.get("num_classes", -1))
    if not mode.is_program(x):
        return mode.call(func, args, kwargs)
    if count == -1:
        count = 1 + mode.read_number(mode.call(torch.max, (x,), {}))
    classes = mode.call(torch.arange, (count,), {})
    found = mode.call(torch.eq, (mode.call(Tensor.unsqueeze, (x, -1), {}), classes), {})
    return mode.call(Tensor.to, (found,), {"dtype": torch.int64})


def _is_mask(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) and value.dim() > 0
    )


def _positions(mode: ProgramMode, part: Any) -> tuple[Any, ...]:
    """Return the positions of the true elements of a mask that the host knows."""
    if not _is_mask(part):
        return (part,)
    if mode.is_program(part):
        return tuple(_fixed(mode, torch.nonzero, (part,), {"as_tuple": True}))
    found: tuple[Any, ...] = mode.call(torch.nonzero, (part,), {"as_tuple": True})
    return found
