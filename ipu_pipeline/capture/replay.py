"""The glue runs again before every microbatch, without computing anything.

What Python decides between the blocks may change from batch to batch: an attribute, a config, a
closure, a global, a random number, the time, the mode of a part. So the model's own code runs
before every microbatch, once, as in plain torch; its calls of torch functions and leaves give
stand-ins, and every call is compared with the recorded one. What differs is either a number, which
from then on is a *host value*, an input of the graph; or it is another capture.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.calls import COMPARISONS, SHAPE_READS, Region, name_of
from ipu_pipeline.capture.glue import (
    ATOMS,
    Call,
    Described,
    Description,
    Glue,
    Path,
    apart,
    become,
    member_at,
    substituted,
)
from ipu_pipeline.capture.patches import patched_calls, patched_methods
from ipu_pipeline.capture.values import named_tensors, reads_behind
from ipu_pipeline.errors import GuardError

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


_SET_GRAD = torch._C._set_grad_enabled
# What a stand-in knows itself.
DESCRIPTIONS = SHAPE_READS | frozenset(
    {Tensor.dim, Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex,
     *(getattr(Tensor, name).__get__ for name in ("dtype", "ndim"))}
)  # fmt: skip


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
        changed: Values that differ and are no host values yet, by number of the call, and path.
        said: What has changed, for the log.
    """

    hosts: Mapping[str, Any]
    changed: Mapping[tuple[int, Path], Any] = field(default_factory=dict)
    said: str = ""

    def named(self, glue: Glue) -> dict[str, Any]:
        """Return the values of ``changed`` by the names that they have got in ``glue``."""
        return {
            glue.calls[number].lifted[path]: value for (number, path), value in self.changed.items()
        }


