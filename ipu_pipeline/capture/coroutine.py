"""Code that waits in the middle for something that others compute, and then goes on."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

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
