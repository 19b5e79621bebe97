"""One rank that raises, dies or hangs stops all ranks, and every one of them says who it was.

Every process shows signs of life and reads those of others (``bulletin.py``), and watches how
long its own main thread does one thing (``doing.py``). A thread does this, because the main
thread may be waiting for a rank that is gone; it then gives up waiting (``waiting.py``). A main
thread that does not give up what it does is ended with its process (``farewell.py``).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from torch.distributed.distributed_c10d import Store

from ipu_pipeline.backends.cluster.bulletin import (
    BEAT_S,
    Beat,
    Bulletin,
    Verdict,
    is_gone,
    own_process,
)
from ipu_pipeline.backends.cluster.doing import OUTSIDE, Doing
from ipu_pipeline.backends.cluster.farewell import end_process, record, say_when_terminated
from ipu_pipeline.backends.cluster.waiting import GivenUp
from ipu_pipeline.errors import PipelineError, StageError, StallError

logger = logging.getLogger(__name__)

# A process that shows no sign of life for so long is gone, or cannot run.
SILENT_S = 20.0
# After a broken connection, wait so long for whoever knows why.
VERDICT_S = SILENT_S + 5.0
# Say once whom this process has been waiting for so long.
WARN_S = 45.0
# A process that is told to end looks so long for the reason.
WORDS_S = 1.0
# A main thread that goes on so long after a failure hangs.
REACT_S = 10.0


class Watch:
    """Watches the other processes and this one, and tells the others when this one fails.

    Args:
        store: Where the processes leave notes for each other; used by this object only.
        rank: Of this process.
        world_size: How many there are.
        doing: What this process is doing.
        stall_timeout_s: Nothing but the caller's own code may last longer, not even waiting.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, doing: Doing, *, stall_timeout_s: float
    ) -> None:
        self.rank = rank
        self.doing = doing
        self.verdict: Verdict | None = None
        self._stall_timeout_s = stall_timeout_s
        self._all_others = [r for r in range(world_size) if r != rank]
        # The first looks after all others, those after the first.
        others = [r for r in self._all_others if 0 in (r, rank)]
        self._reacted = False
        self._told = False
        self._warned_of = 0.0
        self._closing = threading.Event()
        self._decided = threading.Event()
        self._bulletin = Bulletin(store, rank, others, self._beat)
        self._unsay = say_when_terminated(self._last_words)
        self._thread = threading.Thread(target=self._serve, name="rank-watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def guarding(self, what: str, step: int) -> Iterator[None]:
        """Turn a failure inside into one that all ranks report alike.

        Raises:
            StageError: This rank or another one failed.
        """
        self._refuse_after_failure()
        self.doing.enter(what, step)
        try:
            yield
        except BaseException as error:
            explained = self._explained(error)
            self._reacted = True
            if explained is error:
                raise
            explained.__cause__ = error
            record(explained)
            raise explained from error
        finally:
            self.doing.leave()

    def leave_with(self, error: BaseException) -> None:
        """Tell the others that this process stops because of ``error``, raised by the caller."""
        self._reacted = True
        if self.verdict is None:
            what = f"{type(error).__name__}: {error}"
            text = f"rank {self.rank} left after step {self.doing.step}: {what}"
            self._decide(Verdict(text))

    def close(self) -> None:
        """Stop watching and being watched; calling it again does nothing."""
        self._closing.set()
        self._thread.join(timeout=5.0)
        self._bulletin.close()
        self._unsay()

    # ---- the main thread ----------------------------------------------------------------

    def _refuse_after_failure(self) -> None:
        if self.verdict is not None:
            self._reacted = True
            raise StageError(
                f"this executable cannot run after a failure ({self.verdict.text}); start the "
                "processes again and load the last checkpoint"
            )

    def _explained(self, error: BaseException) -> BaseException:
        """Return what to raise for ``error``; the other ranks are told."""
        doing = self.doing
        refused = isinstance(error, PipelineError) and doing.stage is None
        if refused or getattr(error, "raised_on_all_ranks", False):
            return error  # every rank raises the same thing, nothing is left half done
        gave_up = isinstance(error, GivenUp)
        lost = gave_up or (isinstance(error, RuntimeError) and not doing.timed)
        if lost:
            doing.inside = False  # what comes now is no stall of this process
            self._decided.wait(VERDICT_S)
        if lost and self.verdict is not None:
            kind = StallError if self.verdict.stalled else StageError
            return kind(f"{self.verdict.text}; rank {self.rank} was {doing} and stopped")
        cause = error.__cause__ if doing.stage is not None and error.__cause__ else error
        text = f"rank {self.rank} failed ({doing}): {type(cause).__name__}: {cause}"
        text += f"; of the others, {self._waits_for()[1]}" if lost else ""
        if self.verdict is None:
            self._decide(Verdict(text, stalled=lost))
        if not isinstance(error, Exception):
            return error
        return (StallError if lost else StageError)(text)

    def _decide(self, verdict: Verdict) -> None:
        """Note the first failure for everybody to find."""
        verdict = self._bulletin.tell(verdict)
        if self.verdict is None:
            self.verdict = verdict
            if self.doing.what != OUTSIDE:
                # At once: torchrun's agent may end this process before it has printed its error.
                logger.error("rank %d stops: %s", self.rank, verdict.text)
        self._decided.set()

    # ---- the watch ----------------------------------------------------------------------

    def _serve(self) -> None:
        ticks = 0  # how often the main thread was found doing the same thing
        since = 0.0
        silent_ticks, rounds = 0, 0  # of the store
        while self.verdict is None:
            if self._closing.wait(BEAT_S):
                return
            # Ticks and not seconds: they do not count while this process itself cannot run.
            same = self.doing.since == since
            ticks, since = (ticks + 1 if same else 0), self.doing.since
            silent_ticks = silent_ticks + 1 if self._bulletin.rounds == rounds else 0
            rounds = self._bulletin.rounds
            silent_s = silent_ticks * BEAT_S
            known = self._bulletin.verdict
            found = known or self._problem_of_others() or self._problem_of_store(silent_s)
            found = found or self._problem_here(ticks * BEAT_S)
            if found is not None:
                self._decide(found)
        self._end_if_hung()

    def _problem_of_store(self, silent_s: float) -> Verdict | None:
        where = "the process that holds it (rank 0, or torchrun's agent)"
        if self._bulletin.lost:
            return self._missing_soon() or Verdict(
                f"the store of the process group is gone, and with it {where}: "
                f"{self._bulletin.lost}{self._last_of(0)}"
            )
        if silent_s > SILENT_S:
            return Verdict(
                f"the store of the process group did not answer for {SILENT_S:.0f} s: {where} is "
                f"stopped or cut off{self._last_of(0)}"
            )
        return None

    def _problem_of_others(self) -> Verdict | None:
        if self._missing() is None:
            return None
        self._bulletin.refresh()  # whoever ended may have said why, just before
        return self._missing()

    def _missing(self) -> Verdict | None:
        """Return who is gone; that others were told to end is no news to one that was, too."""
        for other, rounds in list(self._bulletin.quiet.items()):
            beat = self._bulletin.seen.get(other)
            if beat is None or beat.closed or (beat.told and self._told):
                continue
            if is_gone(beat.process):
                how = "was told to end" if beat.told else "has ended"
                return Verdict(f"the process of rank {other} {how}{self._last_of(other)}")
            if rounds * BEAT_S > SILENT_S:
                return Verdict(
                    f"rank {other} showed no sign of life for {SILENT_S:.0f} s"
                    f"{self._last_of(other)}"
                )
        return None

    def _missing_soon(self) -> Verdict | None:
        """Look a little longer: a process ends its connections before it counts as ended."""
        until = time.monotonic() + BEAT_S
        while (found := self._missing()) is None and time.monotonic() < until:
            time.sleep(BEAT_S / 50)
        return found

    def _problem_here(self, lasted_s: float) -> Verdict | None:
        doing = self.doing
        if not doing.inside:
            return None
        seconds = time.monotonic() - doing.since
        if lasted_s <= doing.limit_s(self._stall_timeout_s):
            if doing.waiting and lasted_s > WARN_S:
                self._warn_of_wait(seconds)
            return None
        if not doing.waiting:
            text = f"rank {self.rank} hangs ({doing}) since {seconds:.0f} s, {self._place()}"
            return Verdict(text, stalled=True, hung=self.rank)
        other, whom = self._waits_for()
        text = f"rank {self.rank} ({doing}) has waited {seconds:.0f} s for others: {whom}"
        return Verdict(text, stalled=True, hung=other)

    def _warn_of_wait(self, seconds: float) -> None:
        if self._warned_of == self.doing.since:
            return
        self._bulletin.look_at(self._all_others)
        if len(self._bulletin.seen) < len(self._all_others) and seconds < 2 * WARN_S:
            return  # theirs are read within the next beats
        self._warned_of = self.doing.since
        logger.warning(
            "rank %d (%s) has waited %.0f s for others: %s",
            self.rank,
            self.doing,
            seconds,
            self._waits_for()[1],
        )

    def _waits_for(self) -> tuple[int, str]:
        """Return who most likely holds this rank up, and what is known of the first of them."""
        beats = dict(sorted(self._bulletin.seen.items()))
        busy = {other: beat for other, beat in beats.items() if not beat.waiting} or beats
        found = sorted(busy, key=lambda other: -busy[other].seconds)
        texts = [f"rank {o} has not started" for o in self._all_others if o not in beats][:3]
        texts += [f"rank {o} in {busy[o].text} since {busy[o].seconds:.0f} s" for o in found[:3]]
        return (found[0] if found else -1), "; ".join(texts)

    def _end_if_hung(self) -> None:
        """End the process if its main thread does not stop after the verdict."""
        until = time.monotonic() + REACT_S
        while time.monotonic() < until:
            if self._reacted or self._closing.wait(min(BEAT_S, REACT_S / 4)):
                return
        assert self.verdict is not None
        if self._reacted or not (self.doing.inside or self.verdict.hung == self.rank):
            return  # the caller will see at the next call
        still = f"rank {self.rank} is still in {self.doing}, {self._place()}"
        text = f"{self.verdict.text}; {REACT_S:.0f} s later {still}: its process ends here"
        record(StallError(text))
        end_process(text)

    # ---- what is said -------------------------------------------------------------------

    def _beat(self, count: int) -> Beat:
        doing = self.doing
        seconds = time.monotonic() - doing.since
        return Beat(count, str(doing), seconds, doing.waiting, own_process(), told=self._told)

    def _last_of(self, other: int) -> str:
        beat = self._bulletin.seen.get(other)
        return "" if beat is None else f"; rank {other} was last seen in: {beat.text}"

    def _last_words(self) -> str:
        """Return what is known when the process is ended from outside."""
        self._told = True
        until = time.monotonic() + WORDS_S
        verdict = self.verdict
        while verdict is None and time.monotonic() < until:
            self._bulletin.refresh()
            verdict = self._bulletin.verdict or self._problem_of_others()
        known = f": {verdict.text}" if verdict is not None else ""
        return f"rank {self.rank} was {self.doing} when it was told to end{known}"

    def _place(self) -> str:
        """Return where in the code the thread is that drives the executable."""
        frame: FrameType | None = sys._current_frames().get(self.doing.thread)
        if frame is None:
            return "at an unknown place"
        code = frame.f_code
        return f"at {code.co_filename}:{frame.f_lineno} ({code.co_name})"
