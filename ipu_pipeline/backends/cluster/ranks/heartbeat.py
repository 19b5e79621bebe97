"""What every process is doing, written into the store for the others, and the first failure.

All reading and writing of the store is done by one thread: a store whose process is stopped never
answers (torch 2.13: no timeout ends a read), and neither the main thread nor the watchdog may wait
for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.distributed.distributed_c10d import Store

from ipu_pipeline.backends.cluster.ranks.signature import SignedStore
from ipu_pipeline.stages.stage import Stage

BEAT_S = 0.5
# So long a failure may take to reach the others before this process goes on to stop.
TELL_S = 5.0
# An action is hung when it lasts longer than both: this, and so many times the longest like it.
HANG_S = 45.0
HANG_FACTOR = 20.0
OUTSIDE = "the caller's own code"
WAITING = "waiting for other ranks"
_FAILED = "failed"


@dataclass
class Activity:
    """What this process is doing. The main thread writes it, the watchdog reads it.

    Attributes:
        what: Such as ``forward pass``.
        stage: Its stage, with its block.
        microbatch: Position in the step; -1 outside of one.
        step: Optimizer step.
        inside: Whether the caller is in a method of the executable.
        timed: Whether it is one action, whose length can be compared with earlier ones.
        waiting: Whether it waits for other ranks.
        since: When it began or last ended a wait, by ``time.monotonic``.
        longest: Seconds of the longest action so far, by ``what``; emptied for a new shape.
        thread: That runs the methods of the executable.
    """

    what: str = OUTSIDE
    stage: Stage | None = None
    microbatch: int = -1
    step: int = 0
    inside: bool = False
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
        self.step, self.inside = step, True
        self._note(what)

    def leave(self) -> None:
        """Note that it has ended, well or not."""
        self.inside = False
        self._note(OUTSIDE)

    @contextmanager
    def during(self, what: str, stage: Stage | None = None, microbatch: int = -1) -> Iterator[None]:
        """Note one action; it stays noted when it fails."""
        self._note(what, stage, microbatch)
        self.timed = True
        yield
        seconds = time.monotonic() - self.since
        self.longest[what] = max(seconds, self.longest.get(what, 0.0))
        if stage is not None:
            stage.block = ""
        self._note(WAITING)

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
        if self.waiting or not self.timed or known is None:
            return stall_timeout_s
        return min(stall_timeout_s, max(HANG_S, HANG_FACTOR * known))

    def _note(self, what: str, stage: Stage | None = None, microbatch: int = -1) -> None:
        # In this order: whoever reads in between never takes an old start for a new action's.
        self.timed = False
        self.since = time.monotonic()
        self.what, self.stage, self.microbatch = what, stage, microbatch


@dataclass(frozen=True)
class Failure:
    """Why all processes stop. The first one counts, on all of them.

    Attributes:
        text: Names the rank and what it did.
        stalled: Nobody raised or died, but something lasted too long.
        hung: The rank that will not stop by itself, or -1.
    """

    text: str
    stalled: bool = False
    hung: int = -1


@dataclass(frozen=True)
class Beat:
    """A heartbeat.

    Attributes:
        count: Of this process's beats so far.
        text: What it was doing.
        seconds: For how long.
        waiting: Whether it waited for others.
        closed: It left when all was done.
    """

    count: int
    text: str
    seconds: float = 0.0
    waiting: bool = False
    closed: bool = False

    def follows(self, last: Beat) -> bool:
        """Whether it is news: one that was written before ``last`` is shown again by strangers."""
        return not last.closed and (self.closed or self.count > last.count)


class Heartbeats:
    """Heartbeats of all processes, and the first failure.

    Args:
        store: Used by this object's thread only.
        rank: Of this process.
        watched: Ranks whose beats are read.
        activity: Of this process.
        scope: Where its messages count.

    Attributes:
        failure: The first one, once it is known here.
        known: Set when there will be no other news.
        lost: Why the store cannot be used any more.
        rounds: How often beats were exchanged so far.
        seen: Last beat of other ranks.
        quiet: Number of rounds since it changed, and when that was, by ``time.monotonic``.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        watched: Iterable[int],
        activity: Activity,
        scope: str = "",
    ) -> None:
        self.failure: Failure | None = None
        self.known = threading.Event()
        self.lost = ""
        self.rounds = 0
        self.seen: dict[int, Beat] = {}
        self.quiet: dict[int, tuple[int, float]] = {}
        self._store = SignedStore(store, scope)
        self._rank = rank
        self._watched = tuple(watched)
        self._activity = activity
        self._told: Failure | None = None
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="rank-heartbeat", daemon=True)
        self._thread.start()

    def tell(self, failure: Failure) -> Failure:
        """Leave a failure for everybody to find; return the first one, perhaps another rank's."""
        self._told = self._told or failure
        self._wake.set()
        if self._thread.is_alive():
            self.known.wait(TELL_S)
        return self.failure or failure

    def close(self) -> None:
        """Leave the others; they do not miss this process then."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=TELL_S)

    def _serve(self) -> None:
        try:
            while not self._closing:
                self._exchange()
                self._wake.wait(BEAT_S)
                self._wake.clear()
            if self._told is not None and self.failure is None:
                self._exchange()
            self._write(Beat(0, "nothing: it has closed its executable", closed=True))
        except RuntimeError as error:
            self.lost = str(error).splitlines()[0]
        self.known.set()

    def _exchange(self) -> None:
        if self.failure is None:
            if self._told is not None:
                self.failure = self._store.set_first(_FAILED, self._told)
            else:
                self.failure = self._store.get(_FAILED, Failure)
            if self.failure is not None:
                self.known.set()
        activity = self._activity
        seconds = time.monotonic() - activity.since
        self._write(Beat(self.rounds, str(activity), seconds, activity.waiting))
        for other in self._watched:
            beat, last = self._store.get(f"alive/{other}", Beat), self.seen.get(other)
            changed = beat is not None and (last is None or beat.follows(last))
            rounds, since = self.quiet.get(other, (0, 0.0))
            self.quiet[other] = (0, time.monotonic()) if changed else (rounds + 1, since)
            if beat is not None and changed:
                self.seen[other] = beat
        self.rounds += 1

    def _write(self, beat: Beat) -> None:
        self._store.set(f"alive/{self._rank}", beat)
