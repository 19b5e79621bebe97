"""Timers and tensor queries of an executor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .errors import createPoptorchError
from .structure import leaves

_NAMES = ("input", "input_complete", "output", "output_complete")


class PerfCounters:
    """When inputs and outputs of the last call passed, on the host's clock."""

    _program: Any
    _options: Any

    def __init__(self) -> None:
        self._counters: dict[str, list[list[float]]] = {name: [[]] for name in _NAMES}
        self._cycles = 0
        self.compile_seconds = 0.0

    def note_call(self, started: float, ended: float, inputs: Any, outputs: Any) -> None:
        """Store the times of a call, in seconds."""
        num_inputs = sum(isinstance(value, Tensor) for value in leaves(inputs))
        num_outputs = sum(isinstance(value, Tensor) for value in leaves(outputs))
        for name in _NAMES:
            is_input = name.startswith("input")
            count = num_inputs if is_input else num_outputs
            self._counters[name] = [[started if is_input else ended] for _ in range(count)]
        self._cycles = int((ended - started) * 1.33e9)

    def getPerfCounters(self) -> dict[str, list[list[float]]]:
        """Return the times of the last call for each tensor, in seconds."""
        return {name: [list(row) for row in rows] for name, rows in self._counters.items()}

    def getLatency(self) -> tuple[float, float, float]:
        """Return the least, greatest and mean time from input to output, in seconds."""
        return self._between("input", "output_complete")

    def getHostIpuLatency(self) -> tuple[float, float, float]:
        """Return the times that inputs took, in seconds."""
        return self._between("input", "input_complete")

    def getComputeLatency(self) -> tuple[float, float, float]:
        """Return the times of computation, in seconds."""
        return self._between("input_complete", "output")

    def getIpuHostLatency(self) -> tuple[float, float, float]:
        """Return the times that outputs took, in seconds."""
        return self._between("output", "output_complete")

    def _between(self, first: str, last: str) -> tuple[float, float, float]:
        starts = [value for row in self._counters[first] for value in row]
        ends = [value for row in self._counters[last] for value in row]
        if not starts or not ends:
            return (0.0, 0.0, 0.0)
        took = max(ends) - min(starts)
        return (took, took, took)

    def cycleCount(self) -> int:
        """Return the cycles of the last call at 1.33 GHz; the stand-in's are the host's time.

        Raises:
            Error: Not compiled, or ``Options.logCycleCount`` is off.
        """
        if self._program is None:
            raise createPoptorchError("cycleCount(): the model has not been compiled yet")
        if not self._options.log_cycle_count:
            raise createPoptorchError("cycleCount() needs Options.logCycleCount(True)")
        return self._cycles

    def compilationTime(self) -> float:
        """Return the seconds that compilation took.

        Raises:
            Error: Not compiled, or the progress bar is off.
        """
        if self._program is None or not self._options.show_compilation_progress_bar:
            raise createPoptorchError(
                "compilationTime() needs a compiled model and showCompilationProgressBar(True)"
            )
        return self.compile_seconds
