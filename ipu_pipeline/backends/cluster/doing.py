"""What this process is doing and since when: for messages, and to tell a hang from work."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ipu_pipeline.stages.stage import Stage

# An action is hung when it lasts longer than both: this, and so many times the longest like it.
HANG_S = 45.0
HANG_FACTOR = 20.0
OUTSIDE = "the caller's own code"
WAITING = "waiting for other ranks"


@dataclass
class Doing:
    """What this process is doing. The main thread writes it, the watch reads it.

    Attributes:
        what: Such as ``forward pass``.
        stage: Its stage, with its block.
        microbatch: Position in the step; -1 outside of one.
        step: Optimizer step.
        inside: Whether the caller is in a method of the executable.
        prepares: This call captured a new shape: how long its actions last says nothing.
        timed: Whether it is one action, whose length can be compared with earlier ones.
        waiting: Whether it waits for other ranks.
        since: When it began or last ended a wait, by ``time.monotonic``.
        longest: Seconds of the longest action so far, by ``what``.
        thread: That runs the methods of the executable.
    """

    what: str = OUTSIDE
    stage: Stage | None = None
    microbatch: int = -1
    step: int = 0
    inside: bool = False
    prepares: bool = False
    timed: bool = False
    waiting: bool = False
    since: float = field(default_factory=time.monotonic)
    longest: dict[str, float] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)

    def __str__(self) -> str:
        stage = self.stage  # the main thread may be changing it
        if stage is None:
            return f"{self.what}, step {self.step}"
        block = f", block {stage.block!r}" if stage.block else ""
        return (
            f"stage {stage.index}{block}, {self.what} of microbatch {self.microbatch}, "
            f"step {self.step}"
        )

    def enter(self, what: str, step: int) -> None:
        """Note that a method of the executable begins."""
        self.thread = threading.get_ident()
        self.step, self.prepares, self.inside = step, False, True
        self._note(what, None, -1)

    def leave(self) -> None:
        """Note that it has ended, well or not."""
        self.inside = False
        self._note(OUTSIDE, None, -1)

    @contextmanager
    def during(self, what: str, stage: Stage | None = None, microbatch: int = -1) -> Iterator[None]:
        """Note one action; it stays noted when it fails."""
        self._note(what, stage, microbatch)
        self.timed = True
        yield
        seconds = time.monotonic() - self.since
        if seconds > self.longest.get(what, 0.0):
            self.longest[what] = seconds
        if stage is not None:
            stage.block = ""
        self._note(WAITING, None, -1)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Note that other ranks are waited for; this time is no part of the action.

        Threads that wait in the background note nothing.
        """
        if threading.get_ident() != self.thread:
            yield
            return
        self.since, self.waiting = time.monotonic(), True
        try:
            yield
        finally:
            self.since, self.waiting = time.monotonic(), False

    def limit_s(self, stall_timeout_s: float) -> float:
        """Return how many seconds this may last; what was never seen before gets the most."""
        if not self.inside:
            return float("inf")
        known = self.longest.get(self.what)
        if self.waiting or not self.timed or self.prepares or known is None:
            return stall_timeout_s
        return min(stall_timeout_s, max(HANG_S, HANG_FACTOR * known))

    def _note(self, what: str, stage: Stage | None, microbatch: int) -> None:
        # In this order: whoever reads in between never takes an old start for a new action's.
        self.timed = False
        self.since = time.monotonic()
        self.what, self.stage, self.microbatch = what, stage, microbatch
