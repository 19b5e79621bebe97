"""Seconds and bytes of any run of consecutive blocks on one IPU, from tables made once.

The search prices thousands of stages of one model. What a stage needs is the same for every
pipeline it may be part of: it is found here by first and last block, and equal layers, which
share their operations, are priced once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.backends.ipu.prices.chip import Chip
from ipu_pipeline.backends.ipu.prices.memory import (
    StageBytes,
    num_products,
    stage_bytes,
    working_of,
)
from ipu_pipeline.backends.ipu.prices.operations import OperationPricer, block_time
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.timing import float_bytes
from ipu_pipeline.ir.graph import BlockGraph

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Holding:
    """Parameters of a run of blocks, each counted once.

    Attributes:
        names: First names of the parameters.
        elements: Their elements.
        trainable: Elements that are trained.
        largest: Elements of the largest trained parameter.
        updated: Trained elements whose first user is among the blocks: over all stages that hold
            a shared parameter it is counted once.
        products: Matrix products of the forward pass.
    """

    names: frozenset[str]
    elements: int
    trainable: int
    largest: int
    updated: int
    products: int


@dataclass(frozen=True)
class PassTimes:
    """Running sums over the blocks: ``forward_s[end] - forward_s[start]`` is a stage's.

    Attributes:
        forward_s: Forward passes.
        backward_s: Backward passes without recomputation.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]

    @cached_property
    def arrays(self) -> tuple[Floats, Floats]:
        """Both as arrays."""
        return np.array(self.forward_s), np.array(self.backward_s)


class ChainPrices:
    """Prices runs of blocks of one graph; remembers the answers."""

    def __init__(self, graph: BlockGraph, chip: Chip) -> None:
        """Price ``graph``, whose blocks run in the order in which they are listed."""
        self.graph, self.chip = graph, chip
        self.names = tuple(graph.block_index)
        self._times: dict[object, PassTimes] = {}
        self._working: dict[object, list[list[int]]] = {}
        self._bytes: dict[object, StageBytes] = {}
        self._holdings: dict[int, list[Holding]] = {}
        self.least_rows: dict[object, Floats] = {}

    @cached_property
    def cuts(self) -> tuple[tuple[str, ...], ...]:
        """Tensors that cross the boundary in front of each block, and behind the last."""
        index = self.graph.block_index
        spans = [
            (index[tensor.producer], max(index[name] for name in tensor.consumers), tensor.name)
            for tensor in self.graph.tensors
            if tensor.producer is not None and tensor.consumers
        ]
        return tuple(
            tuple(name for first, last, name in spans if first < position <= last)
            for position in range(len(self.names) + 1)
        )

    def sent_bytes(self, position: int, settings: IPUSettings) -> tuple[float, float]:
        """Bytes sent over a boundary in one cycle: forward, and gradients back."""
        forward = backward = 0.0
        for name in self.cuts[position]:
            tensor = self.graph.tensor_by_name[name]
            size = float_bytes(tensor, settings.element_bytes)
            forward += size
            backward += size if settings.training and tensor.requires_grad else 0.0
        return forward, backward

    def times(self, settings: IPUSettings, proportion: float) -> PassTimes:
        """Seconds of the blocks at one memory proportion."""
        key = (
            settings.precision, settings.front_end, settings.training, settings.accumulation == 1,
            self._factors(settings), proportion,
        )  # fmt: skip
        if key not in self._times:
            pricer = self._pricer(settings, proportion)
            found = [block_time(self.graph, b, pricer, settings) for b in self.graph.blocks]
            self._times[key] = PassTimes(
                (0.0, *accumulate(forward for forward, _ in found)),
                (0.0, *accumulate(backward for _, backward in found)),
            )
        return self._times[key]

    def working(self, settings: IPUSettings, proportion: float, start: int, end: int) -> int:
        """Most bytes that one operation of the blocks needs (``memory.working_of``)."""
        key = (settings.precision, settings.training, self._factors(settings), proportion)
        if key not in self._working:
            pricer = self._pricer(settings, proportion)
            each = [working_of(self.graph, name, pricer, settings) for name in self.names]
            self._working[key] = [list(accumulate(each[first:], max)) for first in range(len(each))]
        return self._working[key][start][end - start - 1]

    def stage(self, settings: IPUSettings, start: int, end: int, in_flight: int) -> StageBytes:
        """Stash, activations and transfers of a stage that keeps ``in_flight`` microbatches."""
        key = (
            settings.training, settings.precision, settings.checkpoint_bytes,
            settings.recompute and settings.num_ipus > 1, settings.pipelined,
            settings.checkpoint_layers, start, end,
        )  # fmt: skip
        if key not in self._bytes:
            self._bytes[key] = stage_bytes(
                self.graph,
                settings,
                self.names[start:end],
                (self.cuts[start], self.cuts[end]),
                1,
                first=start == 0,
            )
        one = self._bytes[key]
        return StageBytes(in_flight * one.stash, one.activations, one.transfers)

    def holding(self, start: int, end: int) -> Holding:
        """Parameters of the blocks from ``start`` to before ``end``."""
        found = self._holdings.setdefault(start, [Holding(frozenset(), 0, 0, 0, 0, 0)])
        while len(found) <= end - start:
            found.append(self._grown(found[-1], start + len(found) - 1))
        return found[end - start]

    def _grown(self, before: Holding, position: int) -> Holding:
        block = self.graph.blocks[position]
        new = [fqn for fqn in block.parameters if fqn not in before.names]
        parameters = [self.graph.parameter_by_fqn[fqn] for fqn in new]
        trained = [parameter for parameter in parameters if parameter.trainable]
        return Holding(
            before.names.union(new),
            before.elements + sum(parameter.numel for parameter in parameters),
            before.trainable + sum(parameter.numel for parameter in trained),
            max(before.largest, *(parameter.numel for parameter in trained), 0),
            before.updated + sum(p.numel for p in trained if p.blocks[:1] == (block.name,)),
            before.products + num_products(block),
        )

    def joined(self, holdings: list[Holding]) -> Holding:
        """Parameters of several runs on one IPU, each counted once."""
        names = frozenset[str]().union(*(item.names for item in holdings))
        found = [self.graph.parameter_by_fqn[fqn] for fqn in names]
        trained = [parameter.numel for parameter in found if parameter.trainable]
        return Holding(
            names,
            sum(parameter.numel for parameter in found),
            sum(trained),
            max(trained, default=0),
            sum(item.updated for item in holdings),
            sum(item.products for item in holdings),
        )

    def _pricer(self, settings: IPUSettings, proportion: float) -> OperationPricer:
        return OperationPricer(self.chip, settings.precision, proportion)

    def _factors(self, settings: IPUSettings) -> object:
        return (settings.embedding_factor, settings.projection_factor, settings.block_slices)


def openers(graph: BlockGraph) -> Iterator[int]:
    """Yield the positions of the blocks that may begin a stage.

    PopTorch begins a stage where a module is called, and gives all calls of one module one stage:
    a stage cannot begin with glue (a loss), nor between two calls of a module.
    """
    last_call = {_module(block.name): i for i, block in enumerate(graph.blocks)}
    latest = -1
    for position, block in enumerate(graph.blocks):
        if position > latest and (position == 0 or (block.module and block.kind != "loss")):
            yield position
        latest = max(latest, last_call[_module(block.name)])


def _module(block: str) -> str:
    """The module of a block: ``shared`` for its third call, ``shared#2``."""
    return block.split("#")[0]
