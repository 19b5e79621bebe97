"""Bytes on every IPU of a replica, by kind, on average and on the fullest tile.

What is always there: weights, gradients (accumulators), optimizer state on the chip, stashed stage
and layer inputs, code. What is there at the worst moment, which is either a backward pass
(activations of the segment being differentiated, results of single operations, operands of the
largest matrix product, tensors being sent) or the update of the largest parameter (its state read
from streaming memory). Nothing is assumed to share memory with anything but that.

Published facts used (none fitted; real libpva profiles of graphcore/popliner, as recorded in
``shared/data/ipu/hardware.json``): code and the evenness of tiles.

Source: POPART_PIPELINE.md (stash depth 2(F-1-i)+1, recomputation); README of the shared data (bytes
per parameter).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import prod

from ipu_pipeline.backends.ipu.prices.chip import Chip
from ipu_pipeline.backends.ipu.prices.layout import PlacedProgram
from ipu_pipeline.backends.ipu.prices.operations import (
    OperationPricer,
    SharedOperations,
    block_table_rows,
    products,
    result_bytes,
    serialization_factor,
    sliced,
)
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.timing import float_bytes
from ipu_pipeline.ir.attention import unfused, unfused_saved_bytes
from ipu_pipeline.ir.graph import DTYPE_BYTES, Block, BlockGraph, OpRecord

# BERT-large inference on two IPUs: the fullest tile holds 336,670 and 291,170 bytes where the
# average tile holds 319,850 and 273,910 (mem_bertl_inf_2way_a and _b): 1.053 and 1.063.
FULLEST_TILE = 1.063
# Vertex state, exchange code and control code that one more encoder layer adds
# (mem_bertl_inf_per_layer: 1.05 + 1.015 + 1.354 MB), by its 8 matrix products.
CODE_BYTES_PER_PRODUCT = 3_419_000 / 8
# What is left of 49.3 MB for 12 layers of inference (mem_bertl_inf_2way_b), and of 62.6 MB for a
# whole training program of 3 layers (mem_demo_tiny_train).
CODE_BYTES_INFERENCE = 8_300_000
CODE_BYTES_TRAINING = 52_400_000
_LAYER_NAME = re.compile(r"(.*\.\d+)(\.|#|$)")


@dataclass(frozen=True)
class IPUMemory:
    """Bytes on one IPU, summed over its tiles.

    Attributes:
        weights: Parameters.
        gradients: Accumulated gradients.
        optimizer: Optimizer state on the chip.
        stash: Stage and layer inputs kept for the microbatches in flight.
        activations: What the segment being differentiated keeps.
        temporaries: Results of single operations and operands of the largest matrix product, or
            the state of the parameter being updated.
        transfers: Tensors being received and sent.
        code: Code, vertex state, exchange and control.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    stash: int = 0
    activations: int = 0
    temporaries: int = 0
    transfers: int = 0
    code: int = 0

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        return (self.weights + self.gradients + self.optimizer + self.stash + self.activations
                + self.temporaries + self.transfers + self.code)  # fmt: skip

    @property
    def kept_bytes(self) -> int:
        """What never changes: parameters, accumulators and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    def fullest_tile_bytes(self, chip: Chip) -> int:
        """Bytes of the fullest tile."""
        return int(self.total_bytes * FULLEST_TILE / chip.tiles)

    def fits(self, chip: Chip) -> bool:
        """Whether the fullest tile fits into a tile's memory."""
        return self.fullest_tile_bytes(chip) <= chip.tile_memory_bytes


def most_bytes(chip: Chip, share: float = 1.0) -> int:
    """Most bytes of an IPU whose fullest tile needs at most ``share`` of its memory."""
    room = int(chip.tile_memory_bytes * share)
    found = int((room + 1) * chip.tiles / FULLEST_TILE) + 1
    while IPUMemory(weights=found).fullest_tile_bytes(chip) > room:
        found -= 1
    return found


@dataclass(frozen=True)
class StageBytes:
    """What one stage needs on its IPU besides parameters, results of operations and code.

    Attributes:
        stash: Stage and layer inputs kept for the microbatches in flight.
        activations: What the segment being differentiated keeps.
        transfers: Tensors being received and sent.
    """

    stash: int
    activations: int
    transfers: int


