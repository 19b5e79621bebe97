"""One stream of messages out of those of many processes.

The first rank's messages (its standard error) pass through as they are. Of the others a line is
shown only if it says something new: no progress bars, of a traceback its last line only, and
nothing that the first rank, or another one, has said already. Everything stays in their files.
"""

from __future__ import annotations

import codecs
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# The first rank may say the same a little later; so long the others' lines wait for it.
PATIENCE_S = 2.0
POLL_S = 0.1
# torch puts the rank before every line of a traceback.
_RANK = re.compile(r"^\[rank\d+\]: ?")
_CHAINED = ("The above exception was", "During handling of the above")
_TRACEBACK = "Traceback (most recent call last)"


class Merger:
    """Decides what is shown of what the ranks write. Not thread-safe.

    Args:
        write: Shows text.
        patience_s: Seconds that lines of other ranks wait for the first rank to say the same.
    """

    def __init__(self, write: Callable[[str], None], patience_s: float = PATIENCE_S) -> None:
        self._write = write
        self._patience_s = patience_s
        self._unfinished: dict[int, str] = {}
        self._in_traceback: set[int] = set()
        self._waiting: list[tuple[float, int, str]] = []
        self._said: set[str] = set()
        self._last: dict[int, str] = {}

    def take(self, rank: int, text: str, now_s: float) -> None:
        """Take what ``rank`` has just written, whole lines or parts of them."""
        if rank == 0:
            self._write(text)
        *lines, self._unfinished[rank] = (self._unfinished.get(rank, "") + text).split("\n")
        for line in lines:
            self._take_line(rank, _RANK.sub("", line).rstrip(), now_s)

    def show_due(self, now_s: float) -> None:
        """Show what other ranks said long enough ago."""
        while self._waiting and self._waiting[0][0] <= now_s:
            _, rank, line = self._waiting.pop(0)
            if line not in self._said:
                self._said.add(line)
                self._write(f"[rank {rank}] {line}\n")

    def end(self, now_s: float) -> None:
        """Show everything that is left; the ranks have ended, and may be started again."""
        for rank, line in self._unfinished.items():
            if line:
                self._take_line(rank, _RANK.sub("", line).rstrip(), now_s)
        self._unfinished.clear()
        self._in_traceback.clear()
        self.show_due(now_s + self._patience_s)
        self._said.clear()

    def last_words(self, rank: int) -> str:
        """Return the last line of ``rank`` that begins a message, ``""`` if there is none."""
        return self._last.get(rank, "")

    def _take_line(self, rank: int, line: str, now_s: float) -> None:
        if not self._is_message(rank, line):
            return
        if not line.startswith((" ", "\t")):
            self._last[rank] = line
        if rank == 0:
            self._said.add(line)
        else:
            self._waiting.append((now_s + self._patience_s, rank, line))

    def _is_message(self, rank: int, line: str) -> bool:
        if line.startswith(_TRACEBACK):
            self._in_traceback.add(rank)
            return False
        if not line or "\r" in line or line.startswith(_CHAINED):
            return False
        if rank in self._in_traceback:
            if line.startswith((" ", "\t")):
                return False
            self._in_traceback.discard(rank)  # the line that names the exception
        return True


class Follower:
    """Reads the files that the ranks' messages go to while they grow, in a thread of its own.

    Args:
        merger: Gets what is read.
    """

    def __init__(self, merger: Merger) -> None:
        self._merger = merger
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, files: Mapping[int, Path]) -> None:
        """Read these files from now on, by rank; what was followed before has ended."""
        self.stop()
        self._stop.clear()
        self._thread = threading.Thread(
            target=self._run, args=(dict(files),), name="launch-messages", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Read to the end and stop; calling it again does nothing."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _run(self, files: Mapping[int, Path]) -> None:
        growing = {rank: _GrowingFile(path) for rank, path in sorted(files.items())}
        ending = False
        while not ending:
            ending = self._stop.wait(POLL_S)
            for rank, file in growing.items():
                text = file.read_more()
                if text:
                    self._merger.take(rank, text, time.monotonic())
            self._merger.show_due(time.monotonic())
        self._merger.end(time.monotonic())


class _GrowingFile:
    """A text file that another process is writing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def read_more(self) -> str:
        """Return what was added since the last call."""
        if not self._path.is_file():
            return ""
        with self._path.open("rb") as file:
            file.seek(self._position)
            added = file.read()
        self._position += len(added)
        return self._decoder.decode(added)
