"""Every test of this folder runs with the stand-in as ``poptorch``."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ipu_pipeline_emulator as standin
from ipu_pipeline.backends.ipu.runtime.messages import Channel, SharedTensors
from ipu_pipeline.backends.ipu.runtime.serve import Server
from ipu_pipeline.backends.ipu.sdk_python import VARIABLE
from ipu_pipeline.backends.ipu.worker import Worker


class _Thread:
    """Stands for the process of a worker: the same server behind the same socket, here."""

    returncode = 0
    stdout = io.StringIO()

    def __init__(self, folder: Path, files: tuple[int, int, int], poptorch: Any) -> None:
        own = [os.dup(file) for file in files]
        channel = Channel(
            socket.socket(fileno=own[0]), SharedTensors(own[1]), SharedTensors(own[2])
        )
        self.server = Server(folder, channel, poptorch)
        self._files = own[1:]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.server.run()
        for file in self._files:
            os.close(file)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the server has read the end of its socket."""
        self._thread.join(timeout)


@pytest.fixture
def poptorch(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Put the stand-in in the place of ``poptorch``, and workers into threads of this process."""
    with standin.install() as module:

        def start(worker: Any, _python: Any, folder: Path, files: tuple[int, int, int]) -> None:
            worker._process = _Thread(folder, files, module)
            worker._reader = worker._process._thread

        monkeypatch.setattr(Worker, "_start", start)
        monkeypatch.setenv(VARIABLE, "--emulate")
        yield module
