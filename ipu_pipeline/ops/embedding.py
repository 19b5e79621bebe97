"""Embedding lookups whose backward pass makes no table of zeros.

Torch's own backward of a lookup writes a dense gradient as large as the table, whatever the
number of ids. :func:`fast_embedding` adds the rows that were looked up to a dense ``.grad`` that is
already there (within :func:`ipu_pipeline.ops.linear.adding_to_grad`); the serialized lookup returns
a sparse gradient that holds them.

Axes: V rows of the table, H hidden size, N ids looked up, U different ids among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.dropout import FLOATS
from ipu_pipeline.ops.linear import is_plain

# Smaller tables, and those of fewer rows than so many for each id, gain nothing.
_LEAST_ELEMENTS = 1 << 20
_LEAST_ROWS_PER_ID = 4


def fast_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001 (torch's name; it belongs to max_norm)
    scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002
    sparse: bool = False,  # noqa: FBT001, FBT002
) -> Tensor | None:
    """Compute ``torch.nn.functional.embedding``; the bits of its gradient are torch's.

    Args:
        input: Ids, int64 or int32, any shape.
        weight: The table ``(V, H)``.
        padding_idx: The row that gets no gradient; negative from the end.
        max_norm: Left to torch.
        norm_type: Belongs to ``max_norm``.
        scale_grad_by_freq: Left to torch.
        sparse: Left to torch.

    Returns:
        The rows; None for what torch computes as fast: small or frozen tables, other types and
        devices, and everything where the kernels are missing.
    """
    if type(input) is not Tensor or weight.dim() != 2 or not is_plain(weight):
        return None
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return None
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    rows = weight.shape[0]
    if weight.numel() < _LEAST_ELEMENTS or rows < _LEAST_ROWS_PER_ID * input.numel():
        return None
    if padding_idx is not None and not -rows <= padding_idx < rows:
        return None  # torch says what is wrong
    if not _has_kernel(weight):
        return None
    padding_id = -1 if padding_idx is None else padding_idx % rows
    looked_up: Tensor = torch.ops.ipu_pipeline.embedding(input, weight, padding_id)
    return looked_up


class _Lookup(NamedTuple):
    """What a lookup does besides reading rows.

    Attributes:
        first: First id that is looked up.
        last: One past the last id that is looked up; other ids give zeros.
        offset: Id of the table's row 0.
        padding_id: This id's row gets no gradient; -1 for none.
        by_frequency: A row's gradient is divided by the number of times it was looked up.
        split: The table is a part of a larger one, so other ids are allowed.
    """

    first: int
    last: int
    offset: int
    padding_id: int
    by_frequency: bool
    split: bool


def embedding_serialized(
    ids: Tensor,
    weight_VH: Tensor,
    *,
    factor: int,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Look ``ids`` up in ``factor`` slices of the table's rows.

    A lookup reads only the rows asked for, so on a CPU the slices come out of one pass: the
    result is the same for every ``factor``. The gradient of ``weight_VH`` is a coalesced sparse
    COO tensor with at most N rows; repeated ids are summed in their order, in at least float32.

    Args:
        ids: Ids to look up, int64 or int32, any shape.
        weight_VH: The table; the whole of it, or only the rows that ``rows`` names.
        factor: Number of slices, 1 to V; the last one may be shorter.
        padding_idx: The row of ``weight_VH`` that gets no gradient; negative from the end.
        scale_grad_by_freq: Divide a row's gradient by the number of times its id occurs.
        rows: Ids ``(first, last)`` of a table that is split over devices, ``last`` excluded: an
            id outside gives zeros. With it, ``padding_idx`` is an id too and may lie outside.

    Returns:
        The rows, of shape ``ids.shape + (H,)`` and the dtype of ``weight_VH``.

    Raises:
        ValueError: ``factor``, ``padding_idx`` or ``rows`` does not fit the table.
        IndexError: An id is outside of the table and ``rows`` is not given.
    """
    num_rows = weight_VH.shape[0]
    if not 1 <= factor <= num_rows:
        raise ValueError(
            f"factor is {factor} for a table of {num_rows} rows; use a factor from 1 to {num_rows}"
        )
    first, last, offset = (0, num_rows, 0) if rows is None else _range_of(rows, num_rows)
    if padding_idx is not None and (rows is None or padding_idx < 0):
        padding_idx = _padding_id(padding_idx, num_rows, split=rows is not None)
    return _EmbeddingSerialized.apply(
        ids,
        weight_VH,
        _Lookup(
            first=first,
            last=last,
            offset=offset,
            padding_id=-1 if padding_idx is None else padding_idx,
            by_frequency=scale_grad_by_freq,
            split=rows is not None,
        ),
    )


