"""The worker process under the SDK's Python, as the process that trains sees it.

One socket for commands, one mapping per direction for tensors; the worker's output goes to the
log, line by line. It has no time limit: a compilation may take an hour. It ends with this process.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ipu_pipeline.backends.ipu.runtime.messages import Channel, MessageError, SharedTensors
from ipu_pipeline.backends.ipu.sdk_python import SdkPython
from ipu_pipeline.errors import LoweringError, StageError

logger = logging.getLogger(__name__)
# The folder first, and never the current one: its names must not hide the SDK's.
_START = (
    "import sys; sys.path[:] = [sys.argv[1]] + [p for p in sys.path if p]; "
    "from runtime.serve import main; main()"
)
_LAST_LINES = 15
# For a process that was told to end, or has closed its socket.
_END_S = 20.0


class Worker:
    """Starts the worker and hands it commands.

    Args:
        python: What runs it.
        folder: The bundle.

    Attributes:
        versions: Of what stands there: python, torch, transformers, poptorch.

    Raises:
        LoweringError: It has no poptorch, or cannot read the bundle.
        StageError: It died while it started.
    """

    def __init__(self, python: SdkPython, folder: Path) -> None:
        self._name = f"the worker under {python.path}"
        self._dead = ""
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        ours, theirs = socket.socketpair()
        outgoing, incoming = (os.memfd_create(name) for name in ("to_worker", "from_worker"))
        self._files: tuple[int, ...] = (outgoing, incoming)
        self._channel = Channel(ours, SharedTensors(outgoing), SharedTensors(incoming))
        with theirs:
            self._start(python, folder, (theirs.fileno(), incoming, outgoing))
        logger.info("started %s", self._name)
        try:
            self.versions = self._answer("start")
        except BaseException:
            self.end()
            raise
        if python.stand_in:
            logger.warning("the stand-in takes the place of poptorch: no IPU is used")
        logger.info("the worker has %s",
                    ", ".join(f"{name} {v}" for name, v in self.versions.items()))  # fmt: skip

    def call(self, command: str, **values: Any) -> dict[str, Any]:
        """Hand in one command and wait for its result, however long that takes.

        Tensors in the result are views of the shared mapping, valid until the next call.

        Raises:
            LoweringError: The worker refuses it.
            StageError: It failed there, or the worker is dead.
        """
        if self._dead:
            raise StageError(self._dead)
        try:
            self._channel.send(command, values)
        except MessageError as error:
            raise LoweringError(str(error)) from error
        except OSError as error:
            raise self._died(command) from error
        except BaseException:
            self._interrupted(command)
            raise
        return self._answer(command)

    def pages(self, command: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors of a command that answers in parts."""
        page = 0
        while tensors := self.call(command, page=page)["tensors"]:
            yield from tensors.items()
            page += 1

    @property
    def is_dead(self) -> bool:
        """Whether somebody was told that it is."""
        return bool(self._dead)

    def end(self) -> None:
        """Close the socket, which ends the worker, and free what belongs to it."""
        self._dead = self._dead or f"{self._name} is closed"
        self._channel.close()
        self._wait()
        self._reader.join(_END_S)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()
        for file in self._files:
            os.close(file)
        self._files = ()

    def _start(self, python: SdkPython, folder: Path, files: tuple[int, int, int]) -> None:
        numbers = [str(file) for file in (*files, os.getpid())]
        self._process = subprocess.Popen(
            [python.path, "-u", "-c", _START, str(folder), *numbers, python.stand_in],
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is this process's to handle
        )
        self._name += f" (process {self._process.pid})"
        # Not a method: the thread must not keep a worker that everybody else has dropped.
        self._reader = threading.Thread(
            target=_relay, args=(self._process.stdout, self._lines), daemon=True
        )
        self._reader.start()

    def _answer(self, command: str) -> dict[str, Any]:
        try:
            kind, values = self._channel.receive()
        except (EOFError, OSError) as error:
            raise self._died(command) from error
        except BaseException:
            self._interrupted(command)
            raise
        if kind == "refused":
            raise LoweringError(values["message"])
        if kind == "failed":
            raise StageError(
                f"{command!r} failed in {self._name}: {values['message']}\n{values['trace']}"
            )
        return values

    def _interrupted(self, command: str) -> None:
        """End what would answer a question that nobody waits for."""
        self._dead = f"{self._name} was ended: {command!r} was interrupted; compile the model again"
        self._process.kill()

    def _died(self, command: str) -> StageError:
        self._wait()
        self._reader.join(_END_S)
        said = "\n".join(f"  {line}" for line in self._lines) or "  (nothing)"
        self._dead = (
            f"{self._name} died {_how(self._process.returncode)} in the command {command!r}. The "
            "model here has the weights that were fetched last; compile it again, and load the "
            f"last checkpoint where there is one. The last lines of the worker:\n{said}"
        )
        return StageError(self._dead)

    def _wait(self) -> None:
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _relay(output: Any, lines: deque[str]) -> None:
    for line in output:
        if text := line.rstrip():
            lines.append(text)
            logger.info("worker: %s", text)


def _how(code: int) -> str:
    if code >= 0:
        return f"with exit status {code}"
    try:
        return f"by signal {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
