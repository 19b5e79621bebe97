"""Waiting for other ranks in a way that can be given up.

A receive of gloo ends when the data comes, when the peer's process ends, or at the group's
timeout; nothing in this process can end it earlier (``ProcessGroup.abort`` leaves it waiting,
torch 2.13). So a thread waits, and the caller waits for the thread or for bad news.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ipu_pipeline.backends.cluster.ranks.heartbeat import Activity

POLL_S = 0.2
FLUSH_S = 1.0
T = TypeVar("T")


class GivenUp(RuntimeError):
    """Not an error of its own: waiting ended because some rank has failed, or is gone."""


class Waiter:
    """Runs blocking calls in a thread of its own, one at a time, until some rank has ``failed``."""

    def __init__(self, activity: Activity, failed: Callable[[], bool]) -> None:
        self.activity = activity
        self.failed = failed
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, function: Callable[[], T]) -> T:
        """Return what ``function`` returns, or raise what it raises.

        Raises:
            GivenUp: Some rank has failed; the call may still be waiting. Or the connection to
                one broke.
        """
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._serve, args=(self._jobs,), name="rank-waiter", daemon=True
            )
            self._thread.start()
        done = threading.Event()
        found: list[T] = []
        errors: list[BaseException] = []

        def job() -> None:
            try:
                found.append(function())
            except BaseException as error:
                errors.append(error)
            done.set()

        with self.activity.waits():
            self._jobs.put(job)
            while not done.wait(POLL_S):
                self.give_up_after_failure()
        if errors and (type(errors[0]) is RuntimeError or isinstance(errors[0], dist.DistError)):
            raise GivenUp(str(errors[0])) from errors[0]
        if errors:
            raise errors[0]
        return found[0]

    def give_up_after_failure(self) -> None:
        """Raise if some rank has failed.

        Raises:
            GivenUp: It has.
        """
        if self.failed():
            raise GivenUp("another rank has failed")

    def guarded(self, operation: dist.P2POp) -> dist.P2POp:
        """Make waiting for a send or receive go through this object."""
        start, peer = operation.op, operation.group_peer
        key = "group_dst" if start is dist.isend else "group_src"

        def begin(tensor: Tensor, *, group: Any = None, tag: int = 0, **_: int) -> _GuardedWork:
            return _GuardedWork(start(tensor, group=group, tag=tag, **{key: peer}), self)

        if operation.tensor.device.type == "cpu":  # waits for a GPU do not block
            operation.op = begin
        return operation

    def close(self) -> None:
        """Stop the thread; a call that still waits is left to end with the process."""
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(timeout=2 * POLL_S)
            if self._thread.is_alive():
                _stuck.append(self._thread)

    @staticmethod
    def _serve(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := jobs.get()) is not None:
            job()


class _GuardedWork:
    """A message on its way; waiting for it can be given up."""

    def __init__(self, work: Any, waiter: Waiter) -> None:
        self._work = work
        self._waiter = waiter

    def wait(self) -> None:
        self._waiter.run(self._work.wait)


# Threads that still wait in torch when their executable is closed.
_stuck: list[threading.Thread] = []


# Registered at import, so that it runs after what others register later.
@atexit.register
def _end_if_stuck() -> None:
    """Skip the interpreter's clean-up while a thread waits in torch.

    Destroying what it waits in would abort the process, after all messages, with a signal instead
    of exit code 1.
    """
    if any(thread.is_alive() for thread in _stuck):
        exit_at_once()


def exit_at_once() -> None:
    """End this process with exit code 1, whatever hangs in it."""
    # Whoever hangs may hold the lock of a stream.
    flusher = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flusher.start()
    flusher.join(FLUSH_S)
    os._exit(1)
