"""Cycles of one captured operation on one IPU, and seconds of a block's two passes.

The captured operations are PyTorch's in float32; the device runs in the precision of the
settings, and some of them do not exist there: views and empty buffers cost nothing, and a dropout
is one pass that draws its mask (its captured division by the kept share is part of that pass).

The number of passes over the data is the algorithm's: a softmax finds the maximum, exponentiates
and sums, and divides; its gradient multiplies and sums, then combines; a normalisation finds the
moments, then scales. Every pass starts a program step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from ipu_pipeline.backends.ipu.prices.chip import WORKERS_PER_TILE, Chip
from ipu_pipeline.backends.ipu.prices.matmul import (
    ACCESS_BYTES,
    MatmulPlan,
    Product,
    access_waste,
    plan_matmul,
)
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.ir.attention import unfused
from ipu_pipeline.ir.graph import DTYPE_BYTES, Block, BlockGraph, OpRecord
from ipu_pipeline.planner.options.tables import table_of, table_rows
from ipu_pipeline.planner.options.vocabulary_shares import share_of, shares

_FREE = frozenset({
    "empty_like", "empty", "ones_like", "zeros_like", "full_like", "_unsafe_view", "scalar_tensor",
    "div_", "zeros", "ones", "full", "new_zeros", "new_empty", "arange", "lift_fresh", "detach",
    "new_ones", "new_full", "empty_strided", "resize_",
})  # fmt: skip
_PASSES = (
    ("softmax_backward", 2), ("softmax", 3), ("norm_backward", 3), ("norm", 2),
    ("gelu_backward", 2), ("gelu", 2), ("tanh", 2), ("sigmoid", 2), ("exp", 2), ("silu", 2),
    ("pow", 2), ("log", 2),
)  # fmt: skip
_BY_ELEMENT = frozenset({"gather", "scatter", "scatter_add", "gather_backward", "take_along_dim"})
_LARGEST_DIVISOR = 64  # the largest that is worth proposing
SCAN_CYCLES = 6  # a tile compares every index with its slice of a table: load, compare, branch


@dataclass(frozen=True)
class OperationPricer:
    """What pricing an operation needs besides the operation.

    Attributes:
        chip: The IPU.
        precision: ``16.16``, ``16.32`` or ``32.32``.
        proportion: Available memory proportion of this IPU.
    """

    chip: Chip
    precision: str
    proportion: float

    @property
    def element_bytes(self) -> int:
        """Bytes of one float on the device."""
        return 4 if self.precision == "32.32" else 2

    def cycles(self, op: OpRecord, table_rows: int = 0, factor: int = 1) -> float:
        """Return the cycles of one occurrence of ``op``.

        Args:
            op: The operation.
            table_rows: Rows of the block's serialized table; 0 for none.
            factor: Slices in which an operation on that table runs.
        """
        return _cycles(op, self, table_rows, factor)

    def plan(self, product: Product) -> MatmulPlan:
        """Return the plan of one matrix product."""
        return plan_matmul(product, self.chip, self.precision, self.proportion)

    def vector_cycles(self, num_bytes: float, passes: float = 1) -> float:
        """Cycles of elementwise passes over ``num_bytes`` read and written in each."""
        rate = self.chip.tiles * self.chip.calibration.vector_bytes_per_cycle
        return passes * (num_bytes / rate + self.chip.calibration.launch_cycles)

    def moved_cycles(self, num_bytes: float) -> float:
        """Cycles of sending ``num_bytes`` to other tiles."""
        peak = self.chip.exchange_bytes_per_cycle * self.chip.calibration.exchange_share
        return num_bytes / (self.chip.tiles * peak) + self.chip.calibration.launch_cycles


@lru_cache(maxsize=200_000)
def _cycles(op: OpRecord, pricer: OperationPricer, table_rows: int, factor: int) -> float:
    short = op.name.split(".")[-1]
    if short in _FREE or (not op.flops and _is_scalar(op)):
        return 0.0
    if op.kind == "matmul":
        return sum(_product_cycles(p, pricer, table_rows, factor) for p in products(op))
    num_bytes = device_bytes(op, pricer.element_bytes)
    if op.kind in ("gather", "scatter"):
        return _lookup_cycles(op, pricer, table_rows, factor)
    if op.kind == "copy":
        return pricer.moved_cycles(num_bytes / 2 * _row_waste(op, pricer))
    if op.kind in ("softmax", "norm"):
        num_bytes *= _row_waste(op, pricer)
    passes = next((count for word, count in _PASSES if word in short), 1)
    return pricer.vector_cycles(num_bytes, passes)


def _row_waste(op: OpRecord, pricer: OperationPricer) -> float:
    row = op.shapes[0][-1] if op.shapes and op.shapes[0] else 1
    return access_waste(row, pricer.element_bytes)


def device_bytes(op: OpRecord, element_bytes: int) -> float:
    """Bytes that ``op`` reads and writes when its floats have ``element_bytes``."""
    return op.bytes_moved * element_bytes / DTYPE_BYTES.get(op.dtype, 4)


def products(op: OpRecord) -> tuple[Product, ...]:
    """Return the matrix products that ``op`` consists of (a convolution is one, too)."""
    return tuple(product for product in _products(op) if product.macs)  # empty ones take no time


def _products(op: OpRecord) -> tuple[Product, ...]:
    short = op.name.split(".")[-1]
    backward = "backward" in short
    if "convolution" in short and len(op.shapes) > 1 + backward:
        return _convolution(op, backward=backward)
    matrices = [shape for shape in op.shapes if len(shape) >= 2]
    if len(matrices) < 2:
        return _cube(op.flops)
    left, right = matrices[-2:]
    groups = prod(left[:-2]) if len(left) > 2 else 1
    if left[-1] != right[-2]:
        return _cube(op.flops)
    return (Product(groups, left[-2], left[-1], right[-1]),)


def _convolution(op: OpRecord, *, backward: bool) -> tuple[Product, ...]:
    first = 1 if backward else 0
    image, weight = op.shapes[first], op.shapes[first + 1]
    groups = max(1, image[1] // weight[1]) if len(image) > 1 and weight[1] else 1
    if not prod(weight):
        return ()
    inner, outer = prod(weight[1:]), ceil(weight[0] / groups)
    flops = op.flops / (2 if backward else 1)
    rows = max(1, round(flops / (2 * groups * inner * outer)))
    forward = Product(groups, rows, inner, outer)
    if not backward:
        return (forward,)
    return (Product(groups, rows, outer, inner), Product(groups, inner, rows, outer))


def _cube(flops: int) -> tuple[Product, ...]:
    edge = max(1, round((flops / 2) ** (1 / 3)))
    return (Product(1, edge, edge, edge),)


def _product_cycles(
    product: Product, pricer: OperationPricer, table_rows: int, factor: int
) -> float:
    part = sliced(product, table_rows, factor)
    return (factor if part != product else 1) * pricer.plan(part).cycles


def sliced(product: Product, table_rows: int, factor: int) -> Product:
    """Return one slice of ``product`` when it has a side of ``table_rows``; else itself."""
    sizes = (product.m, product.k, product.n)
    if factor == 1 or not table_rows or table_rows not in sizes:
        return product
    return Product(
        product.groups, *(ceil(size / factor) if size == table_rows else size for size in sizes)
    )


def result_bytes(op: OpRecord, element_bytes: int, table_rows: int, factor: int) -> float:
    """Bytes of what one occurrence of ``op`` produces (one slice of it, where it is serialized).

    Gradients of lookups are added to the accumulators in place: only their rows exist.
    """
    if "convolution" in op.name:
        return max((prod(shape) for shape in op.shapes), default=0) * element_bytes
    if op.kind == "matmul":
        parts = [sliced(product, table_rows, factor) for product in products(op)]
        return max((p.groups * p.m * p.n for p in parts), default=0) * element_bytes
    if op.kind in ("gather", "scatter"):
        indices, width = lookup_size(op)
        return indices * width * element_bytes
    if op.name.split(".")[-1] in _FREE:
        return 0.0
    return max((prod(shape) for shape in op.shapes), default=0) * element_bytes


def lookup_size(op: OpRecord) -> tuple[int, int]:
    """Return how many rows a lookup (or its gradient) moves, and their width."""
    table, indices = (*op.shapes, (), ())[:2]
    if op.name.split(".")[-1] in _BY_ELEMENT:
        return prod(indices), 1
    count = prod(indices) if indices else prod(table)
    return count, table[-1] if len(table) > 1 and indices else 1  # rows of a vector are numbers


def _lookup_cycles(op: OpRecord, pricer: OperationPricer, table_rows: int, factor: int) -> float:
    """Cycles of a lookup, or of its gradient, which scatters rows the same way back.

    A table is spread over the tiles by rows: each tile scans all indices and sends what it has.
    A lookup by element (``gather``) stays in its row, so that every tile scans its own indices;
    each element is an access of its own.
    """
    count, width = lookup_size(op)
    slices, scanned = factor if table_rows else 1, float(count)
    moved = count * width * pricer.element_bytes
    if op.name.split(".")[-1] in _BY_ELEMENT:
        slices, scanned = 1, count / pricer.chip.tiles
        moved = count * ACCESS_BYTES
    step = scanned * SCAN_CYCLES / WORKERS_PER_TILE + pricer.chip.calibration.launch_cycles
    return slices * step + pricer.moved_cycles(moved)


def _is_scalar(op: OpRecord) -> bool:
    return op.bytes_moved <= 64


class SharedOperations:
    """A tuple of operations compared by identity: equal layers share theirs, long to compare."""

    def __init__(self, operations: tuple[OpRecord, ...]) -> None:
        """Wrap ``operations``, which stay alive as long as the key."""
        self.operations = operations

    def __eq__(self, other: object) -> bool:
        """Whether both are the same object."""
        return isinstance(other, SharedOperations) and self.operations is other.operations

    def __hash__(self) -> int:
        """Hash of the object's address."""
        return id(self.operations)


