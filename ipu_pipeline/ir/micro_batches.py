"""A captured graph for another micro batch, from those of two: every size is a line in it.

Sizes, FLOPs and bytes of all operations grow by as much with every sample, so two captures give
those of any further one without running the model again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord, TensorSpec

_Named = TypeVar("_Named", TensorSpec, OpRecord)
_COUNTS = ("saved_bytes", "kept_bytes", "workspace_bytes")


def extrapolated(first: BlockGraph, second: BlockGraph, micro_batch: int) -> BlockGraph | None:
    """Return the graph of a micro batch; ``None`` where the two differ in more than sizes.

    Args:
        first: Captured for some micro batch.
        second: The same model, captured for another one.
        micro_batch: Samples of the graph that is returned.
    """
    low, high = first.micro_batch_size, second.micro_batch_size
    if low == high or not _alike(first, second):
        return None

    def line(one: int, other: int) -> int:
        return max(0, one + (other - one) * (micro_batch - low) // (high - low))

    def shaped(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(line, one, other))

    def operation(one: OpRecord, other: OpRecord) -> OpRecord:
        return replace(
            one,
            shapes=tuple(map(shaped, one.shapes, other.shapes)),
            flops=line(one.flops, other.flops),
            bytes_moved=line(one.bytes_moved, other.bytes_moved),
        )

    known: dict[tuple[int, int], tuple[OpRecord, ...]] = {}

    def operations(one: tuple[OpRecord, ...], other: tuple[OpRecord, ...]) -> tuple[OpRecord, ...]:
        key = (id(one), id(other))  # equal layers share theirs
        if key not in known:
            known[key] = tuple(map(operation, one, other))
        return known[key]

    def block(one: Block, other: Block) -> Block:
        counts: dict[str, Any] = {
            name: line(getattr(one, name), getattr(other, name)) for name in _COUNTS
        }
        return replace(
            one,
            forward_ops=operations(one.forward_ops, other.forward_ops),
            backward_ops=operations(one.backward_ops, other.backward_ops),
            **counts,
        )

    def tensor(one: TensorSpec, other: TensorSpec) -> TensorSpec:
        return replace(one, shape=shaped(one.shape, other.shape))

    return replace(
        first,
        blocks=tuple(map(block, first.blocks, second.blocks)),
        tensors=tuple(map(tensor, first.tensors, second.tensors)),
        inputs=tuple(map(tensor, first.inputs, second.inputs)),
    )


def _alike(first: BlockGraph, second: BlockGraph) -> bool:
    """Whether two graphs have the same blocks, tensors and operations, up to sizes."""
    same: set[tuple[int, int]] = set()
    for one, other in zip(first.blocks, second.blocks, strict=False):
        for name in ("forward_ops", "backward_ops"):
            own, others = getattr(one, name), getattr(other, name)
            if (id(own), id(others)) not in same and list(map(_form, own)) != list(
                map(_form, others)
            ):
                return False
            same.add((id(own), id(others)))
    outlines = [
        [(b.name, b.kind, b.parameters, b.inputs, b.outputs) for b in graph.blocks]
        + [(t.name, len(t.shape), t.dtype, t.producer, t.consumers)
           for t in (*graph.tensors, *graph.inputs)]
        for graph in (first, second)
    ]  # fmt: skip
    return outlines[0] == outlines[1]


def _form(op: OpRecord) -> tuple[object, ...]:
    return op.name, op.dtype, op.count, [len(shape) for shape in op.shapes]
