"""The glue of one microbatch, run once while its stages compute.

Up to a value that it reads from a tensor, it runs before the stages, as any replay. The read is a
node of the stage that knows the value: there the glue goes on with it, up to the next read or to
its end. Tensors that it keeps (an attribute, an entry of a list or dict) are stand-ins until the
stages hand over the real ones.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.capture.calls import set_modes
from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.glue import Call, Path, StandIn, substituted
from ipu_pipeline.capture.patches import tracing_patches
from ipu_pipeline.capture.places import set_entry
from ipu_pipeline.capture.python_state import PythonState
from ipu_pipeline.capture.replay import Followed, Replay
from ipu_pipeline.capture.values import tensors_in


class Unlifted(BaseException):
    """The graph lacks what the glue has shared with it. User code must not catch it by accident.

    Attributes:
        changed: Values that are no host values yet, by number of the call, and path.
        kept: Keys of tensors that no stage hands over yet.
        said: What has changed, for the log.
    """

    def __init__(
        self, changed: Mapping[tuple[int, Path], Any], kept: frozenset[int], said: str
    ) -> None:
        super().__init__(said)
        self.changed = changed
        self.kept = kept
        self.said = said


@dataclass(frozen=True, eq=False)
class _Place:
    """Where stand-ins are kept: an entry of a container."""

    container: Any
    key: Any
    value: Any
    keys: frozenset[int]


class GlueRun:
    """See the module; inside of ``tracing_patches`` in which the model was captured.

    Args:
        captured: What it follows.
        batch: The microbatch.
        integers: Places where a whole number that differs is no reason for another capture.
        region: The modes of torch around the model, for a thread of its own.

    Attributes:
        followed: What it has met, once it has ended.
    """

    def __init__(
        self,
        captured: CapturedModel,
        batch: Mapping[str, Any],
        integers: frozenset[tuple[int, Path]],
        region: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        self.followed: Followed | None = None
        self._captured = captured
        self._glue = captured.glue
        self._batch = batch
        self._replay = Replay(captured.glue, self._value, integers)
        self._region = region
        self._coroutine: Coroutine | None = None
        self._seen: set[int] = set()
        self._modes: list[tuple[nn.Module, bool]] = []
        self._replaced = [
            (live, name, live[name])
            for name, live in map(self._owner_of, captured.glue.written_back)
        ]
        self._places: list[_Place] = []
        inputs = captured.glue.inputs
        self._tensors = {id(stand_in): batch[name] for name, stand_in in inputs.items()}

    # ---- for the caller -----------------------------------------------------------------

    @property
    def is_live(self) -> bool:
        """Whether the stages share values with it, so that they run before the next one begins."""
        return self._coroutine is not None or bool(self._places)

    @property
    def hosts(self) -> dict[str, Any]:
        """Host values up to where it is."""
        return self._replay.hosts

    @property
    def missing(self) -> frozenset[int]:
        """Keys of the tensors it keeps that no stage hands over yet."""
        keys = frozenset[int]().union(*(place.keys for place in self._places))
        return (keys & self._glue.nodes.keys()) - self._glue.kept - self._tensors.keys()

    @property
    def reason(self) -> str:
        """Why stages must not run ahead of it."""
        for call in self._glue.calls:
            if call.is_late:
                return f"{call.where} reads values of a tensor in Python ({call.name})"
        kept = next(iter(self._places))
        return f"its own code keeps a tensor for later ({kept.key!r})"

    def start(self) -> None:
        """Run up to the first read, or to the end.

        Raises:
            Differs: It does something else than recorded.
            Unlifted: The graph lacks something, and it waits for a value.
        """
        model = self._captured.model
        _ = self._glue.references  # of a glue that nobody runs
        if not any(call.is_late for call in self._glue.calls):
            with self._replay.patches(model):
                self.followed = self._replay.run(model, self._batch)
            self._find_places()
            return
        self._modes = [(module, module.training) for module in model.modules()]
        self._coroutine = Coroutine(self._body, "glue", self._captured.thread_locals)
        with self._going_on():
            self._coroutine.start()
        set_modes(self._modes)
        self._check()

    def begin(self) -> None:
        """Let the stages share values with it from now on."""
        self._glue.session.run = self

    def close(self, *, done: bool = False) -> None:
        """End it; ``done``: its microbatch is, and modules are in the modes it has left them in."""
        assert not done or self.followed is not None, "a read was not computed"
        if self._glue.session.run is self:
            self._glue.session.run = None
        if self._coroutine is not None:
            self._coroutine.abandon()
            if done:
                set_modes(self._modes)

    # ---- for the nodes of the graph --------------------------------------------------------

    def arrive(self, number: int, value: Any) -> None:
        """Go on with the value of a read; one that is recomputed is known."""
        if self._coroutine is None or number in self._seen:
            return
        self._seen.add(number)
        assert number == self._replay.position - 1, "reads arrive in the order of the glue"
        with tracing_patches(self._captured.model), self._going_on():
            self._coroutine.resume(value)
        self._check()

    def deliver(self, key: int, tensor: Tensor) -> None:
        """Put a tensor where the glue keeps it; one that is recomputed is known."""
        if key not in self._tensors:
            self._tensors[key] = tensor
            self._fill()

    # ---- running ------------------------------------------------------------------------

    def _body(self) -> None:
        with self._region():
            self.followed = self._replay.run(self._captured.model, self._batch)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Within it, its thread runs: modules are in the modes that it knows."""
        model = self._captured.model
        of_stages = [(module, module.training) for module in model.modules()]
        set_modes(self._modes)
        try:
            with self._replay.patches(model):
                yield
        finally:
            self._modes = [(module, module.training) for module in model.modules()]
            set_modes(of_stages)

    def _value(self, call: Call) -> Any:
        if not call.is_late:
            return self._captured.read_early(call, {**self._batch, **self._replay.hosts})
        assert self._coroutine is not None
        return self._coroutine.suspend()

    def _check(self) -> None:
        if self.followed is not None:
            self._find_places()
        changed = self._replay.changed
        if changed or self.missing:
            raise Unlifted(changed, self.missing, self._replay.said)
        self._fill()

    # ---- what it keeps ------------------------------------------------------------------

    def _owner_of(self, fqn: str) -> tuple[str, dict[str, Any]]:
        path, _, name = fqn.rpartition(".")
        owner = self._captured.model.get_submodule(path)
        return name, owner._buffers if name in owner._buffers else vars(owner)

    def _find_places(self) -> None:
        for live, name, tensor in self._replaced:
            live[name] = tensor
        kept = {id(stand_in) for stand_in in self._glue.referenced()}
        if not kept:
            return
        of_stages = {
            entry for call in self._glue.calls if call.repeated for entry in call.repeated.entries()
        }
        for container, key, value in PythonState(self._captured.model.modules()).entries():
            if isinstance(value, StandIn | tuple) and (id(container), key) not in of_stages:
                keys = kept.intersection(id(tensor) for tensor in tensors_in(value))
                if keys:
                    self._places.append(_Place(container, key, value, frozenset(keys)))
        if not self._places:
            self._glue.forget_references()
        self._fill()

    def _fill(self) -> None:
        """Put those tensors in place that are there."""
        if self.followed is None:
            return
        for place in [p for p in self._places if p.keys <= self._tensors.keys()]:
            made = substituted(place.value, lambda tensor: self._tensors.get(id(tensor), tensor))
            set_entry(place.container, place.key, made)
            self._places.remove(place)