def block_time(
    graph: BlockGraph, block: Block, pricer: OperationPricer, settings: IPUSettings
) -> tuple[float, float]:
    """Return seconds of a block's forward and backward pass for one microbatch.

    The backward pass has the gradient accumulation, and no recomputation.
    """
    factor = serialization_factor(graph, block, settings)
    rows = block_table_rows(graph, block) if factor > 1 else 0
    seconds = 1.0 / pricer.chip.clock_hz
    if settings.front_end != "popart":
        seconds *= pricer.chip.calibration.poptorch_factor
    forward = _cycles_of(SharedOperations(block.forward_ops), pricer, rows, factor)
    if not settings.training:
        return forward * seconds, 0.0
    backward = _cycles_of(SharedOperations(block.backward_ops), pricer, rows, factor)
    backward += accumulation_cycles(graph, block, pricer, settings)
    return forward * seconds, backward * seconds


@lru_cache(maxsize=50_000)
def _cycles_of(
    operations: SharedOperations, pricer: OperationPricer, rows: int, factor: int
) -> float:
    return sum(op.count * pricer.cycles(op, rows, factor) for op in unfused(operations.operations))


def accumulation_cycles(
    graph: BlockGraph, block: Block, pricer: OperationPricer, settings: IPUSettings
) -> float:
    """Cycles of adding one microbatch's weight gradients to the accumulators.

    Gradients are read, accumulators read and written. Lookups add their few rows in place.
    """
    if settings.accumulation == 1 or block.kind == "embedding":
        return 0.0
    found = [graph.parameter_by_fqn[name] for name in block.parameters]
    elements = sum(parameter.numel for parameter in found if parameter.trainable)
    if not elements:
        return 0.0
    return pricer.vector_cycles(3 * elements * pricer.element_bytes)


