"""The partitioning problem on integers: blocks are bit positions, sets of blocks are ``int`` masks.

A value passes through every stage between its producer and its consumers, and costs on each hop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.options.block_cost import BlockChoice


@dataclass(frozen=True)
class Value:
    """A tensor that one block makes and others read.

    Attributes:
        producer: The block that makes it.
        consumers: Mask of the blocks that read it.
        forward_bytes: Bytes sent in the forward pass of one microbatch.
        backward_bytes: Bytes of its gradient sent back; 0 without one.
        held: A stage that it enters holds it besides what the options of its blocks keep.
    """

    producer: int
    consumers: int
    forward_bytes: float
    backward_bytes: float = 0
    held: bool = True

    @property
    def held_bytes(self) -> float:
        """Bytes that a stage holds per microbatch in flight because it enters there."""
        return self.forward_bytes if self.held else 0.0


@dataclass(frozen=True)
class Shared:
    """Bytes that several blocks use and that one place holds once (a tied weight, an input).

    Attributes:
        num_bytes: Size.
        users: Mask of the blocks.
    """

    num_bytes: float
    users: int


@dataclass(frozen=True)
class StageCharge:
    """What a stage with any of some blocks takes besides them, however many it has.

    Attributes:
        seconds: At speed 1.
        users: Mask of the blocks.
    """

    seconds: float
    users: int


@dataclass(frozen=True)
class Problem:
    """Blocks, what they cost and what they exchange.

    Attributes:
        names: Block names, in execution order (which is a topological order).
        preds: Mask of the direct predecessors of every block.
        options: The ways to run every block; at least one each.
        values: Tensors between blocks.
        weight_bytes: Bytes of the parameters that only this block uses.
        shared_weights: Parameters used by several blocks; a memory holds each once.
        inputs: Model inputs; a stage that reads one holds it once per microbatch in flight.
        outer_s: Seconds per optimizer step (update, gradient all-reduce) that a block adds.
        exchanges: Once per step, where another stage holds the same tied parameter: the gradients
            that they add up.
        together: Masks of blocks that must be in one stage.
        same_device: Masks of blocks whose stages must be on one device.
        entries: Once a microbatch.
        anchors: Mask of blocks of which every stage has at least one; 0: any block will do.
    """

    names: tuple[str, ...]
    preds: tuple[int, ...]
    options: tuple[tuple[BlockChoice, ...], ...]
    values: tuple[Value, ...] = ()
    weight_bytes: tuple[float, ...] = ()
    shared_weights: tuple[Shared, ...] = ()
    inputs: tuple[Shared, ...] = ()
    outer_s: tuple[float, ...] = ()
    exchanges: tuple[StageCharge, ...] = ()
    together: tuple[int, ...] = ()
    same_device: tuple[int, ...] = ()
    frees_in_order: bool = False
    entries: tuple[StageCharge, ...] = ()
    anchors: int = 0

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.names)

    @property
    def everything(self) -> int:
        """Mask of all blocks."""
        return (1 << self.num_blocks) - 1

    @cached_property
    def succs(self) -> tuple[int, ...]:
        """Mask of the direct successors of every block."""
        result = [0] * self.num_blocks
        for block, mask in enumerate(self.preds):
            for pred in bits(mask):
                result[pred] |= 1 << block
        return tuple(result)

    @cached_property
    def fastest(self) -> tuple[BlockChoice, ...]:
        """The quickest option of every block (the smaller one of equals)."""
        return tuple(
            min(ways, key=lambda way: (way.total_s, way.stash_bytes + way.fixed_bytes))
            for ways in self.options
        )

    @cached_property
    def held(self) -> tuple[float, ...]:
        """Private weight bytes of every block."""
        return self.weight_bytes or (0.0,) * self.num_blocks

    @cached_property
    def outer(self) -> tuple[float, ...]:
        """Seconds per optimizer step of every block."""
        return self.outer_s or (0.0,) * self.num_blocks


@dataclass(frozen=True)
class Slot:
    """One position of the pipeline: what a stage put there gets.

    Attributes:
        device: Device that runs it; slots with equal devices add up their loads.
        pool: Memory it uses; slots with equal pools add up their bytes.
        capacity: Bytes of that memory.
        speed: Times are divided by this.
        in_flight: Microbatches whose activations it keeps.
        link_in: Link from the slot before; ``None`` costs nothing.
        link_out: Link to the slot behind; ``None`` costs nothing.
        forbidden: Mask of the blocks that may not be here.
        index: Its number in the pipeline.
        num_stages: Stages of the pipeline.
    """

    device: int
    pool: int
    capacity: float = inf
    speed: float = 1.0
    in_flight: int = 1
    link_in: Link | None = None
    link_out: Link | None = None
    forbidden: int = 0
    index: int = 0
    num_stages: int = 1


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the ones in ``mask``, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def mask_of(blocks: Iterable[int]) -> int:
    """Return the mask with ones at ``blocks``."""
    mask = 0
    for block in blocks:
        mask |= 1 << block
    return mask


def closure(preds: Sequence[int]) -> list[int]:
    """Mask of all predecessors of every block, direct or not (blocks in topological order)."""
    found: list[int] = []
    for mask in preds:
        for pred in bits(mask):
            mask |= found[pred]
        found.append(mask)
    return found


def joined_groups(groups: Iterable[int]) -> tuple[int, ...]:
    """Unite the masks that have a block in common; single blocks are no group."""
    merged: list[int] = []
    for group in groups:
        apart = [other for other in merged if not other & group]
        for other in merged:
            if other & group:
                group |= other
        merged = [*apart, group]
    return tuple(group for group in merged if group.bit_count() > 1)
