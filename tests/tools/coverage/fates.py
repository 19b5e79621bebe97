"""Stand-ins for the check of a class, for processes that start with this module."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from tools.coverage.classes import ModelClass
from tools.coverage.record import Record, Result


def fate(item: ModelClass, say: Callable[[Result], None]) -> Record:
    """End as the name of the class says."""
    say("eager-fails" if "Eager" in item.name else "crash")
    if "Dies" in item.name:
        os._exit(7)
    if "Hangs" in item.name:
        time.sleep(600)
    if "Starves" in item.name:
        return _starved(item)
    return Record(item.name, item.architecture, item.task, "pass", f"process {os.getpid()}")


def _starved(item: ModelClass) -> Record:
    try:
        bytearray(50 * 10**9)
    except MemoryError:
        return Record(item.name, item.architecture, item.task, "step-fails", "no memory")
    return Record(item.name, item.architecture, item.task, "pass", str(Path.cwd()))
