"""Seconds of a counted operation: the longer of ``work / rate`` and ``bytes / bandwidth``.

Source: Williams, Waterman, Patterson, Roofline, CACM 2009. A device that was measured in detail
gives, besides its two peaks, the rates that small products and single operations reach, and the
bandwidth by size (:class:`~ipu_pipeline.ir.machine.Device`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ipu_pipeline.ir.graph import DTYPE_BYTES, OpRecord
from ipu_pipeline.ir.machine import Device, on_curve

# They only name memory: nothing is read or written.
_FREE = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"})
_INDEX_BYTES = 8
# Adding a gradient to the accumulated one reads both and writes one.
_ACCUMULATING = 3


@dataclass(frozen=True)
class Roofline:
    """A device as peaks, refined by what was measured of it.

    Attributes:
        device: The device.
    """

    device: Device

    def seconds(self, operations: Iterable[OpRecord], more_bytes: int = 0) -> float:
        """Return the seconds of ``operations``; each occurrence moves ``more_bytes`` besides."""
        return sum(op.count * self._one(op, more_bytes) for op in operations)

    def accumulation_s(self, num_bytes: int) -> float:
        """Return the seconds of adding a gradient of ``num_bytes`` to the accumulated one."""
        return _ACCUMULATING * num_bytes / self.device.memory_bytes_per_s

    def _one(self, op: OpRecord, more_bytes: int) -> float:
        short = op.name.split(".")[-1]
        if short in _FREE:
            return 0.0
        moved = moved_bytes(op) + more_bytes
        moving_s = moved / self._bandwidth(moved, in_place=short.endswith("_"))
        work_s = self._work_s(op, short)
        if work_s and not op.flops and self.device.bytes_curve:
            # Its rate was measured in a cache: what is slower to reach comes on top.
            return self.device.op_overhead_s + self._missing_s(moved, moving_s, work_s)
        return self.device.op_overhead_s + max(work_s, moving_s)

    def _missing_s(self, moved: int, moving_s: float, work_s: float) -> float:
        near_s = moved / max(rate for _, rate in self.device.bytes_curve)
        return max(work_s, near_s) + max(0.0, moving_s - near_s)

    def _work_s(self, op: OpRecord, short: str) -> float:
        rate = self.device.op_rates.get(short)
        if not op.flops:
            elements = max((prod(shape) for shape in op.shapes), default=0)
            return elements / rate if rate else 0.0
        peak = self.device.peak_flops_per_s(op.dtype)
        float32 = self.device.peak_flops_per_s("float32")
        if rate:
            peak *= rate / float32
        elif self.device.product_curve:
            peak *= on_curve(self.device.product_curve, op.flops) / float32
        return op.flops / peak

    def _bandwidth(self, num_bytes: int, *, in_place: bool) -> float:
        plain = self.device.memory_bytes_per_s
        if not self.device.bytes_curve:
            return plain
        found = on_curve(self.device.bytes_curve, num_bytes)
        return max(found, plain) if in_place else found  # its pages are there already


def moved_bytes(op: OpRecord) -> int:
    """Return the bytes that ``op`` moves: a lookup reads the rows it wants, not the table."""
    if op.kind != "gather" or len(op.shapes) < 2:
        return op.bytes_moved
    table = int(prod(op.shapes[0]) * DTYPE_BYTES.get(op.dtype, 4))
    indices = _INDEX_BYTES * sum(prod(shape) for shape in op.shapes[1:])
    found = max(0, op.bytes_moved - table - indices)
    return min(op.bytes_moved, 2 * found + indices)
