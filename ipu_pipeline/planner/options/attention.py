"""Attention with dropout as stages of this project run it: one operation, not ten.

A graph says what the model computes: two products and what happens to the L x S weights between
them, each of which a roofline would send through memory. Our stages run all of it in tiles that
stay in a cache, and a second time in the backward pass (``ops/attention.py``).

Axes: B batch, H heads, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from ipu_pipeline.ir.graph import Block, OpRecord

FORWARD = "attention_counter"
BACKWARD = "attention_counter_backward"
Operations = tuple[OpRecord, ...]
Shape = tuple[int, ...]


def as_one_operation(block: Block) -> tuple[Operations, Operations]:
    """Return forward and backward operations with each such attention as one, of all its FLOPs."""
    forward, backward = block.forward_ops, block.backward_ops
    for weights in _weights(forward):
        forward = _joined(forward, weights, FORWARD)
        backward = _joined(backward, weights, BACKWARD)
    return forward, backward


def _weights(operations: Operations) -> list[Shape]:
    """Shapes (B, H, L, S) of the weights of attention whose dropout is ours."""
    shapes = {op.shapes[0] for op in operations if op.name.endswith("._safe_softmax")}
    dropped = {op.shapes[0] for op in operations if op.name.endswith(".bernoulli_")}
    return [s for s in shapes & dropped if len(s) == 4 and not _has_bias(operations, s)]


def _has_bias(operations: Operations, weights: Shape) -> bool:
    """Whether a mask differs by head: a learned bias, whose gradient only torch's path gives."""
    return any(
        op.name.endswith(".add") and op.shapes[:1] == (weights,) and _per_head(op.shapes[1:])
        for op in operations
    )


def _per_head(masks: Iterable[Shape]) -> bool:
    return any(len(mask) == 4 and mask[1] > 1 for mask in masks)


def _joined(operations: Operations, weights: Shape, name: str) -> Operations:
    parts = [op for op in operations if _is_part(op, weights)]
    flops = sum(op.flops * op.count for op in parts)
    if not flops:
        return operations
    size = prod(weights)
    # Queries, keys, values and results: what the products move besides the weights.
    moved = sum(max(0, op.bytes_moved - 4 * size) * op.count for op in parts if op.flops)
    whole = OpRecord(f"ipu_pipeline.{name}", "matmul", parts[0].dtype, (weights,), flops, moved)
    return (*(op for op in operations if op not in parts), whole)


def _is_part(op: OpRecord, weights: Shape) -> bool:
    batch, heads, length, keys = weights
    flat = (batch * heads, length, keys)
    turned = (batch * heads, keys, length)
    if not op.flops:
        return bool(op.shapes) and op.shapes[0] in (weights, flat)
    if op.name.split(".")[-1] != "bmm":
        return False
    left, right = op.shapes
    return any(s in (flat, turned) for s in (left, right, (left[0], left[1], right[2])))
