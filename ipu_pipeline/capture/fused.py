"""Attention and grouped products, each counted as one operation, whatever kernel a device has.

A fused kernel of attention keeps queries, keys, values, the result and one logsumexp per query.
torch picks it by device, dtype and arguments, and runs ten operations with L x S tensors where it
finds none (on ``meta`` always): then the counts of one model would depend on where it was captured.

Axes: B batch and heads, L queries, S keys, E head size.

In a grouped product, that of a mixture of experts, every row meets the weights of the one expert it
was sent to. torch computes it in any dtype on a device but takes only bfloat16 on tensors without
data, and how the rows are divided is a value. What it costs does not depend on that: as many
multiplications as rows, and it keeps the rows. Axes: S rows (tokens x experts of each), E experts,
K and N sizes in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import inf, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, autograd, nn
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.patches import GROUPED, SDPA, patched_attention, patched_grouped
from ipu_pipeline.ir.attention import attention_name
from ipu_pipeline.ir.graph import OpRecord
from ipu_pipeline.ops.autocast import autocast_dtype

if TYPE_CHECKING:
    from ipu_pipeline.capture.recorder import Recorder


class ReplacedAttention(TorchFunctionMode):
    """Within it, ``scaled_dot_product_attention`` is another function of the same arguments.

    Calls by torch's own Python code (``multi_head_attention_forward``), which a function mode does
    not see, are found by a patch of the function.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = attend
        self._patched = patched_attention(attend)

    def __enter__(self) -> Any:
        self._patched.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patched.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = self._function if func is SDPA else func
        return function(*args, **(kwargs or {}))


class CountedAttention(ReplacedAttention):
    """Within it, ``scaled_dot_product_attention`` is one operation of ``recorder``.

    Args:
        recorder: Where it counts.
        window: Keys that a query sees under a mask; ``None``: the mask decides.
    """

    def __init__(self, recorder: Recorder, window: int | None = None) -> None:
        super().__init__(self._attend)
        self._recorder = recorder
        self._window = window

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002
        scale: float | None = None,  # noqa: ARG002
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        dtype = None if self._recorder.only_meta else autocast_dtype(query.device)
        if dtype is not None:
            query, key, value = (x.to(dtype) for x in (query, key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -inf).to(query.dtype)
        leading = query.shape[:-2]
        if not enable_gqa:
            leading = torch.broadcast_shapes(leading, key.shape[:-2], value.shape[:-2])
        bias = attn_mask is not None and attn_mask.requires_grad
        square = attn_mask is not None and query.shape[-2] == key.shape[-2]
        window = self._window if square and not bias else None
        call = _Call(self._recorder, leading, bias, dropout_p > 0, is_causal, window)
        return _Attention.apply(call, query, key, value, attn_mask)


def attention_window(module: nn.Module) -> int | None:
    """Return how many keys a query of a block's causal attention sees, by transformers' names."""
    for child in module.modules():
        number, config = getattr(child, "layer_idx", None), getattr(child, "config", None)
        if number is None or config is None:
            continue
        if getattr(config, "is_heterogeneous", False):  # then only a layer's own may be read
            config = config.per_layer_config[number]
        kinds = getattr(config, "layer_types", None) or ()
        sliding = number >= len(kinds) or kinds[number] == "sliding_attention"
        found = getattr(child, "sliding_window", getattr(config, "sliding_window", None))
        causal = getattr(child, "is_causal", True) is not False
        return found if sliding and causal and isinstance(found, int) else None
    return None


@dataclass(frozen=True)
class _Call:
    """What one attention is, besides its tensors."""

    recorder: Recorder
    leading: tuple[int, ...]
    bias: bool
    dropout: bool
    causal: bool
    window: int | None = None

    def count(
        self, tensors: Sequence[Tensor], *others: Tensor, gradient: Tensor | None = None
    ) -> None:
        """Count a pass over queries, keys, values, perhaps a mask, and what else it moves.

        The backward pass (of ``gradient``) computes the products with keys again, before its four
        others.
        """
        query, key, value, *masks = tensors
        backward = gradient is not None
        length, keys = query.shape[-2], key.shape[-2]
        matrix = prod(self.leading) * length * keys
        sizes = (3, 2) if backward else (1, 1)
        flops = 2 * matrix * (sizes[0] * query.shape[-1] + sizes[1] * value.shape[-1])
        shapes = [(*self.leading, *query.shape[-2:]), *(tuple(x.shape) for x in tensors[1:])]
        if self.causal and not masks:
            shapes.append((length, keys))
        if self.window is not None and self.window < keys:
            shapes[3] = (length, self.window)
        if gradient is not None:
            shapes.insert(0, tuple(gradient.shape))
            others = (*others, gradient)
        name = attention_name(bias=self.bias, dropout=self.dropout, backward=backward)
        self.recorder.record(
            OpRecord(
                name=f"aten.{name}",
                kind="matmul",
                dtype=str(query.dtype).removeprefix("torch."),
                shapes=tuple(shapes),
                flops=flops,
                bytes_moved=sum(x.numel() * x.element_size() for x in (*tensors, *others)),
            )
        )


class _Attention(torch.autograd.Function):
    """Makes and keeps the tensors of a fused kernel; computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        with call.recorder.unrecorded():
            out = _rows_first(query, (*call.leading, query.shape[-2], value.shape[-1]))
            sums = query.new_empty((*call.leading, query.shape[-2]), dtype=torch.float32)
        ctx.call = call
        ctx.save_for_backward(query, key, value, mask, out, sums)
        masks = [] if mask is None else [mask]
        call.count([query, key, value, *masks], out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, sums = ctx.saved_tensors
        call: _Call = ctx.call
        masks = [] if mask is None else [mask]
        with call.recorder.unrecorded():
            grads = [_rows_first(x, tuple(x.shape)) for x in (query, key, value)]
            bias = torch.empty_like(mask) if mask is not None and call.bias else None
        made = grads if bias is None else [*grads, bias]
        call.count([query, key, value, *masks], out, sums, *made, gradient=grad)
        return (None, *grads, bias)


def _rows_first(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Make a tensor (B, H, L, E) that is stored as (B, L, H, E), as kernels do."""
    if len(shape) < 4:
        return like.new_empty(shape)
    *batch, heads, length, width = shape
    return like.new_empty((*batch, length, heads, width)).transpose(-2, -3)


# ---- the grouped product of a mixture of experts ----------------------------------------------


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
