"""Tables: the matrix that a lookup reads rows of, or that an output projection multiplies with.

A block's table is its parameter with the most rows among the 2-D parameters that it looks up in
or multiplies with transposed (as ``embedding`` and ``linear`` do). And which output projection
feeds the loss alone, so that the two can run fused, without full logits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from ipu_pipeline.ir.graph import (
    Block,
    BlockGraph,
    OpRecord,
    ParameterSpec,
    TensorSpec,
    tensor_bytes,
)

LARGE_ROWS = 4096
TALL = 4  # rows over columns from which a matrix is a table, not a layer's weight


@dataclass(frozen=True)
class VocabularyTable:
    """The table of a block.

    Attributes:
        parameter: Its first name.
        rows: Entries, such as the size of the vocabulary.
        width: Numbers in a row.
        use: Whether the block looks rows up or multiplies with all of them.
        num_bytes: Size, which is also that of a dense gradient.
        trainable: Whether it gets a gradient.
    """

    parameter: str
    rows: int
    width: int
    use: Literal["lookup", "projection"]
    num_bytes: int
    trainable: bool

    @property
    def is_large(self) -> bool:
        """Whether it is worth slicing (``table_rows``)."""
        return table_rows([(self.rows, self.width)]) > 0


def table_rows(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the rows of the tall matrix among parameter ``shapes``: a table; 0 for none."""
    tall = [shape for shape in shapes if len(shape) == 2 and shape[0] >= TALL * shape[1]]
    rows = max((shape[0] for shape in tall), default=0)
    return rows if rows >= LARGE_ROWS else 0


def table_of(graph: BlockGraph, block: Block) -> VocabularyTable | None:
    """Return the table of ``block``; ``None`` where it neither looks up nor projects."""
    found = []
    for fqn in block.parameters:
        parameter = graph.parameter_by_fqn[fqn]
        use = _use(parameter, block)
        if use is not None:
            rows, width = parameter.shape
            found.append(
                VocabularyTable(fqn, rows, width, use, parameter.num_bytes, parameter.trainable)
            )
    # Of equal ones that which is trained: PEFT keeps the frozen original beside its copy.
    return max(found, key=lambda table: (table.rows, table.trainable), default=None)


def looked_up(block: Block, table: VocabularyTable) -> int:
    """Rows of ``table`` that one microbatch looks up, repeats included."""
    return sum(
        op.count * prod(op.shapes[1])
        for op in block.forward_ops
        if _is_lookup(op, (table.rows, table.width)) and len(op.shapes) > 1
    )


def products_with(operations: Sequence[OpRecord], table: VocabularyTable) -> tuple[OpRecord, ...]:
    """Return the matrix products among ``operations`` that have a side of the table's rows."""
    return tuple(
        op for op in operations
        if op.kind == "matmul" and any(table.rows in shape for shape in op.shapes)
    )  # fmt: skip


def _use(parameter: ParameterSpec, block: Block) -> Literal["lookup", "projection"] | None:
    if len(parameter.shape) != 2:
        return None
    shape = (parameter.shape[0], parameter.shape[1])
    if any(_is_lookup(op, shape) for op in block.forward_ops):
        return "lookup"
    matrices = [op for op in block.forward_ops if op.kind == "matmul"]
    return "projection" if any(shape[::-1] in op.shapes for op in matrices) else None


def _is_lookup(op: OpRecord, shape: tuple[int, int]) -> bool:
    return op.kind == "gather" and "embedding" in op.name and op.shapes[:1] == (shape,)


# What the fused operation can do to logits on the way: nothing, scale them, add a bias, cap them.
_FUSIBLE = ("_unsafe_view", "view", "reshape", "mul", "div", "add", "tanh")


@dataclass(frozen=True)
class FusedHead:
    """A projection and the loss that is the only reader of its result.

    Attributes:
        head: Block of the projection.
        loss: Block of the loss.
        table: Table of the projection.
        logits: The tensor between them, last axis the table's rows.
    """

    head: Block
    loss: Block
    table: VocabularyTable
    logits: TensorSpec

    @property
    def saved_logits_bytes(self) -> int:
        """Bytes of the head's saved tensors that are as large as the logits: what a cap keeps."""
        caps = (
            op.count * tensor_bytes(op.shapes[0], op.dtype)
            for op in self.head.forward_ops
            if op.name.split(".")[-1] == "tanh" and op.shapes[0][-1:] == (self.table.rows,)
        )
        return min(self.head.saved_bytes, sum(caps))

    @property
    def tokens(self) -> int:
        """Rows of the logits of one microbatch."""
        return prod(self.logits.shape[:-1])


def fused_heads(
    graph: BlockGraph, named: Collection[str] = (), *, in_parts: bool = False
) -> tuple[FusedHead, ...]:
    """Return the projections with a large table (or of a ``named`` block) that can be fused.

    The graph must be one for training; the loss must be the only reader of the projection's
    result, which is no result of the model; between the product and the softmax over the table's
    rows there may be copies, changes of shape, scaling, a bias and a cap, but nothing else.
    ``in_parts``: A loss over parts of the rows may also have the ``logsumexp`` of all (a z-loss).
    """
    if not graph.training:
        return ()
    found = []
    for loss in graph.blocks:
        if loss.kind != "loss" and loss.name != "loss":
            continue
        for name in loss.inputs:
            pair = _pair(graph, loss, graph.tensor_by_name[name])
            if pair is None or (_has_logsumexp(pair) and not in_parts):
                continue
            if pair.table.is_large or pair.head.name in named:
                found.append(pair)
    return tuple(found)


def unfused_heads(
    graph: BlockGraph, stage_of: Mapping[str, int], named: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the projections of :func:`fused_heads` whose loss is in another stage."""
    return tuple(
        pair.head.name
        for pair in fused_heads(graph, named)
        if stage_of[pair.head.name] != stage_of[pair.loss.name]
    )


def is_end(graph: BlockGraph, block: Block) -> bool:
    """Whether ``block`` needs every other block, so that any split has it in the last stage."""
    producers = {tensor.name: tensor.producer for tensor in graph.tensors}
    needed, pending = {block.name}, [block]
    while pending:
        for name in pending.pop().inputs:
            producer = producers[name]
            if producer is not None and producer not in needed:
                needed.add(producer)
                pending.append(graph[producer])
    return len(needed) == len(graph.blocks)


def _pair(graph: BlockGraph, loss: Block, logits: TensorSpec) -> FusedHead | None:
    if logits.producer is None or logits.name in graph.results:
        return None
    head = graph[logits.producer]
    table = table_of(graph, head)
    if table is None or table.use != "projection" or logits.consumers != (loss.name,):
        return None
    rows = table.rows
    if logits.shape[-1:] != (rows,) or not _has_softmax(loss, rows) or not _fusible(head, rows):
        return None
    return FusedHead(head, loss, table, logits)


def _has_softmax(loss: Block, rows: int) -> bool:
    return any(
        op.kind == "softmax" and op.shapes and op.shapes[0][-1:] == (rows,)
        for op in loss.forward_ops
    )


def _has_logsumexp(pair: FusedHead) -> bool:
    return any(
        "logsumexp" in op.name and (pair.table.rows,) == op.shapes[0][-1:]
        for op in pair.loss.forward_ops
    )


def _fusible(head: Block, rows: int) -> bool:
    """Whether the fused operation can do all that the head does to the logits."""
    return all(
        op.kind in ("matmul", "copy") or op.name.split(".")[-1] in _FUSIBLE
        for op in head.forward_ops
        if any(shape[-1:] == (rows,) for shape in op.shapes if len(shape) > 1)
    )
