"""The grouped product of a mixture of experts, on tensors without values.

Every row meets the weights of the one expert it was sent to. torch computes it in any dtype on a
device but takes only bfloat16 on tensors without data, and how the rows are divided is a value.
What it costs does not depend on that: as many multiplications as rows, and it keeps the rows.

Axes: S rows (tokens x experts of each), E experts, K and N sizes in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, autograd

from ipu_pipeline.capture.patches import GROUPED, patched_grouped
from ipu_pipeline.ir.graph import OpRecord

if TYPE_CHECKING:
    from ipu_pipeline.capture.operations import Recorder


def grouped_without_values(recorder: Recorder | None = None) -> AbstractContextManager[None]:
    """Let ``functional.grouped_mm`` compute nothing; each is one operation of ``recorder``."""

    def grouped(rows: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
        if rows.ndim != 2 or weights.ndim != 3:
            return GROUPED(rows, weights, *args, **kwargs)
        return _Grouped.apply(recorder, rows, weights)

    return patched_grouped(grouped)


class _Grouped(autograd.Function):
    """Makes and keeps the tensors of a grouped product."""

    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder | None, rows_SK: Tensor, weights_EKN: Tensor
    ) -> Tensor:
        ctx.recorder = recorder
        ctx.save_for_backward(rows_SK, weights_EKN)
        size = len(rows_SK), weights_EKN.shape[-1]
        return _made(recorder, lambda: rows_SK.new_zeros(size), weights_EKN, rows_SK)

    @staticmethod
    def backward(ctx: Any, grad_SN: Tensor) -> tuple[Tensor | None, ...]:
        rows_SK, weights_EKN = ctx.saved_tensors
        recorder, (_, of_rows, of_weights) = ctx.recorder, ctx.needs_input_grad
        rows = weights = None
        if of_rows:
            rows = _made(recorder, lambda: rows_SK.new_zeros(rows_SK.shape), weights_EKN, grad_SN)
        if of_weights:
            like = weights_EKN.transpose(-2, -1) if _is_transposed(weights_EKN) else weights_EKN
            weights = _made(recorder, lambda: like.new_zeros(like.shape), rows_SK, grad_SN)
            weights = weights.transpose(-2, -1) if like is not weights_EKN else weights
        return None, rows, weights


def _is_transposed(weights: Tensor) -> bool:
    return weights.stride(-2) == 1 and weights.shape[-2] > 1


def _made(
    recorder: Recorder | None, make: Callable[[], Tensor], first: Tensor, second: Tensor
) -> Tensor:
    """Make the result of one product and count it."""
    with recorder.unrecorded() if recorder is not None else nullcontext():
        made = make()
    if recorder is not None:
        recorder.follow((first, second), (made,))
        tensors = (first, second, made)
        num_rows = len(second)
        *_, inner, outer = next((x for x in tensors if x.ndim == 3), made).shape
        recorder.record(
            OpRecord(
                name="aten._grouped_mm",
                kind="matmul",
                dtype=str(made.dtype).removeprefix("torch."),
                shapes=(tuple(first.shape), tuple(second.shape)),
                flops=2 * num_rows * inner * outer,
                bytes_moved=sum(_touched(x, num_rows) * x.element_size() for x in tensors),
            )
        )
    return made


def _touched(tensor: Tensor, num_rows: int) -> int:
    """Elements that are read or written: of experts without rows, none."""
    share = min(1.0, num_rows / len(tensor)) if tensor.ndim == 3 else 1.0
    return int(tensor.numel() * share)