def block_table_rows(graph: BlockGraph, block: Block) -> int:
    """Rows of the block's large table (word embedding or output projection); 0 for none."""
    return table_rows([graph.parameter_by_fqn[name].shape for name in block.parameters])


def serialization_factor(graph: BlockGraph, block: Block, settings: IPUSettings) -> int:
    """Slices in which ``block`` runs under ``settings``; 1 where it has no large table."""
    if settings.block_slices is not None:
        return dict(settings.block_slices).get(block.name, 1)
    wanted = settings.embedding_factor if block.kind == "embedding" else settings.projection_factor
    if wanted == 1 or not may_serialize(graph, block):
        return 1
    if part := share_of(block.name):  # the slices of its rows
        table = next(r for r in shares(graph).values() if part[1] in r)
        return max(1, wanted * (part[1][1] - part[1][0]) // table[-1][1])
    return wanted


def slices_problem(graph: BlockGraph, name: str, factor: int) -> str:
    """Say why block ``name`` cannot run in ``factor`` slices; empty where it can."""
    table = table_of(graph, graph[name])
    if factor == 1 or (table is not None and table.rows % factor == 0):
        return ""
    asked = f"block {name!r} is to run in {factor} slices, but "
    if table is None:
        return asked + "it has no table; leave it whole (1)"
    divisors = [str(n) for n in range(2, _LARGEST_DIVISOR + 1) if table.rows % n == 0]
    return asked + (
        f"its table has {table.rows} rows, which {factor} does not divide; divisors up to "
        f"{_LARGEST_DIVISOR}: {', '.join(divisors) or 'none'}; choose one, or pad the table to "
        f"{-(-table.rows // factor) * factor} rows (model.resize_token_embeddings, or vocab_size "
        "of the config)"
    )


def may_serialize(graph: BlockGraph, block: Block) -> bool:
    """Whether ``block`` has a large table; a layer's feed-forward matrix is tall, but none."""
    return block.kind in ("embedding", "head", "other") and block_table_rows(graph, block) > 0
