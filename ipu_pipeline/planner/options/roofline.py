"""Seconds of a counted operation: the longer of ``work / rate`` and ``bytes / bandwidth``.

Source: Williams, Waterman, Patterson, Roofline, CACM 2009. A device that was measured in detail
gives, besides its two peaks, the rates that small products and single operations reach, and the
bandwidth by size (:class:`~ipu_pipeline.ir.machine.Device`). A GPU reaches a share of its peaks:
of products by the lengths of their sides, of attention as one kernel that computes no masked half.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ipu_pipeline.ir.attention import is_attention, visible_share
from ipu_pipeline.ir.graph import DTYPE_BYTES, OpRecord
from ipu_pipeline.ir.machine import Device, KernelRates, on_curve

# They only name memory: nothing is read or written.
_FREE = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"})
# The loss of a token picks one logit; its gradient is written, not read.
_PICKED = {"nll_loss_forward": 0.0, "nll_loss_backward": 0.5}
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
        return _ACCUMULATING * num_bytes / self.bytes_per_s

    @property
    def bytes_per_s(self) -> float:
        """Memory bandwidth that large operations reach."""
        kernels = self.device.kernels
        return self.device.memory_bytes_per_s * (
            1.0 if kernels is None else kernels.bandwidth_share
        )

    def _one(self, op: OpRecord, more_bytes: int) -> float:
        short = op.name.split(".")[-1]
        if short in _FREE:
            return 0.0
        moved = moved_bytes(op) + more_bytes
        if self.device.kernels is not None:
            work_s = self._kernel_s(op, self.device.kernels) if op.flops else 0.0
            share = _PICKED.get(short, 1.0)  # of the logits
            return self.device.op_overhead_s + max(work_s, share * moved / self.bytes_per_s)
        moving_s = moved / self._bandwidth(moved, in_place=short.endswith("_"))
        work_s = self._work_s(op, short)
        if work_s and not op.flops and self.device.bytes_curve:
            # Its rate was measured in a cache: what is slower to reach comes on top.
            return self.device.op_overhead_s + self._missing_s(moved, moving_s, work_s)
        return self.device.op_overhead_s + max(work_s, moving_s)

    def _kernel_s(self, op: OpRecord, kernels: KernelRates) -> float:
        peak = self.device.peak_flops_per_s(op.dtype)
        if is_attention(op):
            share = kernels.attention_share[op.name.endswith("_backward")]
            return op.flops * visible_share(op) / (peak * share)
        efficiency = kernels.product_efficiency(op.dtype, product_sides(op))
        return op.flops / (peak * efficiency) if efficiency else 0.0  # nothing is multiplied

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


def product_sides(op: OpRecord) -> tuple[float, ...]:
    """Return the three sides of a matrix product; of a grouped one, those of one group's.

    Other operations with FLOPs (a convolution) are taken as one large product: no sides.
    """
    matrices = [shape for shape in op.shapes if len(shape) >= 2]
    if len(matrices) < 2:
        return ()
    first, second = matrices[-2:]
    if "grouped" in op.name:
        groups = first[0] if len(first) == 3 else 1
        rows = second[-2] / groups
        return (rows, *first[-2:]) if len(first) == 3 else (rows, first[-1], second[-1])
    if first[-1] != second[-2]:
        return ()
    return (*first[-2:], second[-1])


def moved_bytes(op: OpRecord) -> int:
    """Return the bytes that ``op`` moves: a lookup reads the rows it wants, not the table."""
    if op.kind != "gather" or len(op.shapes) < 2:
        return op.bytes_moved
    table = int(prod(op.shapes[0]) * DTYPE_BYTES.get(op.dtype, 4))
    indices = _INDEX_BYTES * sum(prod(shape) for shape in op.shapes[1:])
    found = max(0, op.bytes_moved - table - indices)
    return min(op.bytes_moved, 2 * found + indices)
