"""Tables: the matrix that a lookup reads rows of, or that an output projection multiplies with.

A block's table is its parameter with the most rows among the 2-D parameters that it looks up in
or that it multiplies with transposed (as ``embedding`` and ``linear`` do). Tables of a vocabulary
are what serialization is about: the gradient of a lookup and the result of a projection are as
large as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord, ParameterSpec

LARGE_ROWS = 4096
TALL = 4  # rows over columns from which a matrix is a table, not a layer's weight


@dataclass(frozen=True)
class Table:
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


def table_of(graph: BlockGraph, block: Block) -> Table | None:
    """Return the table of ``block``; ``None`` where it neither looks up nor projects."""
    found = []
    for fqn in block.parameters:
        parameter = graph.parameter_by_fqn[fqn]
        use = _use(parameter, block)
        if use is not None:
            rows, width = parameter.shape
            found.append(Table(fqn, rows, width, use, parameter.num_bytes, parameter.trainable))
    return max(found, key=lambda table: table.rows, default=None)


def looked_up(block: Block, table: Table) -> int:
    """Rows of ``table`` that one microbatch looks up, repeats included."""
    return sum(
        op.count * prod(op.shapes[1])
        for op in block.forward_ops
        if _is_lookup(op, (table.rows, table.width)) and len(op.shapes) > 1
    )


def products_with(operations: Sequence[OpRecord], table: Table) -> tuple[OpRecord, ...]:
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
