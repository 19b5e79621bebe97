"""Whether the user's code of one microbatch may run before that of the one before has ended.

The pipeline wants the inputs of many microbatches at once, so the code before the call of the
model runs ahead of the code behind it. With transformers' Trainer one microbatch ends before the
next begins. The two are equal unless one half of the code changes what the other reads: a
counter, an average of the loss, the position of a random generator. So the first microbatch runs
alone, and what its code reads and changes is compared; with such a change, or with further calls
of the model, microbatches run one after another from then on, in transformers' order.
"""

from __future__ import annotations

import dis
import itertools
import logging
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.logging import get_logger

from ipu_pipeline.capture.values import PLAIN
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.train.live_loss import HOOKS, LossRun

logger = get_logger(__name__)
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "numpy", "ipu_pipeline")
# Their globals, too, are no state of the user's code; threads of theirs may change them any time.
_FURTHER_LIBRARIES = (sys.stdlib_module_names - {"test"}) | {
    "huggingface_hub", "datasets", "tokenizers", "safetensors", "filelock", "fsspec", "httpx",
    "requests", "packaging", "tqdm", "rich", "jinja2", "pandas", "pyarrow",
}  # fmt: skip
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_MOVING = (
    torch.Generator, random.Random, np.random.Generator, types.GeneratorType, itertools.count,
    itertools.cycle,
)  # fmt: skip
# Of one thread each, or changed by every import.
_NO_STATE = (threading.local, logging.Logger)
# So many members of a container are compared; of a longer one its length and its end.
_COMPARED = 16
_COMPARED_BYTES = 1 << 16
_RANDOM = "random numbers of "
# What is set for captures, and what models of transformers set in their first call.
_NO_CHANGE = frozenset(f"model.{name}" for name in ("forward", "_modules", *HOOKS)) | {
    "config.problem_type"
}
State = dict[str, Any]