def ipu_memory(run: PlacedProgram) -> tuple[IPUMemory, ...]:
    """Return the memory of every IPU of one replica."""
    graph, layout, settings = run.graph, run.layout, run.settings
    count = len(layout.stages)
    cuts = [
        tuple(name for first, last, name in run.crossing if first < stage <= last)
        for stage in range(count + 1)
    ]
    stages: list[list[StageBytes]] = [[] for _ in range(layout.num_ipus)]
    for stage, placed in enumerate(layout.stages):
        stages[placed.ipu].append(
            stage_bytes(
                graph,
                settings,
                placed.blocks,
                cuts[stage : stage + 2],
                stash_depth(count, stage),
                first=stage == 0,
            )
        )
    found = []
    for ipu in range(layout.num_ipus):
        names = layout.blocks_on(ipu)
        pricer = run.pricer(ipu)
        working = max((working_of(graph, name, pricer, settings) for name in names), default=0)
        sizes = run.held[ipu]
        changed = [n for fqn, n in sizes.items() if graph.parameter_by_fqn[fqn].trainable]
        found.append(
            add_up(
                settings,
                sum(sizes.values()),
                sum(changed),
                max(changed, default=0),
                stages[ipu],
                working,
                sum(num_products(graph[name]) for name in names),
            )
            if names or sizes
            else IPUMemory()
        )
    return tuple(found)


def add_up(
    settings: IPUSettings,
    elements: int,
    trainable: int,
    largest: int,
    stages: Sequence[StageBytes],
    working: int,
    products: int,
) -> IPUMemory:
    """Return the memory of one IPU from its numbers.

    Args:
        settings: The run.
        elements: Parameter elements that it holds.
        trainable: Those that are trained.
        largest: Elements of its largest trained parameter.
        stages: Of its stages.
        working: Most bytes that one operation needs.
        products: Matrix products of its forward passes.
    """
    training, on_chip = int(settings.training), settings.chip_state_bytes
    activations = max((stage.activations for stage in stages), default=0)
    # Off the chip, a parameter's state is on it only while the parameter is updated.
    updating = training * largest * (settings.state_bytes * settings.state_share - on_chip)
    return IPUMemory(
        weights=elements * settings.element_bytes,
        gradients=training * trainable * settings.element_bytes,
        optimizer=int(training * trainable * on_chip),
        stash=sum(stage.stash for stage in stages),
        activations=activations,
        temporaries=int(max(working, updating - activations)),
        transfers=sum(stage.transfers for stage in stages),
        code=code_bytes(products, training=settings.training),
    )


def working_of(graph: BlockGraph, name: str, pricer: OperationPricer, settings: IPUSettings) -> int:
    """Most bytes that one operation of a block needs; equal layers are looked at once."""
    block = graph[name]
    return _working(
        SharedOperations(block.forward_ops),
        SharedOperations(block.backward_ops if settings.training else ()),
        block_table_rows(graph, block),
        serialization_factor(graph, block, settings),
        pricer,
    )


def code_bytes(products: int, *, training: bool) -> int:
    """Bytes of code, vertex state, exchange and control for so many matrix products."""
    base = CODE_BYTES_TRAINING if training else CODE_BYTES_INFERENCE
    return int(base + products * CODE_BYTES_PER_PRODUCT)


@lru_cache(maxsize=10_000)
def _products_in(operations: SharedOperations) -> int:
    return sum(op.count for op in unfused(operations.operations) if op.kind == "matmul")


def num_products(block: Block) -> int:
    """Matrix products in the forward pass of ``block``."""
    return _products_in(SharedOperations(block.forward_ops))


def stash_depth(num_stages: int, stage: int) -> int:
    """Microbatches that forward stage ``stage`` keeps: 2 (F-1-i) + 1."""
    return 2 * (num_stages - 1 - stage) + 1


def stage_bytes(
    graph: BlockGraph,
    settings: IPUSettings,
    names: Sequence[str],
    cuts: Sequence[Sequence[str]],
    in_flight: int,
    *,
    first: bool,
) -> StageBytes:
    """Price one stage.

    Args:
        graph: The model.
        settings: The run.
        names: Its blocks, in execution order.
        cuts: Tensors over the boundary in front of it and over the one behind it.
        in_flight: Microbatches it keeps (:func:`stash_depth`).
        first: Whether inputs from the host enter here.
    """
    parts = segments(graph, names, settings)
    saved = [sum(saved_bytes(graph[name], settings) for name in part) for part in parts]
    again = settings.recompute and settings.num_ipus > 1  # PopTorch's default on several IPUs
    stash, activations = 0, 0
    if settings.training and again:
        activations = max(saved, default=0)
    elif settings.training and not (settings.pipelined and settings.num_ipus > 1):
        activations = sum(saved)
    if settings.training and settings.pipelined:
        kept = _kept(graph, settings, parts, cuts[0], first=first) if again else sum(saved)
        stash = int(in_flight * kept)
    return StageBytes(stash, activations, _transfer_bytes(graph, settings, cuts, first=first))