def _range_of(rows: tuple[int, int], num_rows: int) -> tuple[int, int, int]:
    """Return the first id, the last one, excluded, and the id of the table's row 0."""
    first, last = rows
    is_part = last - first == num_rows
    if first < 0 or last <= first or not (is_part or last <= num_rows):
        raise ValueError(
            f"rows is {rows} for a table of {num_rows} rows; name a range inside of it, "
            f"or the {num_rows} ids of a larger table that it holds"
        )
    return first, last, first if is_part else 0


def _padding_id(padding_idx: int, num_rows: int, *, split: bool) -> int:
    if split:
        raise ValueError(
            f"padding_idx is {padding_idx} together with rows; give it as an id, 0 or more"
        )
    if not -num_rows <= padding_idx < num_rows:
        raise ValueError(
            f"padding_idx is {padding_idx} for a table of {num_rows} rows; "
            f"use one from {-num_rows} to {num_rows - 1}"
        )
    return padding_idx % num_rows


class _EmbeddingSerialized(torch.autograd.Function):
    """The lookup; for the backward pass it keeps the ids only."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VH: Tensor, lookup: _Lookup) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.lookup = lookup
        ctx.shape = weight_VH.shape
        flat_N = ids.reshape(-1)
        return _rows_of(flat_N, weight_VH, lookup).reshape(*ids.shape, weight_VH.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        grad_NH = grad.reshape(-1, ctx.shape[1])
        rows_U, values_UH = _summed_by_row(ids.reshape(-1), grad_NH, ctx.lookup)
        gradient = torch.sparse_coo_tensor(
            rows_U[None], values_UH, tuple(ctx.shape), is_coalesced=True, check_invariants=False
        )
        return None, gradient, None


def _rows_of(ids_N: Tensor, weight_VH: Tensor, lookup: _Lookup) -> Tensor:
    if weight_VH.is_contiguous() and _has_kernel(weight_VH):
        return torch.ops.ipu_pipeline.embedding_serialized(
            ids_N, weight_VH, lookup.first, lookup.last, lookup.offset, lookup.split
        )
    if not lookup.split:
        return weight_VH.index_select(0, ids_N)
    inside_N = (ids_N >= lookup.first) & (ids_N < lookup.last)
    found_NH = weight_VH.index_select(0, torch.where(inside_N, ids_N - lookup.offset, 0))
    return torch.where(inside_N[:, None], found_NH, 0)


def _summed_by_row(ids_N: Tensor, grad_NH: Tensor, lookup: _Lookup) -> tuple[Tensor, Tensor]:
    """Return the table's rows that get a gradient, ascending, and the gradient of each."""
    if _has_kernel(grad_NH):
        return torch.ops.ipu_pipeline.embedding_serialized_backward(grad_NH, ids_N, *lookup[:-1])
    counted_N = (ids_N >= lookup.first) & (ids_N < lookup.last) & (ids_N != lookup.padding_id)
    positions = counted_N.nonzero().squeeze(1)
    rows_U, slot, count_U = (ids_N[positions].long() - lookup.offset).unique(
        return_inverse=True, return_counts=True
    )
    accumulated = torch.promote_types(grad_NH.dtype, torch.float32)
    values_UH = grad_NH.new_zeros(len(rows_U), grad_NH.shape[1], dtype=accumulated)
    values_UH.index_add_(0, slot, grad_NH[positions].to(accumulated))
    if lookup.by_frequency:
        values_UH /= count_U[:, None]
    return rows_U, values_UH.to(grad_NH.dtype)


def _has_kernel(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS and _kernels(tensor)


def _fake_backward(grad: Tensor, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    rows_U = ids.new_empty(num_rows, dtype=torch.int64)
    return rows_U, grad.new_empty(num_rows, grad.shape[1])


_kernels = extension.kernels(
    embedding_serialized=lambda ids, weight, *_: weight.new_empty(ids.numel(), weight.shape[1]),
    embedding_serialized_backward=_fake_backward,
)
