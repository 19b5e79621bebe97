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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from math import prod

from ipu_pipeline.backends.ipu.prices.blocks import (
    block_table_rows,
    pricer_for,
    serialization_factor,
)
from ipu_pipeline.backends.ipu.prices.calibration import Calibration
from ipu_pipeline.backends.ipu.prices.chip import Chip
from ipu_pipeline.backends.ipu.prices.layout import Layout, held_elements, stage_tensors
from ipu_pipeline.backends.ipu.prices.operations import Pricer, products, result_bytes, sliced
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
        return sum(getattr(self, item.name) for item in fields(self))

    def fullest_tile_bytes(self, chip: Chip) -> int:
        """Bytes of the fullest tile."""
        return int(self.total_bytes * FULLEST_TILE / chip.tiles)

    def fits(self, chip: Chip) -> bool:
        """Whether the fullest tile fits into a tile's memory."""
        return self.fullest_tile_bytes(chip) <= chip.tile_memory_bytes


@dataclass(frozen=True)
class _Context:
    graph: BlockGraph
    layout: Layout
    settings: IPUSettings
    chip: Chip
    calibration: Calibration


def ipu_memory(
    graph: BlockGraph, layout: Layout, settings: IPUSettings, chip: Chip, calibration: Calibration
) -> tuple[IPUMemory, ...]:
    """Return the memory of every IPU of one replica."""
    context = _Context(graph, layout, settings, chip, calibration)
    held = held_elements(graph, layout, settings)
    return tuple(_one_ipu(context, ipu, held[ipu]) for ipu in range(layout.num_ipus))


def _one_ipu(context: _Context, ipu: int, held: Mapping[str, int]) -> IPUMemory:
    graph, settings = context.graph, context.settings
    names = context.layout.blocks_on(ipu)
    if not names and not held:
        return IPUMemory()
    stages = [i for i, stage in enumerate(context.layout.stages) if stage.ipu == ipu]
    changed = [n for fqn, n in held.items() if graph.parameter_by_fqn[fqn].trainable]
    trainable, largest = sum(changed), max(changed, default=0)
    training = int(settings.training)
    on_chip = 0.0 if settings.optimizer_offchip else settings.state_bytes * settings.state_share
    activations = max((_live_bytes(context, stage) for stage in stages), default=0)
    pricer = pricer_for(context.chip, settings, ipu, context.calibration)
    working = _working_of(context, names, pricer)
    updating = training * largest * _streamed_bytes(settings)
    return IPUMemory(
        weights=sum(held.values()) * settings.element_bytes,
        gradients=training * trainable * settings.element_bytes,
        optimizer=int(training * trainable * on_chip),
        stash=sum(stash_bytes(context, stage) for stage in stages),
        activations=activations,
        temporaries=int(max(working, updating - activations)),
        transfers=_transfer_bytes(context, stages),
        code=code_bytes([graph[name] for name in names], training=settings.training),
    )


def _working_of(context: _Context, names: Sequence[str], pricer: Pricer) -> int:
    known: dict[tuple[int, ...], int] = {}
    for name in names:
        block = context.graph[name]
        rows, factor = (
            block_table_rows(context.graph, block),
            serialization_factor(context.graph, block, context.settings),
        )
        key = (id(block.forward_ops), id(block.backward_ops), rows, factor)
        if key not in known:  # equal layers share their operations
            known[key] = working_bytes(block, rows, factor, pricer, context.settings)
    return max(known.values(), default=0)


def _streamed_bytes(settings: IPUSettings) -> float:
    """Bytes per element that are on the chip only while a parameter is updated."""
    return settings.state_bytes * settings.state_share if settings.optimizer_offchip else 0.0


def code_bytes(blocks: Sequence[Block], *, training: bool) -> int:
    """Bytes of code, vertex state, exchange and control of ``blocks`` on one IPU."""
    operations = (op for block in blocks for op in unfused(block.forward_ops))
    count = sum(op.count for op in operations if op.kind == "matmul")
    base = CODE_BYTES_TRAINING if training else CODE_BYTES_INFERENCE
    return int(base + count * CODE_BYTES_PER_PRODUCT)


def stash_depth(num_stages: int, stage: int) -> int:
    """Microbatches that forward stage ``stage`` keeps: 2 (F-1-i) + 1."""
    return 2 * (num_stages - 1 - stage) + 1


def stash_bytes(context: _Context, stage: int) -> int:
    """Bytes that one stage keeps for its microbatches in flight."""
    settings = context.settings
    if not settings.training or not settings.pipelined:
        return 0
    depth = stash_depth(len(context.layout.stages), stage)
    if not _recomputes(context):
        return depth * sum(_saved(context, name) for name in context.layout.stages[stage].blocks)
    kept = {name for name, _ in _entering(context, stage)}
    if settings.checkpoint_layers:
        for segment in _segments(context, stage):
            kept.update(context.graph[segment[0]].inputs)
    tensors = [context.graph.tensor_by_name[name] for name in kept]
    size = sum(float_bytes(tensor, settings.stashed_bytes) for tensor in tensors)
    if stage == 0:
        size += sum(float_bytes(t, settings.element_bytes) for t in context.graph.inputs)
    return int(depth * size)


