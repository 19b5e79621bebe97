"""Notes that the processes leave for each other in the store of the process group.

All reading and writing is done by one thread: a store whose process is stopped never answers
(torch 2.13: no timeout ends a read), and neither the main thread nor the watch may wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed.distributed_c10d import Store

BEAT_S = 0.5
# So long a failure may take to reach the others before this process goes on to stop.
TELL_S = 5.0
_FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
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
    """A process's sign of life.

    Attributes:
        count: Of its beats so far.
        text: What it was doing.
        seconds: For how long.
        waiting: Whether it waited for others.
        process: Its process id, where that can be looked up.
        closed: It left when all was done.
        told: It was told to end, from outside.
    """

    count: int
    text: str
    seconds: float = 0.0
    waiting: bool = False
    process: tuple[str, int] = ("", 0)
    closed: bool = False
    told: bool = False


class Bulletin:
    """Beats of all processes, and the first failure.

    Args:
        store: Used by this object's thread only.
        rank: Of this process.
        watched: Ranks whose beats are read.
        beat: Makes this process's beat of a given count.

    Attributes:
        verdict: The first failure, once it is known here.
        lost: Why the store cannot be used any more.
        rounds: How often notes were exchanged so far.
        seen: Last beat of other ranks.
        quiet: Number of rounds since it changed.
    """

    def __init__(
        self, store: Store, rank: int, watched: Iterable[int], beat: Callable[[int], Beat]
    ) -> None:
        self.verdict: Verdict | None = None
        self.lost = ""
        self.rounds = 0
        self.seen: dict[int, Beat] = {}
        self.quiet: dict[int, int] = {}
        self._store = store
        self._rank = rank
        self._watched = tuple(watched)
        self._beat = beat
        self._told: Verdict | None = None
        self._known = threading.Event()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="rank-notes", daemon=True)
        self._thread.start()

    def tell(self, verdict: Verdict) -> Verdict:
        """Note a failure for everybody to find; return the first one, perhaps another rank's."""
        self._told = self._told or verdict
        self._wake.set()
        if self._thread.is_alive():
            self._known.wait(TELL_S)
        return self.verdict or verdict

    def look_at(self, ranks: Iterable[int]) -> None:
        """Read the beats of more ranks from now on."""
        self._watched = tuple(dict.fromkeys((*self._watched, *ranks)))

    def refresh(self) -> None:
        """Exchange notes now, if the store answers soon."""
        goal, until = self.rounds + 2, time.monotonic() + BEAT_S  # one round may be under way
        while self.rounds < goal and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.01)

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
            if self._told is not None and self.verdict is None:
                self._exchange()
            self._write(Beat(0, "nothing: it has closed its executable", closed=True))
        except RuntimeError as error:
            self.lost = str(error).splitlines()[0]
        self._known.set()

    def _exchange(self) -> None:
        if self.verdict is None:
            if self._told is not None:
                text = json.dumps(asdict(self._told))
                self._found(self._store.compare_set(_FAILED, "", text) or text.encode())
            elif self._store.check([_FAILED]):
                self._found(self._store.get(_FAILED))
        self._write(self._beat(self.rounds))
        for other in self._watched:
            beat = self._read(other)
            changed = beat is not None and beat != self.seen.get(other)
            self.quiet[other] = 0 if changed else self.quiet.get(other, 0) + 1
            if beat is not None:
                self.seen[other] = beat
        self.rounds += 1

    def _found(self, text: bytes) -> None:
        self.verdict = Verdict(**json.loads(text))
        self._known.set()

    def _write(self, beat: Beat) -> None:
        self._store.set(f"alive/{self._rank}", json.dumps(asdict(beat)))

    def _read(self, other: int) -> Beat | None:
        key = f"alive/{other}"
        if not self._store.check([key]):
            return None
        found = json.loads(self._store.get(key))
        return Beat(**{**found, "process": tuple(found["process"])})


@functools.cache
def own_process() -> tuple[str, int]:
    """Return a name of what this process's id means something in, and the id."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}", os.getpid()
    except OSError:  # not Linux
        return "", 0


def is_gone(process: tuple[str, int]) -> bool:
    """Whether a process has ended; False for one that cannot be looked up from here."""
    place, number = process
    if not place or place != own_process()[0]:
        return False
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX"
    return not Path(f"/proc/{number}").exists()
