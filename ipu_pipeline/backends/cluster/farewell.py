"""What is said when this process is ended from outside: torchrun stops the ranks that are left.

Its agent sees a process end within a tenth of a second and ends the others, long before they
can find out by themselves. So they say at that moment what they know.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
FLUSH_S = 1.0


def say_when_terminated(words: Callable[[], str]) -> Callable[[], None]:
    """Print ``words()`` when torchrun's agent ends this process; return what undoes that.

    Signal handlers of the caller's are left alone, and so is a process not started by torchrun.
    """
    ours = threading.current_thread() is threading.main_thread()
    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not (ours and free and ERROR_FILE in os.environ):
        return lambda: None
    process = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == process:  # and not a forked worker that loads data
            say(words())
        os.kill(os.getpid(), number)

    def undo() -> None:
        mine = signal.getsignal(signal.SIGTERM) is handle
        if mine and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    return undo


def record(error: BaseException) -> None:
    """Let torchrun's summary of the failure show ``error``, unless it shows another already."""
    path = os.environ.get(ERROR_FILE)
    if not path or Path(path).exists():
        return
    try:
        raise error  # what is written is the error being handled
    except BaseException:
        with contextlib.suppress(OSError):  # it is said elsewhere as well
            ErrorHandler().record_exception(error)


_stuck: list[threading.Thread] = []


def end_at_exit(thread: threading.Thread) -> None:
    """Skip the interpreter's clean-up if ``thread`` still waits in torch when this process exits.

    Destroying what it waits in would abort the process, after all messages, with a signal instead
    of exit code 1.
    """
    _stuck.append(thread)


# Registered at import, so that it runs after what others register later.
@atexit.register
def _end_if_stuck() -> None:
    if any(thread.is_alive() for thread in _stuck):
        _flush_in_time()
        os._exit(1)


def end_process(text: str) -> None:
    """Say ``text`` and end this process at once, with exit code 1, whatever hangs in it."""
    say(text)
    _flush_in_time()
    os._exit(1)


def say(text: str) -> None:
    """Write a line to standard error without any lock that a hung thread could hold."""
    os.write(2, f"{text}\n".encode())


def _flush_in_time() -> None:
    # Whoever hangs may hold the lock of a stream.
    flusher = threading.Thread(target=_flush, daemon=True)
    flusher.start()
    flusher.join(FLUSH_S)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