def _recomputes(context: _Context) -> bool:
    """PopTorch recomputes by default on more than one IPU only."""
    return context.settings.recompute and context.settings.num_ipus > 1


def _entering(context: _Context, stage: int) -> list[tuple[str, int]]:
    """Tensors that a stage receives: to read them, or to pass them on."""
    crossing = stage_tensors(context.graph, context.layout)
    return [(name, start) for start, end, name in crossing if start < stage <= end]


def _segments(context: _Context, stage: int) -> list[list[str]]:
    """Blocks of a stage between checkpoints: each layer (all of its parts) is one segment."""
    names = context.layout.stages[stage].blocks
    if not context.settings.checkpoint_layers:
        return [list(names)]
    keyed = ((_layer_of(context.graph[name]), name) for name in names)
    return [[name for _, name in group] for _, group in groupby(keyed, key=lambda pair: pair[0])]


def _layer_of(block: Block) -> str:
    """``encoder.layer.3`` for ``encoder.layer.3.attention``; the block itself where it is none."""
    found = re.match(r"(.*\.\d+)(\.|#|$)", block.name) if block.kind == "layer" else None
    return found[1] if found else block.kind


def _saved(context: _Context, name: str) -> int:
    return saved_bytes(context.graph[name], context.settings)


def saved_bytes(block: Block, settings: IPUSettings) -> int:
    """Bytes that a block keeps for its backward pass, in the device's precision.

    Dropout masks are not among them: PopART draws them again from a stashed seed.
    """
    masks = sum(
        op.count * DTYPE_BYTES.get(op.dtype, 4) * prod(op.shapes[0])
        for op in unfused(block.forward_ops)
        if op.kind == "random" and op.shapes
    )
    saved = block.saved_bytes + unfused_saved_bytes(block.forward_ops)
    return int(max(0, saved - masks) * settings.element_bytes // 4)


def _live_bytes(context: _Context, stage: int) -> int:
    """Saved tensors that exist at once while a stage runs backward."""
    if not context.settings.training:
        return 0
    if not _recomputes(context):
        pipelined = context.settings.pipelined and context.settings.num_ipus > 1
        names = context.layout.stages[stage].blocks
        return 0 if pipelined else sum(_saved(context, name) for name in names)
    segments = _segments(context, stage)
    return max(sum(_saved(context, name) for name in segment) for segment in segments)


def working_bytes(
    block: Block, rows: int, factor: int, pricer: Pricer, settings: IPUSettings
) -> int:
    """Most bytes that one operation of ``block`` needs besides what is saved.

    An operation needs its result and the gradient (or value) it works on; a matrix product
    also the rearranged parts of its operands, which the memory proportion bounds.

    Args:
        block: The block.
        rows: Rows of its large table; 0 for none.
        factor: Slices in which operations on that table run.
        pricer: Plans matrix products.
        settings: Mode of the run.
    """
    operations = [*unfused(block.forward_ops)]
    if settings.training:
        operations += unfused(block.backward_ops)
    return int(max((_one_bytes(op, pricer, rows, factor) for op in operations), default=0.0))


def _one_bytes(op: OpRecord, pricer: Pricer, rows: int, factor: int) -> float:
    result = result_bytes(op, pricer.element_bytes, rows, factor)
    if op.kind != "matmul":
        return 2 * result
    parts = [sliced(product, rows, factor) for product in products(op)]
    operands = max((pricer.plan(part).temporary_bytes for part in parts), default=0.0)
    moving = max((max(p.m, p.n) * p.k * p.groups for p in parts), default=0)
    value = min(moving * pricer.element_bytes, op.bytes_moved / 2)
    return result + value + operands * pricer.chip.tiles


def _transfer_bytes(context: _Context, stages: Sequence[int]) -> int:
    """Tensors that the stages of one IPU receive or send in a cycle, and their gradients."""
    size = 0.0
    for start, end, name in stage_tensors(context.graph, context.layout):
        tensor = context.graph.tensor_by_name[name]
        ways = 2 if context.settings.training and tensor.requires_grad else 1
        passes = sum((start <= stage < end) + (start < stage <= end) for stage in stages)
        size += ways * passes * float_bytes(tensor, context.settings.element_bytes)
    if 0 in stages:
        inputs = context.graph.inputs
        size += sum(float_bytes(tensor, context.settings.element_bytes) for tensor in inputs)
    return int(size)