class WatchedRun(LossRun):
    """A run of which is known what its code reads before the call of the model, and changes."""

    def __init__(self, body: Callable[[], Any], watch: Watch) -> None:
        super().__init__(body)
        self._watch = watch
        self.read: frozenset[str] = frozenset()
        self.changed_before: frozenset[str] = frozenset()
        self.changed_after: frozenset[str] = frozenset()
        self.changed_last: frozenset[str] = frozenset()
        self.changed_meanwhile: frozenset[str] = frozenset()
        self._suspended: State = {}

    def start(self) -> None:
        """Run up to the call of the model."""
        before = self._watch.state()
        super().start()
        self._suspended = self._watch.state()
        self.changed_before = _changes(before, self._suspended)

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Suspend the run in this call of the model."""
        self.read = self._watch.names_read_before(sys._getframe(1))
        return super().call(forward, args, kwargs)

    def resume(self, outputs: Any) -> Any:
        """Run up to the backward pass, or the rest."""
        before = self._watch.state()
        self.changed_meanwhile = _changes(self._suspended, before) - _NO_CHANGE
        self._suspended = {}
        result = super().resume(outputs)
        self.changed_after = _changes(before, self._watch.state())
        return result

    def go_on(self) -> None:
        """Run what is behind the backward pass."""
        before = self._watch.state()
        super().go_on()
        self._suspended = self._watch.state()
        self.changed_last = _changes(before, self._suspended)

    def conflict(self, *, alone: bool) -> str:
        """Say why the code before the call must not run ahead; nothing if it may.

        ``alone``: what changed while it was suspended, the model has changed.
        """
        if alone and self.changed_meanwhile:
            return f"surrounds a model that changes {', '.join(sorted(self.changed_meanwhile))}"
        if self._watch.has_parameter(self.reads_gradients_of):
            return "reads gradients of the model's parameters"
        if self.rounds > 1 or (self.rounds and not self.finished):
            return "calls the model again behind a backward pass"
        if self.changed_last:
            return f"changes {', '.join(sorted(self.changed_last))} behind its backward pass"
        if self.further_calls:
            return "calls the model a second time or in another mode, outside of the pipeline"
        drawn = {name for name in self.changed_before if name.startswith(_RANDOM)}
        if changed := self.changed_before - drawn:
            return f"changes {', '.join(sorted(changed))} before it calls the model"
        shared = {name for name in self.changed_after if self._used_before(name, drawn)}
        if shared:
            return f"changes {', '.join(sorted(shared))} after its call of the model"
        return ""

    def _used_before(self, name: str, drawn: set[str]) -> bool:
        """Whether the code before the call, or the model, may use what ``name`` names."""
        if name.startswith(_RANDOM):
            return name in drawn
        return name.startswith(("model.", "config.")) or name.rpartition(".")[2] in self.read


class MicrobatchOrder:
    """Decides between microbatches that overlap and microbatches one after another.

    Attributes:
        ahead: Whether they overlap; ``None`` until the first one has run.
    """

    def __init__(self) -> None:
        self.ahead: bool | None = None

    def overlaps(self, *, watched: bool) -> bool:
        """Whether the next microbatch may begin; after the first ``watched`` one it is known."""
        return not watched if self.ahead is None else self.ahead

    def one_by_one(self, reason: str) -> None:
        """Run them one after another from now on."""
        if self.ahead is not False:
            self.ahead = False
            logger.warning(
                "microbatches run one after another, not overlapped in the pipeline: %s", reason
            )

    def settle(
        self, run: LossRun, *, alone: bool, agree: Callable[[str], str] = lambda reason: reason
    ) -> None:
        """Learn from a run; ``alone``: no other one had begun before it ended.

        ``agree`` makes of what it conflicts with here what all processes say.

        Raises:
            LoweringError: It does something for the first time that needs another order.
        """
        reason = agree(run.conflict(alone=alone)) if isinstance(run, WatchedRun) else ""
        if not reason:
            self.ahead = True if self.ahead is None else self.ahead
        elif alone:
            self.one_by_one(f"compute_loss {reason}")
        elif self.ahead:
            raise LoweringError(
                f"compute_loss {reason}, and has not done so in its first microbatch, so that the "
                "code of other microbatches has already run in another order than transformers' "
                "Trainer has; set loss_in_order = True in the trainer's class"
            )


class Watch:
    """What the code of the user may read and change between two microbatches, by name.

    Attributes of the trainer and of what it holds, of its callbacks, of the model and its config;
    globals and closures of ``functions`` and of the functions that those name; the positions of
    the random generators.
    """

    def __init__(self, trainer: Any, own: frozenset[str]) -> None:
        self._trainer = trainer
        self._own = own
        self._variables = list(_variables(trainer))
        self._read: dict[tuple[tuple[types.CodeType, int], ...], frozenset[str]] = {}

    def has_parameter(self, tensors: list[nn.Parameter]) -> bool:
        """Whether one of them is the model's."""
        ids = {id(tensor) for tensor in tensors}
        return bool(ids) and any(id(p) in ids for p in self._trainer.model.parameters())

    def state(self) -> State:
        """Return what there is now, in a form that can be compared."""
        numpy_state = np.random.get_state()  # noqa: NPY002
        state: State = {
            f"{_RANDOM}python": hash(random.getstate()),
            f"{_RANDOM}numpy": (numpy_state[2], numpy_state[3], int(numpy_state[1][0])),  # type: ignore[index]
            f"{_RANDOM}torch": torch.get_rng_state().numpy().tobytes(),
        }
        trainer = self._trainer
        for name, value in vars(trainer).items():
            if name not in self._own and value is not trainer.model:
                state.update(_named(f"self.{name}", value))
        holders = {"model": trainer.model, "config": getattr(trainer.model, "config", None)}
        callbacks = trainer.callback_handler.callbacks
        holders |= {type(callback).__name__: callback for callback in callbacks}
        for name, holder in holders.items():
            for key, value in getattr(holder, "__dict__", {}).items():
                state[f"{name}.{key}"] = _described(value)
        state["model.parameters"] = _versions(trainer.model)
        for name, read in self._variables:
            state.update(_named(name, read()))
        return state

    def names_read_before(self, frame: types.FrameType | None) -> frozenset[str]:
        """Return the names that the user's code on the stack, up to where it is, may have read."""
        frames = []
        while frame is not None:
            if not _of_library(frame.f_globals):
                frames.append(frame)
            frame = frame.f_back
        key = tuple((frame.f_code, frame.f_lasti) for frame in frames)
        if key not in self._read:
            running = {frame.f_code for frame in frames}
            self._read[key] = frozenset().union(*(_read_in(frame, running) for frame in frames))
        return self._read[key]


