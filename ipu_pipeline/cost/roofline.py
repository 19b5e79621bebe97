"""Seconds of a counted operation: the longer of ``flops / peak`` and ``bytes / bandwidth``.

Source: Williams, Waterman, Patterson, Roofline, CACM 2009.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ipu_pipeline.ir.graph import OpRecord
from ipu_pipeline.ir.machine import Device


@dataclass(frozen=True)
class Roofline:
    """A device as two peaks.

    Attributes:
        device: The device.
        dtype: Compute dtype whose peak is used; ``None`` takes each operation's own.
    """

    device: Device
    dtype: str | None = None

    def seconds(self, operations: Iterable[OpRecord], more_bytes: int = 0) -> float:
        """Return the seconds of ``operations``; each occurrence moves ``more_bytes`` besides."""
        return sum(
            op.count
            * max(
                op.flops / self.device.peak_flops_per_s(self.dtype or op.dtype),
                (op.bytes_moved + more_bytes) / self.device.memory_bytes_per_s,
            )
            for op in operations
        )
