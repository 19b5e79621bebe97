"""The mode that is active while a model runs as a program of the device.

Three kinds of tensors are told apart. *Program* tensors exist on the device only: parameters, and
what is computed from them or from the inputs. *Known* ones are program tensors that depend on the
inputs only (:mod:`host_values`). All others are *constants*: what the model makes of shapes,
config, buffers and plain attributes. Constants are computed on the host and enter the program where
they meet a program tensor, so that Python may read them.

The functions of torch that need more than that have rules in :mod:`rewrites`.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, FrozenSet, Mapping, Optional

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .host_draws import HostDraws
from .host_values import HostValues, map_leaves, node, on_host, tensors_of
from .own_gradients import StoppedGradients
from .static_errors import refuse


def _names(text: str) -> FrozenSet[str]:
    return frozenset(text.split())


FACTORIES = _names(
    "arange empty full linspace logspace ones range tensor zeros eye tril_indices triu_indices "
    "as_tensor scalar_tensor hann_window hamming_window empty_strided asarray"
)
"""Make constants."""
_SIZED = _names(
    "arange empty eye linspace logspace ones range tril_indices triu_indices zeros "
    "new_empty new_full new_ones new_zeros"
)
LIKE = _names(
    "zeros_like ones_like full_like new_zeros new_ones new_full new_tensor new_empty empty_like"
)
"""Make constants of the shape or type of another tensor."""
RANDOM_FACTORIES = frozenset(["rand", "randint", "randn", "randperm"])
_RANDOM_WORDS = (
    "rand", "dropout", "bernoulli", "multinomial", "normal", "uniform_", "exponential_", "gumbel"
)  # fmt: skip
_IN_PLACE = _names(
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __iand__ __ior__ __ixor__ "
    "__ipow__ __imod__ __ilshift__ __irshift__"
)
_SHAPES = _names(
    "__getitem__ __setitem__ view reshape expand repeat narrow split chunk unfold roll permute "
    "split_with_sizes select tile unflatten broadcast_to as_strided pad interpolate"
)
"""Take sizes and positions: 0-d constants among their arguments are numbers."""
NUMBERS = ("alpha", "beta", "fill_value", "dim", "num_classes", "diagonal", "output_size")
"""Keywords whose values are numbers."""
_SHAPES_KNOWN_THERE: Mapping[str, Callable[[Tensor], Any]] = {
    "ctc_loss": lambda _: (),
}
ACCEPTED = ("__get__", "__set__", "size", "dim", "numel", "stride", "is_floating_point")


class _Facts:
    """What is known about a tensor object that the mode has seen."""

    __slots__ = ("made", "number", "program", "question", "run", "view_of")

    def __init__(self, run: object) -> None:
        self.run = run
        self.program = False
        self.made = False
        self.number: Optional[int] = None
        self.question: Any = None
        # Of a constant that shares another one's memory: that one, and how it was made from it.
        self.view_of: Any = None


class ProgramMode(TorchFunctionMode):
    """Sees every function of torch that the model calls.

    Args:
        device: Of the parameters: where the program runs.
        buffers: The host's tensor by ``id`` of every buffer on the device.
        values: Takes what depends on the inputs only.
        rules: By name of a function of torch: ``rule(mode, func, args, kwargs)``.
        draws: Takes what the model draws on the host.
    """

    def __init__(
        self,
        device: torch.device,
        buffers: Mapping[int, tuple[Tensor, Tensor]],
        values: HostValues,
        rules: Mapping[str, Callable[..., Any]],
        draws: HostDraws,
    ) -> None:
        super().__init__()
        self.draw = draws.draw
        self.drawn = draws.drawn
        self.device = device
        self.values = values
        self.pending: Any = None
        self.stopped = StoppedGradients()
        self.unusable: dict[int, tuple[Tensor, Exception]] = {}
        self._emulated = device.type == "cpu"
        self._run = object()
        self._rules = rules
        self._buffers = dict(buffers)
        self._buffer_storages = {_storage(host) for _, host in buffers.values()} - {0}
        self._moved: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._promoted: dict[int, tuple[Tensor, Tensor]] = {}
        self._stale: set[int] = set()
        self._overwritten: set[int] = set()

    # ---- what a tensor is ---------------------------------------------------------------

    def facts(self, tensor: Tensor) -> _Facts:
        """Return what is known of a tensor; kept on the tensor itself."""
        found = tensor.__dict__.get("_facts_of_program")
        if found is None or found.run is not self._run:
            found = _Facts(self._run)
            tensor.__dict__["_facts_of_program"] = found
        return found

    def is_program(self, tensor: Tensor) -> bool:
        """Tell whether a tensor exists on the device only."""
        if id(tensor) in self._buffers:
            return False
        if isinstance(tensor, nn.Parameter):
            return True
        if not self._emulated:
            return tensor.device.type != "cpu"
        return self.facts(tensor).program

    def number(self, tensor: Tensor) -> Optional[int]:
        """Return the number of a known tensor; ``None`` of others."""
        if isinstance(tensor, nn.Parameter) or not self.is_program(tensor):
            return None
        number = self.facts(tensor).number
        if number is None or _storage(self.values.value(number)) in self._overwritten:
            return None
        return number

    def add_input(self, tensor: Tensor, name: str, host: Optional[Tensor]) -> None:
        """Say that a tensor is an input of the program."""
        self.mark(tensor)
        if host is not None:
            self.facts(tensor).number = self.values.input(name, host)

    def mark(self, result: Any) -> Any:
        """Say that the tensors in ``result`` are the program's."""
        for tensor in tensors_of(result):
            if not isinstance(tensor, nn.Parameter):
                self.facts(tensor).program = True
        return result

    def current(self, value: Any) -> Any:
        """Return the structure with constants replaced that the program has written to."""
        return map_leaves(self._current, value) if self._promoted else value

    def _current(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        found = self._promoted.get(id(value))
        if found is not None:
            return found[1]
        if self._stale and not self.is_program(value) and _storage(value) in self._stale:
            if self.facts(value).view_of is None:
                raise refuse(
                    "uses a view of a constant that was written with a value of the device",
                    "write into the tensor itself, or use torch.where",
                )
            return self._view(value)
        return value

    def _view(self, constant: Tensor) -> Any:
        """Return a view of a constant anew, from what the program has made of it."""
        base, func, args, kwargs = self.facts(constant).view_of
        name = getattr(func, "__name__", "")
        return self._in_program(func, name, (self._current(base), *args), kwargs)

    # ---- calls --------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do what the module's first paragraph says."""
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            return func(*args)
        if name in ACCEPTED:
            return self._property(func, name, self.current(args), kwargs)
        args, kwargs = self.current(args), self.current(kwargs)
        if self.pending is not None:
            self.pending = self.pending.seen(name, args)
        if self.unusable and name != "ctc_loss":
            for tensor in tensors_of((args, kwargs)):
                if id(tensor) in self.unusable:
                    raise self.unusable[id(tensor)][1]
        rule = self._rules.get(name)
        if rule is not None:
            return rule(self, func, args, kwargs)
        return self.call(func, args, kwargs)

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute on the host if all tensors are constants, else in the program."""
        name = getattr(func, "__name__", "")
        if name in _SIZED:
            own = int(name.startswith("new_"))  # of a tensor that gives its type
            args, kwargs = (*args[:own], *self.numbers(args[own:])), self.numbers(kwargs)
        if any(map(self.is_program, tensors_of((args, kwargs)))):
            if name in LIKE:
                return self._like(func, name, args, kwargs)
            return self._in_program(func, name, args, kwargs)
        if any(word in name for word in _RANDOM_WORDS):
            return self._random(func, name, args, kwargs)
        return self._on_host(func, name, args, kwargs)

    def _random(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Draw on the device, anew for every microbatch."""
        if kwargs.get("generator") is not None:
            raise refuse(
                f"draws from a generator of its own ({name})",
                "leave the generator out: the device has its own, seeded by the option seed",
            )
        if name in RANDOM_FACTORIES:
            kwargs = {**kwargs, "device": self.device}
        return self._in_program(func, name, args, kwargs)

    def host(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute on the host."""
        args, kwargs = map_leaves(self._host_form, args), map_leaves(self._host_form, kwargs)
        return self.constant(on_host(func, args, kwargs))

    def constant(self, result: Any) -> Any:
        """Say that the tensors in ``result`` are constants that the model made."""
        for tensor in tensors_of(result):
            self.facts(tensor).made = True
        return result

    def _host_form(self, value: Any) -> Any:
        found = self._buffers.get(id(value))
        return value if found is None else found[1]

    def _on_host(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        target = _target(name, args, kwargs)
        if target is not None:
            if id(target) in self._buffers:
                return self._in_program(func, name, args, kwargs)
            if _storage(target) in self._buffer_storages:
                raise refuse("writes to a part of a buffer", "write to the whole buffer")
        if name in FACTORIES or "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        result = self.host(func, args, kwargs)
        self._note_view(result, func, args, kwargs)
        return result

    def _note_view(self, result: Any, func: Any, args: Any, kwargs: Any) -> None:
        base = args[0] if args else None
        if not isinstance(result, Tensor) or not isinstance(base, Tensor) or result is base:
            return
        if _storage(result) and _storage(result) == _storage(base):
            self.facts(result).view_of = (base, func, args[1:], kwargs)

    def _like(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if not args or any(map(self.is_program, tensors_of((args[1:], kwargs)))):
            return self._in_program(func, name, args, kwargs)
        like = args[0]
        stand_in = on_host(torch.empty, ((),), {"dtype": like.dtype}).expand(like.shape)
        options = {**kwargs, "device": "cpu"}
        options.pop("memory_format", None)
        return self.host(func, (stand_in, *args[1:]), options)

    def _in_program(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        target = _target(name, args, kwargs)
        if target is not None:
            args, target = self._written(target, args)
            self.stopped.changed()
        if name in _SHAPES:
            args, kwargs = (args[0], *self.numbers(args[1:])), self.numbers(kwargs)
        kwargs = {
            key: self.read_number(value) if key in NUMBERS and isinstance(value, Tensor) else value
            for key, value in kwargs.items()
        }
        numbers = self._numbers_of(name, args, kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self.device}
        moved_args, moved_kwargs = (
            map_leaves(self._program_form, args),
            map_leaves(self._program_form, kwargs),
        )
        if self.stopped.here:
            own = int(target is not None)
            moved_args = (*moved_args[:own], *map_leaves(self.stopped.stop, moved_args[own:]))
            moved_kwargs = map_leaves(self.stopped.stop, moved_kwargs)
        result = self.mark(self._run_program(func, name, moved_args, moved_kwargs))
        if numbers is not None:
            self._note(func, args, kwargs, result)
        elif target is not None:
            number = self.number(target)
            if number is not None:
                self._overwritten.update({_storage(self.values.value(number))} - {0})
        return result

    def _run_program(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        try:
            return self.stopped.add(func(*args, **kwargs))
        except (NotImplementedError, RuntimeError) as error:
            if self.device.type != "meta":
                raise
            # poptorch knows the shapes of these; torch 2.0 does not.
            if name in _SHAPES_KNOWN_THERE:
                with torch._C.DisableTorchFunction():
                    return args[0].new_empty(_SHAPES_KNOWN_THERE[name](args[0]))
            text = " ".join(str(error).split())[:200]
            raise refuse(
                f"{name} has no shape without values ({text})", "use another operation"
            ) from error

    def _written(self, target: Tensor, args: Any) -> tuple[Any, Tensor]:
        """Make the tensor that is written to one of the program."""
        if id(target) in self._buffers:
            del self._buffers[id(target)]
            self.stopped.add(self.mark(target))
        elif not self.is_program(target):
            moved = self._promote(target)
            return (moved, *args[1:]), moved
        elif self.stopped.here and self.number(target) is None and not self.stopped.has(target):
            raise refuse(
                "changes a tensor in place under torch.no_grad(), and the device derives the "
                "gradient of the change",
                "write the new value to another tensor",
            )
        return args, target

    def _promote(self, constant: Tensor) -> Tensor:
        view_of = self.facts(constant).view_of
        if view_of is not None:
            if not self.is_program(self._current(view_of[0])):
                self._promote(view_of[0])
            found: Tensor = self._view(constant)
            return found
        if _storage(constant) in self._buffer_storages or not self.facts(constant).made:
            raise refuse(
                "writes a value of the device into a tensor that the module keeps",
                "register it as a buffer and write to that, or write to a copy",
            )
        moved = constant.clone() if self._emulated else constant.to(self.device)
        self.mark(moved)
        self.facts(moved).number = self.values.constant(constant)
        self._promoted[id(constant)] = (constant, moved)
        self._stale.update({_storage(constant)} - {0})
        return moved

    def _program_form(self, value: Any) -> Any:
        """Return a constant as the program takes it."""
        if not isinstance(value, Tensor) or self._emulated or self.is_program(value):
            return value
        if id(value) in self._buffers or not value.numel():  # the device has no empty tensors
            return value
        held = self._moved.get(id(value))
        if held is None or held[1] != value._version:
            held = (value, value._version, _move(value, self.device))
            self._moved[id(value)] = held
        return held[2]

    # ---- values that Python reads -----------------------------------------------------------

    def numbers(self, value: Any) -> Any:
        """Return the structure with every 0-d tensor of whole numbers as a number."""
        return map_leaves(self._number, value)

    def _number(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point():
            if value.dtype is torch.bool:
                return value
            return self.read_number(value)
        return value

    def read_number(self, value: Tensor) -> Any:
        """Return the value of a 0-d tensor.

        Raises:
            StaticGraphError: It exists on the device only.
        """
        return self.read(Tensor.item, (value,), {})

    def read(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what a function that reads values returns.

        Raises:
            StaticGraphError: A value exists on the device only.
        """
        tensors = [t for t in tensors_of((args, kwargs)) if self.is_program(t)]
        if not tensors:
            return on_host(
                func, map_leaves(self._host_form, args), map_leaves(self._host_form, kwargs)
            )
        if all(self.number(t) is not None for t in tensors):
            return self.values.read(func, self._kept(args), self._kept(kwargs))
        name = getattr(func, "__name__", "").strip("_")
        raise refuse(
            f"reads the value of a tensor in Python ({name}), which only the device has",
            "write it with torch.where or torch.clamp, or make it depend on the inputs alone",
        )

    def _numbers_of(self, name: str, args: Any, kwargs: Any) -> Optional[list[int]]:
        """Return the numbers of all program tensors in the arguments if all are known."""
        if any(word in name for word in _RANDOM_WORDS):
            return None
        found = [self.number(t) for t in tensors_of((args, kwargs)) if self.is_program(t)]
        known = [number for number in found if number is not None]
        return known if known and len(known) == len(found) else None

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        try:
            _, numbers = self.values.apply(func, self._kept(args), self._kept(kwargs))
        except Exception:  # an operation that the host lacks: its result is known no longer
            numbers = []
        tensors = list(tensors_of(result))
        if len(numbers) == len(tensors):
            for tensor, number in zip(tensors, numbers):
                self.facts(tensor).number = number

    def _kept(self, value: Any) -> Any:
        return map_leaves(self._keep, value)

    def _keep(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor):
            return value
        number = self.number(value)
        return node(number) if number is not None else self._host_form(value).detach().clone()

    def _property(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and name == "__get__" and result is not args[0]:
            if self.is_program(args[0]):
                result = self.stopped.stop(result)
                number = self.number(args[0])
                self.mark(result)
                if number is not None:
                    self._note(func, args, kwargs, result)
            else:
                self.facts(result).made = True
        if isinstance(result, torch.device) and not self._emulated and not _asked_by_front_end():
            return torch.device("cpu")
        return result


def _target(name: str, args: Any, kwargs: Any) -> Optional[Tensor]:
    """Return the tensor that a call writes to."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    if (in_place or kwargs.get("inplace") is True) and args and isinstance(args[0], Tensor):
        target: Tensor = args[0]
        return target
    return None


def _storage(tensor: Tensor) -> int:
    """Return the address of a host tensor's memory; 0 when it has none of its own."""
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0
        except NotImplementedError:  # inside of vmap
            return 0


def _move(value: Tensor, device: torch.device) -> Tensor:
    """Return a constant on the device; axes that were expanded are expanded there."""
    value = value.detach()
    if 0 not in value.stride() or value.numel() == 0:
        return value.contiguous().to(device)
    kept = tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())
    return value[kept].contiguous().to(device).expand(value.shape)


def _asked_by_front_end() -> bool:
    """Tell whether the code that asks is poptorch's own."""
    path = sys._getframe(3).f_code.co_filename
    return "poptorch" in path or "emulator" in path