def _kept(
    graph: BlockGraph,
    settings: IPUSettings,
    parts: Sequence[Sequence[str]],
    entering: Sequence[str],
    *,
    first: bool,
) -> float:
    """Bytes of one microbatch from which a stage is recomputed."""
    kept = set(entering)
    if settings.checkpoint_layers:
        for part in parts:
            kept.update(graph[part[0]].inputs)
    size = sum(
        float_bytes(graph.tensor_by_name[name], settings.stashed_bytes) for name in sorted(kept)
    )
    if first:
        size += sum(float_bytes(t, settings.element_bytes) for t in graph.inputs)
    return size


def segments(graph: BlockGraph, names: Sequence[str], settings: IPUSettings) -> list[Sequence[str]]:
    """Blocks of a stage between checkpoints: each layer (all of its parts) is one segment."""
    if not settings.checkpoint_layers:
        return [names]
    keyed = ((layer_of(graph[name]), name) for name in names)
    return [[name for _, name in group] for _, group in groupby(keyed, key=lambda pair: pair[0])]


def layer_of(block: Block) -> str:
    """``encoder.layer.3`` for ``encoder.layer.3.attention``; the kind where it is no layer."""
    found = _LAYER_NAME.match(block.name) if block.kind == "layer" else None
    return found[1] if found else block.kind


def saved_bytes(block: Block, settings: IPUSettings) -> int:
    """Bytes that a block keeps for its backward pass, in the device's precision.

    Dropout masks are not among them: PopART draws them again from a stashed seed.
    """
    masks = _mask_bytes(SharedOperations(block.forward_ops))
    saved = block.saved_bytes + unfused_saved_bytes(block.forward_ops)
    return int(max(0, saved - masks) * settings.element_bytes // 4)


@lru_cache(maxsize=10_000)
def _mask_bytes(operations: SharedOperations) -> float:
    return sum(
        op.count * DTYPE_BYTES.get(op.dtype, 4) * prod(op.shapes[0])
        for op in unfused(operations.operations)
        if op.kind == "random" and op.shapes
    )


@lru_cache(maxsize=50_000)
def _working(
    forward: SharedOperations,
    backward: SharedOperations,
    rows: int,
    factor: int,
    pricer: OperationPricer,
) -> int:
    """Most bytes that one operation of a block needs besides what is saved.

    An operation needs its result and the gradient (or value) it works on; a matrix product
    also the rearranged parts of its operands, which the memory proportion bounds.
    """
    operations = unfused([*forward.operations, *backward.operations])
    return int(max((_one_bytes(op, pricer, rows, factor) for op in operations), default=0.0))


def _one_bytes(op: OpRecord, pricer: OperationPricer, rows: int, factor: int) -> float:
    result = result_bytes(op, pricer.element_bytes, rows, factor)
    if op.kind != "matmul":
        return 2 * result
    parts = [sliced(product, rows, factor) for product in products(op)]
    operands = max((pricer.plan(part).temporary_bytes for part in parts), default=0.0)
    moving = max((max(p.m, p.n) * p.k * p.groups for p in parts), default=0)
    value = min(moving * pricer.element_bytes, op.bytes_moved / 2)
    return result + value + operands * pricer.chip.tiles


def _transfer_bytes(
    graph: BlockGraph, settings: IPUSettings, cuts: Sequence[Sequence[str]], *, first: bool
) -> int:
    """Tensors that a stage receives or sends in a cycle, and their gradients."""
    size = 0.0
    for cut in cuts:
        for name in cut:
            tensor = graph.tensor_by_name[name]
            ways = 2 if settings.training and tensor.requires_grad else 1
            size += ways * float_bytes(tensor, settings.element_bytes)
    if first:
        size += sum(float_bytes(tensor, settings.element_bytes) for tensor in graph.inputs)
    return int(size)