def _variables(trainer: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the globals and closures that the user's functions name, and how to read each."""
    pending = [getattr(trainer, "compute_loss_func", None), vars(trainer).get("compute_loss")]
    pending += [value for kind in type(trainer).__mro__ for value in vars(kind).values()]
    seen: set[Any] = set()
    while pending:
        function = _plain_function(pending.pop())
        if function is None or function in seen or _of_library(function.__globals__):
            continue
        seen.add(function)
        for name in _names(function.__code__) & set(function.__globals__):
            pending.append(function.__globals__[name])
            yield name, partial(function.__globals__.get, name)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            read = partial(_content, cell)
            pending.append(read())
            yield name, read


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


def _read_in(frame: types.FrameType, running: set[types.CodeType]) -> set[str]:
    names = {
        i.argval
        for i in dis.get_instructions(frame.f_code)
        if i.offset <= frame.f_lasti and isinstance(i.argval, str)
    }
    locals_ = frame.f_locals
    pending = [where.get(name) for where in (frame.f_globals, locals_) for name in names]
    pending += [getattr(type(v), name, None) for v in locals_.values() for name in names]
    receivers = {type(value) for value in locals_.values()}
    seen: set[Any] = set()
    while pending:
        function = _plain_function(pending.pop())
        if function is None or function in seen or _of_library(function.__globals__):
            continue
        if function.__code__ in running:  # only its part up to the call counts
            continue
        seen.add(function)
        inner = _names(function.__code__)
        names |= inner
        pending += [function.__globals__.get(name) for name in inner]
        pending += [getattr(receiver, name, None) for receiver in receivers for name in inner]
    return names


def _names(code: types.CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return {*code.co_names, *code.co_freevars}.union(*map(_names, inner))


def _plain_function(value: Any) -> types.FunctionType | None:
    if isinstance(value, partial):
        value = value.func
    elif isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    if not isinstance(value, types.FunctionType):
        value = vars(type(value)).get("__call__")
    return value if isinstance(value, types.FunctionType) else None


def _of_library(namespace: Mapping[str, Any]) -> bool:
    package = str(namespace.get("__name__", "")).split(".")[0]
    return package in _LIBRARIES or package in _FURTHER_LIBRARIES


def _named(name: str, value: Any, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Yield a value, and what an object holds, each under its name."""
    yield name, _described(value)
    plain = isinstance(
        value, (*PLAIN, *_CONTAINERS, *_NO_STATE, Tensor, nn.Module, type, types.ModuleType)
    )
    if plain or callable(value) or not depth:
        return
    # Objects of libraries hold the whole world.
    inner = 0 if type(value).__module__.split(".")[0] in _LIBRARIES else depth - 1
    for key, held in list(getattr(value, "__dict__", {}).items()):
        yield from _named(f"{name}.{key}", held, inner)


def _described(value: Any, depth: int = 2) -> Any:
    """Return what differs when the value does, as far as is looked at."""
    if isinstance(value, PLAIN):
        return repr(value)  # two NaN are equal
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, nn.Module):
        return id(value), _versions(value)
    if isinstance(value, _MOVING):
        return id(value), _position(value)
    if isinstance(value, np.ndarray):
        return id(value), crc32(value.tobytes()) if value.nbytes <= _COMPARED_BYTES else None
    if isinstance(value, (set, frozenset)):  # whose order says nothing, and may change with a copy
        return id(value), len(value), hash(frozenset(value))
    if isinstance(value, _CONTAINERS):
        return id(value), len(value), _last_members(value, depth - 1) if depth else None
    return id(value)


def _position(value: Any) -> Any:
    """Return where a generator or iterator is."""
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, types.GeneratorType):
        return repr(value.gi_frame and (value.gi_frame.f_lasti, value.gi_frame.f_locals))
    return repr(value)


def _last_members(value: Any, depth: int) -> list[Any]:
    # Not its own ``items``, which may compute them: a lazy mapping of transformers imports them.
    flat = itertools.chain(*dict.items(value)) if isinstance(value, dict) else value
    return [_described(member, depth) for member in deque(flat, maxlen=_COMPARED)]


def _versions(module: nn.Module) -> int:
    """Return how often its parameters have been changed, or its buffers if it has only those.

    Stages change buffers of the model at any time.
    """
    parameters = list(module.parameters())
    return sum(tensor._version for tensor in parameters or module.buffers())


def _changes(before: State, after: State) -> frozenset[str]:
    nothing = object()
    keys = {**before, **after}
    return frozenset(k for k in keys if before.get(k, nothing) != after.get(k, nothing))