# ---- code that waits in the middle for something that others compute --------------------------


# A thread that runs is left behind: some stage waits for it.
_JOIN_S = 2.0


class _AbandonedError(BaseException):
    """Ends the thread of code that nobody resumes; no ``except Exception`` may catch it."""


class Coroutine:
    """Code in a thread of its own; either it runs or its caller, never both.

    Args:
        body: The code; it runs with the caller's context and grad mode.
        name: That of its thread.
        thread_locals: What it shares of its caller's.

    Attributes:
        result: What the code returned.
        error: What it raised.
        finished: Whether it has returned or raised.
    """

    def __init__(
        self, body: Callable[[], Any], name: str, thread_locals: Iterable[threading.local] = ()
    ) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.finished = False
        self._body = body
        self._thread_locals = [(local, dict(vars(local))) for local in thread_locals]
        self._to_run = queue.SimpleQueue[tuple[Any] | None]()
        self._to_caller = queue.SimpleQueue[None]()
        self._grad = torch.is_grad_enabled()
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._main,), name=name, daemon=True
        )

    def start(self) -> None:
        """Run up to where the code suspends itself, or to the end; raise what the code raises."""
        self._leave()
        self._thread.start()
        self._wait()

    def suspend(self) -> Any:
        """Called by the code: wait until it is resumed; return what it is resumed with."""
        self._leave()
        self._to_caller.put(None)
        received = self._to_run.get()
        if received is None:
            raise _AbandonedError
        self._enter()
        return received[0]

    def resume(self, value: Any) -> Any:
        """Let the code go on with ``value``; return or raise what it does."""
        self._leave()
        self._to_run.put((value,))
        self._wait()
        return self.result

    def abandon(self) -> None:
        """End it if it is suspended."""
        if not self.finished and self._thread.is_alive():
            self._to_run.put(None)
            self._thread.join(_JOIN_S)

    def _wait(self) -> None:
        self._to_caller.get()
        self._enter()
        if self.error is not None:
            raise self.error

    def _main(self) -> None:
        try:
            self._enter()
            with torch.set_grad_enabled(self._grad):
                self.result = self._body()
        except _AbandonedError:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.finished = True
            self._leave()
            self._to_caller.put(None)

    def _leave(self) -> None:
        for local, values in self._thread_locals:
            values.clear()
            values.update(vars(local))

    def _enter(self) -> None:
        for local, values in self._thread_locals:
            vars(local).clear()
            vars(local).update(values)
