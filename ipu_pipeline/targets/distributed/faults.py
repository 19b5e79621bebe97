"""One rank that raises, dies or hangs stops all ranks, and every one of them says who it was.

Every process shows a sign of life in the store of the process group and looks for a note that
another one has failed. A thread does this, because the main thread may be waiting for a rank that
is gone; it then gives up waiting (``waiting.py``).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from torch.distributed.distributed_c10d import Store

from ipu_pipeline.errors import PipelineError, StageError, StallError
from ipu_pipeline.targets.distributed.pipeline import Doing

BEAT_S = 0.5
# A process that shows no sign of life for so long is gone.
SILENT_S = 20.0
# After a broken connection, wait so long for whoever knows why.
VERDICT_S = SILENT_S + 5.0
_FAILED = "failed"
_CLOSED = "closed"


class Watch:
    """Watches the other processes, and tells them when this one fails.

    Args:
        store: Where the processes leave notes for each other; used by this object only.
        rank: Of this process.
        world_size: How many there are.
        doing: What this process is doing.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        doing: Doing,
    ) -> None:
        self.rank = rank
        self.doing = doing
        self.verdict: str | None = None
        self._store = store
        # The first looks after all others, those after the first.
        self._others = [r for r in range(world_size) if r != rank and 0 in (r, rank)]
        self._seen: dict[int, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._decided = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="rank-watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def guarding(self, what: str, step: int) -> Iterator[None]:
        """Turn a failure inside into one that all ranks report alike.

        Raises:
            StageError: This rank or another one failed.
        """
        self._refuse_after_failure()
        self.doing.step = step
        self.doing.what, self.doing.stage = what, None
        try:
            yield
        except BaseException as error:
            raise self._explained(error) from error
        finally:
            self.doing.what = "nothing"

    def leave_with(self, error: BaseException) -> None:
        """Tell the others that this process stops because of ``error``, raised by the caller."""
        if self.verdict is None:
            what = f"{type(error).__name__}: {error}"
            self._decide(f"rank {self.rank} left after step {self.doing.step}: {what}")

    def close(self) -> None:
        """Stop watching and being watched; calling it again does nothing."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        with contextlib.suppress(RuntimeError):  # the store may be gone with its process
            self._store.set(f"alive/{self.rank}", _CLOSED)

    def _refuse_after_failure(self) -> None:
        if self.verdict is not None:
            raise StageError(
                f"this executable cannot run after a failure ({self.verdict}); start the "
                "processes again and load the last checkpoint"
            )

    def _explained(self, error: BaseException) -> BaseException:
        """Return what to raise for ``error``; the other ranks are told."""
        refused = isinstance(error, PipelineError) and self.doing.stage is None
        if refused or getattr(error, "raised_on_all_ranks", False):
            return error  # every rank raises the same thing, nothing is left half done
        lost = self.doing.stage is None and isinstance(error, RuntimeError)
        if lost and self._decided.wait(VERDICT_S):
            return StageError(f"{self.verdict}; rank {self.rank} was {self.doing} and stopped")
        cause = error.__cause__ if self.doing.stage is not None and error.__cause__ else error
        what = f"{type(cause).__name__}: {cause}"
        text = f"rank {self.rank} failed ({self.doing}): {what}"
        if self.verdict is None:
            self._decide(text)
        if not isinstance(error, Exception):
            return error
        return (StallError if lost else StageError)(text)

    def _decide(self, text: str) -> None:
        """Note the first failure for everybody to find."""
        with contextlib.suppress(RuntimeError):  # the store may be gone with its process
            text = self._store.compare_set(_FAILED, "", text).decode() or text
        self._conclude(text)

    def _conclude(self, text: str) -> None:
        self.verdict = self.verdict or text
        self._decided.set()
        self._stop.set()

    def _serve(self) -> None:
        beats = 0
        while not self._stop.wait(BEAT_S):
            beats += 1
            try:
                self._store.set(f"alive/{self.rank}", f"{beats} {self.doing}")
                if self._store.check([_FAILED]):
                    self._conclude(self._store.get(_FAILED).decode())
                    return
                silent = self._silent_rank()
            except RuntimeError as error:
                if not self._stop.is_set():
                    self._conclude(
                        "the store of the process group is gone, and with it the process that "
                        f"held it (rank 0, or torchrun's agent): {str(error).splitlines()[0]}"
                    )
                return
            if silent is not None:
                last = self._seen[silent][0].partition(" ")[2]
                self._decide(
                    f"rank {silent} showed no sign of life for {SILENT_S:.0f} s; last seen in: "
                    f"{last}"
                )
                return

    def _silent_rank(self) -> int | None:
        now = time.monotonic()
        for other in self._others:
            key = f"alive/{other}"
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            if beat != self._seen.get(other, ("", 0.0))[0] or other not in self._seen:
                self._seen[other] = (beat, now)
            elif beat == _CLOSED:
                continue
            elif now - self._seen[other][1] > SILENT_S:
                return other
        return None
