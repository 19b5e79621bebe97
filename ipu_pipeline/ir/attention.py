"""Attention as one operation, and the operations it consists of where no kernel fuses it.

A captured graph has one record per attention, whatever kernel a device would pick; the name says
what a kernel has to support: ``scaled_dot_product_attention``, then ``_bias`` when the mask wants
a gradient, ``_dropout`` when weights are dropped, and ``_backward``. Its shapes are queries, keys,
values and, if there is one, the mask (after the gradient of the result in the backward pass). A
mask that lets every query see only the ``W`` keys before it is recorded as (L, W).
A device without such a kernel (an IPU; a CPU for a learned bias) runs :func:`unfused`.

Axes: B batch and heads, L queries, S keys, E head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import prod

from ipu_pipeline.ir.graph import DTYPE_BYTES, OpKind, OpRecord

ATTENTION = "scaled_dot_product_attention"
Shape = tuple[int, ...]


def attention_name(*, bias: bool, dropout: bool, backward: bool = False) -> str:
    """Return the name of an attention operation, without its namespace."""
    parts = ((bias, "_bias"), (dropout, "_dropout"), (backward, "_backward"))
    return ATTENTION + "".join(part for present, part in parts if present)


def is_attention(op: OpRecord) -> bool:
    """Whether ``op`` is a whole attention."""
    return op.name.startswith(f"aten.{ATTENTION}")


def visible_share(op: OpRecord) -> float:
    """Share of the (L, S) weights that the mask of an attention leaves.

    One square for all samples is causal. A kernel that fuses attention computes no others.
    """
    given = op.shapes[1:] if op.name.endswith("_backward") else op.shapes
    length, keys = given[0][-2], given[1][-2]
    if len(given) < 4 or len(given[3]) != 2 or given[3][0] != length or length != keys:
        return 1.0
    window = given[3][1]
    return 0.5 if window == keys else (window - window * (window - 1) / (2 * keys)) / keys


def unfused(operations: Iterable[OpRecord]) -> Iterator[OpRecord]:
    """Yield ``operations`` with every attention as the operations that it consists of."""
    for op in operations:
        if is_attention(op):
            yield from _parts(op)
        else:
            yield op


def unfused_saved_bytes(operations: Iterable[OpRecord]) -> int:
    """Bytes that unfused attention keeps for the backward pass beyond those of the fused one.

    The softmax and, with dropout, the mask of kept weights and what is left of them; keys and
    values repeated for each head of queries; not the logsumexp and the additive mask. The
    operations are those of the forward pass of a block.
    """
    return sum(op.count * _more_saved_bytes(op) for op in operations if is_attention(op))


def weights_bytes(op: OpRecord) -> int:
    """Bytes of the (B, L, S) weights of one attention."""
    query, key, *_ = _tensors(op)
    return _bytes(op, (*query[:-1], key[-2]))


def _more_saved_bytes(op: OpRecord) -> int:
    query, key, value, mask = _tensors(op)
    heads = prod(query[:-2])
    repeated = sum((heads - prod(x[:-2])) * prod(x[-2:]) for x in (key, value))
    kept = weights_bytes(op) * (3 if "_dropout" in op.name else 1) + _bytes(op, (repeated,))
    added = _bytes(op, mask) if mask is not None and "_bias" not in op.name else 0
    return kept - _bytes(op, query[:-1]) - added


def _tensors(op: OpRecord) -> tuple[Shape, Shape, Shape, Shape | None]:
    given = op.shapes[1:] if op.name.endswith("_backward") else op.shapes
    mask = given[3] if len(given) > 3 else None
    if mask is not None and len(mask) == 2 and mask[0] == given[0][-2]:
        mask = (mask[0], given[1][-2])
    return given[0], given[1], given[2], mask


def _bytes(op: OpRecord, shape: Shape) -> int:
    return int(prod(shape) * DTYPE_BYTES.get(op.dtype, 4))


@lru_cache(maxsize=4096)
def _parts(op: OpRecord) -> tuple[OpRecord, ...]:
    parts = _backward(op) if op.name.endswith("_backward") else _forward(op)
    return tuple(parts)


def _forward(op: OpRecord) -> Iterator[OpRecord]:
    """Torch's ``_scaled_dot_product_attention_math``: both factors scaled, products, softmax."""
    query, key, value, mask = _tensors(op)
    leading, length, keys = query[:-2], query[-2], key[-2]
    turned, given = (*leading, query[-1], keys), (*leading, keys, value[-1])
    weights, out = (*leading, length, keys), (*leading, length, value[-1])
    yield _record(op, "mul", "vector", (query,), query)
    yield _record(op, "mul", "vector", (turned,), turned)
    if prod(leading[:-1]) > 1:  # heads of several samples become one batch of matrices
        for shape in (query, turned, given):
            yield _record(op, "clone", "copy", (shape,), shape)
    yield _product(op, query, turned)
    if mask is not None:
        yield _record(op, "add", "vector", (weights, mask), weights)
    yield _record(op, "_safe_softmax", "softmax", (weights,), weights)
    if "_dropout" in op.name:
        yield _record(op, "bernoulli_", "random", (weights,), weights)
        yield _record(op, "div_", "vector", (weights,), weights)
        yield _record(op, "mul", "vector", (weights, weights), weights)
    yield _product(op, weights, given)
    yield _moved(op, out)


def _backward(op: OpRecord) -> Iterator[OpRecord]:
    query, key, value, mask = _tensors(op)
    leading, length, keys = query[:-2], query[-2], key[-2]
    turned = (*leading, query[-1], keys)
    weights, out = (*leading, length, keys), (*leading, length, value[-1])
    if prod(leading[:-1]) > 1:
        yield _record(op, "clone", "copy", (out,), out)
    yield _product(op, (*leading, keys, length), out)
    yield _product(op, out, (*leading, value[-1], keys))
    if "_dropout" in op.name:
        yield _record(op, "mul", "vector", (weights, weights), weights)
    yield _record(op, "_softmax_backward_data", "softmax", (weights, weights), weights)
    if mask is not None and "_bias" in op.name and prod(mask) < prod(weights):
        yield _record(op, "sum", "vector", (weights,), mask)
    yield _product(op, weights, (*leading, keys, query[-1]))
    yield _product(op, (*leading, query[-1], length), weights)
    for shape in (turned, query):
        yield _record(op, "mul", "vector", (shape,), shape)
    for shape in (query, key, value):
        yield _moved(op, (*leading, *shape[-2:]))


def _product(op: OpRecord, left: Shape, right: Shape) -> OpRecord:
    """A product of one matrix per head."""
    heads = prod(left[:-2])
    flat = (heads, *left[-2:]), (heads, *right[-2:])
    flops = 2 * heads * left[-2] * left[-1] * right[-1]
    return _record(op, "bmm", "matmul", flat, (heads, left[-2], right[-1]), flops)


def _moved(op: OpRecord, shape: Shape) -> OpRecord:
    """Heads, stored one after another, become parts of rows again."""
    rows = (*shape[:-3], shape[-2], shape[-3], shape[-1]) if len(shape) > 3 else shape
    return _record(op, "clone", "copy", (rows,), rows)


def _record(
    op: OpRecord, name: str, kind: OpKind, shapes: tuple[Shape, ...], out: Shape, flops: int = 0
) -> OpRecord:
    moved = sum(_bytes(op, shape) for shape in (*shapes, out))
    return OpRecord(f"aten.{name}", kind, op.dtype, shapes, flops, moved, op.count)
