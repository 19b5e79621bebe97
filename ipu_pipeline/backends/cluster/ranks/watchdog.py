"""One rank that raises, dies or hangs stops all ranks, and every one of them says who it was.

``torchrun`` sees processes that end, and stops the others; it does not see one that hangs, nor
which stage, block and microbatch it was in. So every process writes heartbeats and reads those of
others, and a thread watches how long the main thread does one thing. The main thread may be
waiting for a rank that is gone; it then gives up waiting (``waiting.py``). One that does not is
ended with its process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from ipu_pipeline.backends.cluster.ranks.heartbeat import (
    BEAT_S,
    OUTSIDE,
    Activity,
    Failure,
    Heartbeats,
)
from ipu_pipeline.backends.cluster.ranks.waiting import GivenUp, Waiter, exit_at_once
from ipu_pipeline.errors import PipelineError, StageError, StallError

logger = logging.getLogger(__name__)

# A process without a heartbeat for so long is gone, or cannot run.
SILENT_S = 20.0
# After a broken connection, wait so long for whoever knows why.
REASON_S = SILENT_S + 5.0
# A main thread that goes on so long after a failure hangs.
REACT_S = 10.0
# Where torchrun's summary of a failure is read from.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


class Watchdog:
    """Watches the other processes and this one, and tells the others when this one fails.

    Args:
        store: For heartbeats; used by this object only.
        rank: Of this process.
        world_size: How many there are.
        stall_timeout_s: Nothing but the caller's own code may last longer, not even waiting.
        scope: Where its messages count.

    Attributes:
        failure: Why all processes stop, once one has failed.
        waiter: Waits that end when there is a failure.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, stall_timeout_s: float, scope: str = ""
    ) -> None:
        self.rank = rank
        self.activity = Activity()
        self.failure: Failure | None = None
        self.waiter = Waiter(self.activity, lambda: self.failure is not None)
        self._stall_timeout_s = stall_timeout_s
        self._all_others = [r for r in range(world_size) if r != rank]
        self._reacted = False
        self._closing = threading.Event()
        self._decided = threading.Event()
        # The first looks after all others, those after the first.
        watched = [r for r in self._all_others if 0 in (r, rank)]
        self._beats = Heartbeats(store, rank, watched, self.activity, scope)
        self._thread = threading.Thread(target=self._serve, name="rank-watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def guarding(self, what: str, step: int) -> Iterator[None]:
        """Turn a failure inside into one that all ranks report alike.

        Raises:
            StageError: This rank or another one failed.
        """
        if self.failure is not None:
            self._reacted = True
            raise StageError(
                f"this executable cannot run after a failure ({self.failure.text}); start the "
                "processes again and load the last checkpoint"
            )
        self.activity.enter(what, step)
        try:
            yield
        except BaseException as error:
            explained = self._explained(error)
            self._reacted = True
            if explained is error:
                raise
            explained.__cause__ = error
            _record(explained)
            raise explained from error
        finally:
            self.activity.leave()

    def leave_with(self, error: BaseException) -> None:
        """Tell the others that this process stops because of ``error``, raised by the caller."""
        self._reacted = True
        if self.failure is None:
            what = f"{type(error).__name__}: {error}"
            self._decide(Failure(f"rank {self.rank} left after step {self.activity.step}: {what}"))

    def close(self) -> None:
        """Stop watching and being watched; calling it again does nothing."""
        self._closing.set()
        self._beats.known.set()
        self._thread.join(timeout=5.0)
        self._beats.close()
        self.waiter.close()

    # ---- the main thread ----------------------------------------------------------------

    def _explained(self, error: BaseException) -> BaseException:
        """Return what to raise for ``error``; the other ranks are told."""
        activity = self.activity
        refused = isinstance(error, PipelineError) and activity.stage is None
        if refused or getattr(error, "raised_on_all_ranks", False):
            return error  # every rank raises the same thing, nothing is left half done
        lost = isinstance(error, GivenUp) or (
            isinstance(error, RuntimeError) and not activity.timed
        )
        if lost:
            activity.inside = False  # what comes now is no stall of this process
            self._decided.wait(REASON_S)
        if lost and self.failure is not None:
            kind = StallError if self.failure.stalled else StageError
            return kind(f"{self.failure.text}; rank {self.rank} was {activity} and stopped")
        cause = error.__cause__ if activity.stage is not None and error.__cause__ else error
        text = f"rank {self.rank} failed ({activity}): {type(cause).__name__}: {cause}"
        text += f"; of the others, {self._waits_for()[1]}" if lost else ""
        if self.failure is None:
            self._decide(Failure(text, stalled=lost))
        if not isinstance(error, Exception):
            return error
        return (StallError if lost else StageError)(text)

    def _decide(self, failure: Failure) -> None:
        """Leave the first failure for everybody to find."""
        failure = self._beats.tell(failure)
        if self.failure is None:
            self.failure = failure
            if self.activity.what != OUTSIDE:
                # At once: torchrun's agent may end this process before it has printed its error.
                logger.error("rank %d stops: %s", self.rank, failure.text)
        self._decided.set()

    # ---- the thread that watches --------------------------------------------------------

    def _serve(self) -> None:
        ticks = 0  # how often the main thread was found doing the same thing
        since = 0.0
        silent_ticks, rounds = 0, 0  # of the store
        while self.failure is None:
            self._beats.known.wait(BEAT_S)
            if self._closing.is_set():
                return
            # Ticks and not seconds: they do not count while this process itself cannot run.
            same = self.activity.since == since
            ticks, since = (ticks + 1 if same else 0), self.activity.since
            silent_ticks = silent_ticks + 1 if self._beats.rounds == rounds else 0
            rounds = self._beats.rounds
            found = self._beats.failure or self._problem_of_others()
            found = found or self._problem_of_store(silent_ticks * BEAT_S)
            found = found or self._problem_here(ticks * BEAT_S)
            if found is not None:
                self._decide(found)
        self._end_if_hung()

    def _problem_of_store(self, silent_s: float) -> Failure | None:
        where = "the process that holds it (rank 0, or torchrun's agent)"
        if self._beats.lost:
            return Failure(
                f"the store of the process group is gone, and with it {where}: "
                f"{self._beats.lost}{self._last_of(0)}"
            )
        if silent_s > SILENT_S:
            return Failure(
                f"the store of the process group did not answer for {SILENT_S:.0f} s: {where} is "
                f"stopped or cut off{self._last_of(0)}"
            )
        return None

    def _problem_of_others(self) -> Failure | None:
        for other, (rounds, since) in list(self._beats.quiet.items()):
            beat = self._beats.seen.get(other)
            if beat is None or beat.closed:
                continue
            # Rounds, as this process itself may have been stopped; seconds, as they are said.
            silent_s = time.monotonic() - since
            if min(rounds * BEAT_S, silent_s) > SILENT_S:
                return Failure(
                    f"rank {other} showed no sign of life for {silent_s:.0f} s: its process has "
                    f"ended or cannot run{self._last_of(other)}"
                )
        return None

    def _problem_here(self, lasted_s: float) -> Failure | None:
        activity = self.activity
        if not activity.inside or lasted_s <= activity.limit_s(self._stall_timeout_s):
            return None
        seconds = time.monotonic() - activity.since
        if not activity.waiting:
            text = f"rank {self.rank} hangs ({activity}) since {seconds:.0f} s, {self._place()}"
            return Failure(text, stalled=True, hung=self.rank)
        other, whom = self._waits_for()
        text = f"rank {self.rank} ({activity}) has waited {seconds:.0f} s for others: {whom}"
        return Failure(text, stalled=True, hung=other)

    def _waits_for(self) -> tuple[int, str]:
        """Return who most likely holds this rank up, and what is known of the first of them."""
        beats = dict(sorted(self._beats.seen.items()))
        busy = {other: beat for other, beat in beats.items() if not beat.waiting} or beats
        found = sorted(busy, key=lambda other: -busy[other].seconds)
        texts = [f"rank {o} has not started" for o in self._all_others if o not in beats][:3]
        texts += [f"rank {o} in {busy[o].text} since {busy[o].seconds:.0f} s" for o in found[:3]]
        return (found[0] if found else -1), "; ".join(texts)

    def _end_if_hung(self) -> None:
        """End the process if its main thread does not stop after the failure."""
        until = time.monotonic() + REACT_S
        while time.monotonic() < until:
            if self._reacted or self._closing.wait(min(BEAT_S, REACT_S / 4)):
                return
        assert self.failure is not None
        if self._reacted or not (self.activity.inside or self.failure.hung == self.rank):
            return  # the caller will see at the next call
        still = f"rank {self.rank} is still in {self.activity}, {self._place()}"
        text = f"{self.failure.text}; {REACT_S:.0f} s later {still}: its process ends here"
        _record(StallError(text))
        os.write(2, f"{text}\n".encode())  # takes no lock that a hung thread could hold
        exit_at_once()

    def _last_of(self, other: int) -> str:
        beat = self._beats.seen.get(other)
        return "" if beat is None else f"; rank {other} was last seen in: {beat.text}"

    def _place(self) -> str:
        """Return where in the code the thread is that drives the executable."""
        frame: FrameType | None = sys._current_frames().get(self.activity.thread)
        if frame is None:
            return "at an unknown place"
        code = frame.f_code
        return f"at {code.co_filename}:{frame.f_lineno} ({code.co_name})"


def _record(error: BaseException) -> None:
    """Let torchrun's summary of the failure show ``error``, unless it shows another already."""
    path = os.environ.get(ERROR_FILE)
    if not path or Path(path).exists():
        return
    try:
        raise error  # what is written is the error being handled
    except BaseException:
        with contextlib.suppress(OSError):  # it is said elsewhere as well
            ErrorHandler().record_exception(error)
