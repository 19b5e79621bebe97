"""Measures the memory of this process: bytes it has allocated, and resident pages.

``run_child`` starts a module of the benchmarks in a fresh process with ``heap_peak.c`` loaded in
front of glibc; inside, :class:`Probe` reads its counters.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_SOURCE = Path(__file__).with_name("heap_peak.c")
_RESET_PEAK = "5"  # Linux, Documentation/filesystems/proc.rst: resets VmHWM


@dataclass(frozen=True)
class Usage:
    """Bytes above the state at the start of a :class:`Probe`.

    Attributes:
        heap_peak: Most bytes allocated at one time.
        heap_after: Bytes still allocated at the end.
        resident_peak: Most resident bytes at one time.
    """

    heap_peak: int
    heap_after: int
    resident_peak: int


class Probe:
    """Measures what happens between its creation and :meth:`stop`.

    Args:
        trim: First give freed memory back to the system, so that resident growth starts at 0.
    """

    def __init__(self, *, trim: bool = True) -> None:
        self._libc = ctypes.CDLL(None)
        for name in ("heap_live_bytes", "heap_peak_bytes"):
            getattr(self._libc, name).restype = ctypes.c_long
        if trim:
            self._libc.malloc_trim(0)
        reset_peak()
        self._resident = resident_bytes("VmRSS")
        self._libc.heap_reset_peak()
        self._live = int(self._libc.heap_live_bytes())

    def stop(self) -> Usage:
        """Return the growth since the start."""
        return Usage(
            int(self._libc.heap_peak_bytes()) - self._live,
            int(self._libc.heap_live_bytes()) - self._live,
            resident_bytes("VmHWM") - self._resident,
        )


def resident_bytes(which: str) -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {which}; this measurement needs Linux")


def reset_peak() -> None:
    """Start measuring ``VmHWM`` anew."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")


def run_child(
    module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``python -m module arguments`` and return the JSON object on its last line."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "heap_peak.so"
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-fno-builtin", str(_SOURCE), "-o", str(library)],
            check=True,
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            env={**os.environ, "LD_PRELOAD": str(library), **(environment or {})},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