class Replay(TorchFunctionMode):
    """Follows one run of the glue; see the module.

    Args:
        glue: What was recorded.
        read: Returns the value of a call that gives Python one of a tensor.
        integers: Places where whole numbers may become host values too.

    Attributes:
        hosts: Host values up to where it is, by name.
        changed: Numbers that differ and are no host values yet.
    """

    def __init__(
        self,
        glue: Glue,
        read: Callable[[Call], Any],
        integers: frozenset[tuple[int, Path]] = frozenset(),
    ) -> None:
        super().__init__()
        self.glue = glue
        self.integers = integers
        self.position = 0
        self.hosts: dict[str, Any] = {}
        self._read = read
        self._times: dict[tuple[Any, Described], int] = {}
        self.changed: dict[tuple[int, Path], Any] = {}
        self.said = ""
        self.comparing = False
        self.failure: Differs | None = None
        self._thread = 0
        self._depth = 0
        self._describe = Description({})

    @contextlib.contextmanager
    def patches(self, model: nn.Module) -> Iterator[None]:
        """Within it, the calls of ``model``'s code in the thread of :meth:`run` are followed."""
        hooks = self._module_call, self._function_apply, self._vmapped_call
        with patched_calls(model, *hooks), patched_methods(model, self._function_apply):
            yield

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> Followed:
        """Run the glue of ``model(**batch)``; ``batch`` may hold tensors of the recorded shapes.

        Raises:
            Differs: It does something else than recorded.
        """
        self._thread = threading.get_ident()
        self._depth = Region.current().autocast_depth - self.glue.ambient.autocast_depth
        given = {**batch, **self.glue.inputs}
        try:
            with self:
                output = model(**given)
        except Exception as error:
            raise self.failure or Differs(f"{type(error).__name__}: {error}") from error
        if self.failure is not None:
            raise self.failure
        if self.position < len(self.glue.calls):
            self._differs("ends earlier than when it was captured")
        with torch._C.DisableTorchFunctionSubclass():  # what a stand-in is, without its refusals
            results = {name: self._describe(tensor) for name, tensor in named_tensors(output)}
        if results != self.glue.results:
            self._differs("returns other results than when it was captured")
        return Followed(self.hosts, self.changed, self.said)

    # ---- entry points -------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.comparing or func is _SET_GRAD:  # also while an error leaves a region
            return func(*args, **(kwargs or {}))
        if func is Tensor.__iter__:
            return iter(self.__torch_function__(torch.unbind, types, args, kwargs))
        if func is Tensor.__deepcopy__:
            return self.__torch_function__(torch.clone, types, args[:1])
        return self._follow(func, (args, kwargs or {}))

    def _module_call(
        self, original: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._is_apart() or not self.glue.leaves.is_leaf(module):
            return original(module, *args, **kwargs)
        return self._follow(module, (args, kwargs))

    def _function_apply(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_apart():
            return original(*args, **kwargs)
        return self._follow(original, (args, kwargs))

    def _vmapped_call(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_apart():
            return original(*args, **kwargs)
        return self._follow("vmap", (original, args, kwargs))

    def _is_apart(self) -> bool:
        return self.comparing or threading.get_ident() != self._thread

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
        if isinstance(target, nn.Module):
            return self._called(target, arguments)
        given = self._describe(arguments)
        if target in SHAPE_READS and self._is_read_next(target, given):
            return self._called(target, arguments)
        read = self.glue.reads.get((target, given))
        if read is not None:
            times = self._times[target, given] = self._times.get((target, given), -1) + 1
            return substituted(read[min(times, len(read) - 1)], _same)
        if target in DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return target(*arguments[0], **arguments[1])
        return self._called(target, arguments)

    def _is_read_next(self, target: Any, given: Described) -> bool:
        """Whether a shape depends on values, so that its read is a call of its own."""
        call = next(iter(self.glue.calls[self.position : self.position + 1]), None)
        return call is not None and (call.target, call.arguments) == (target, given)

    def _called(self, target: Any, arguments: tuple[Any, ...]) -> Any:
        """Compare a call that does something with the one recorded next."""
        number, calls = self.position, self.glue.calls
        if number == len(calls):
            self._differs(f"goes on with {_shown(target)}")
        call = calls[number]
        self.position += 1
        if call.target is not target and call.target != target:
            self._differs(f"calls {_shown(target)} instead of {call.name}")
        self._compare_modes(call)
        objects: dict[Any, Any] = {}
        if call.after:
            arguments, objects = apart(arguments, call.after)
            given = self._describe(arguments), self._describe.objects(objects)
        else:
            given = self._describe(arguments)
        if given != call.arguments or call.lifted:
            self._compare(number, call, given, arguments)
        call = self._settled(number, call, given)
        for place, contents in call.after.items():
            become(objects[place], contents)
        if call.repeated is not None:
            try:
                call.repeated.apply()
            except GuardError as error:
                self._differs(str(error))
        if call.reads_values:
            return self._read(call)
        result = call.result
        return result if isinstance(result, Tensor) else substituted(result, _same)

    def _compare_modes(self, call: Call) -> None:
        region, ambient = Region.current(), call.region
        if region != ambient and (
            (region.grad, region.autocast) != (ambient.grad, ambient.autocast)
            or region.autocast_depth - ambient.autocast_depth != self._depth
        ):
            self._differs(f"calls {call.name} with other modes of torch (gradients, autocast)")
        for part, mode in zip(call.parts, call.modes, strict=True):
            if part.training is not mode:
                self._differs(
                    f"calls {call.name} while a {type(part).__name__} in it is in "
                    f"{'evaluation' if mode else 'training'} mode"
                )

    def _compare(
        self, number: int, call: Call, given: Described, arguments: tuple[Any, ...]
    ) -> None:
        if call.after:
            if given != call.arguments:
                self._differs(f"calls {call.name} with other contents of an object")
            return
        for path, old, new in differences(call.arguments, given):
            value = member_at(arguments, path)
            if self._is_host(call, path, old, new) or (
                path in call.lifted and self._is_tensor_like(old, value)
            ):
                continue
            text = f"calls {call.name} with {_value(new)} instead of {_value(old)}"
            other = isinstance(new, int) and not self._is_tensor_like(old, value)
            if other or not self._may_be_host(number, call, path, old, new):
                self._differs(text, (number, path))
            self.changed[number, path] = _plain(value)
            self.said = self.said or f"{call.where} {text}"
        for path, name in call.lifted.items():
            self.hosts[name] = _plain(member_at(arguments, path))

    def _is_tensor_like(self, old: Described, value: Any) -> bool:
        """Whether a tensor that outlives a run can stand for the recorded one."""
        if not isinstance(old, int) or not self.glue.session.live:
            return False
        recorded = self.glue.constants.get(old)
        return (
            recorded is not None
            and type(value) is Tensor
            and not value.requires_grad
            and (value.shape, value.dtype) == (recorded.shape, recorded.dtype)
        )

    def _is_host(self, call: Call, path: Path, old: Described, new: Described) -> bool:
        """Whether any number may be there."""
        return path in call.lifted and path not in call.sized and is_alike(new, of=old)

    def _may_be_host(
        self, number: int, call: Call, path: Path, old: Described, new: Described
    ) -> bool:
        if call.node is None or not (is_alike(new, of=old) or isinstance(new, int)):
            return False
        name = getattr(call.target, "__name__", "")
        if name in COMPARISONS or name in _SIZED:
            return False
        if not self.glue.session.live and reads_behind(call.node):
            return False
        number_kind = new[0] if isinstance(new, tuple) else None
        whole = number_kind in (int, complex) and name not in _ARITHMETIC
        return not whole or (number, path) in self.integers

    def _settled(self, number: int, call: Call, given: Described) -> Call:  # noqa: ARG002
        """Return what a compared call does in this run."""
        return call

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


def is_number(new: Described, *, of: Described) -> bool:
    """Whether ``new`` describes a number of the same type as ``of``; truth values are none."""
    return (
        isinstance(new, tuple)
        and isinstance(of, tuple)
        and new[0] is of[0]
        and new[0] in (int, float, complex)
    )


def is_alike(new: Described, *, of: Described) -> bool:
    """Whether two described values that differ may be two values of one input of the graph."""
    arrays = isinstance(new, tuple) and isinstance(of, tuple) and new[0] is of[0] is np.ndarray
    return bool(new[1][:2] == of[1][:2]) if arrays else is_number(new, of=of)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return value.copy() if isinstance(value, np.ndarray) else value


def _shown(target: Any) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else name_of(target)


def _value(described: Described) -> str:
    if not isinstance(described, tuple):
        return "another tensor or object"
    return repr(described[1])[:60] if described[0] in ATOMS else f"another {described[0].__name__}"


def _same(tensor: Tensor) -> Tensor:
    return tensor
