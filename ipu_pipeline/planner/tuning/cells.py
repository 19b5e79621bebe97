"""Seconds and bytes of every cell: IPU i with layers a to b at memory proportion p.

Times of a cell add up from those of its blocks; bytes come from the whole model's memory
prediction and are remembered cell by cell, because an IPU's bytes do not depend on how the other
IPUs share the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

from ipu_pipeline.backends.ipu.prices import Calibration, Chip, IPUSettings
from ipu_pipeline.backends.ipu.prices.blocks import (
    BlockTime,
    block_time,
    pricer_for,
    serialization_factor,
)
from ipu_pipeline.backends.ipu.prices.layout import StageLayout, make_layout
from ipu_pipeline.backends.ipu.prices.memory import ipu_memory
from ipu_pipeline.ir.graph import BlockGraph

Cell = tuple[int, int, int, float]


@dataclass(frozen=True)
class Ground:
    """What all settings of one micro batch share."""

    graph: BlockGraph
    chip: Chip
    calibration: Calibration

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Positions of the layer blocks."""
        return tuple(i for i, block in enumerate(self.graph.blocks) if block.kind == "layer")

    @cached_property
    def alike(self) -> bool:
        """Whether all layers are equal and each hands one tensor to the next."""
        blocks = [self.graph.blocks[i] for i in self.layers]
        facts = {
            (id(b.forward_ops), id(b.backward_ops), b.saved_bytes, self.graph.parameter_bytes(b))
            for b in blocks
        }
        names = {block.name: i for i, block in enumerate(self.graph.blocks)}
        chained = all(
            names[user] == names[tensor.producer] + 1
            for tensor in self.graph.tensors
            if tensor.producer is not None
            for user in tensor.consumers
        )
        sizes = {
            (tensor.num_bytes, tensor.requires_grad)
            for block in blocks
            for tensor in map(self.graph.tensor_by_name.__getitem__, block.inputs)
        }
        return len(facts) == 1 and len(sizes) <= 1 and chained

    def block_times(self, settings: IPUSettings, proportion: float) -> tuple[BlockTime, ...]:
        """Price every block at one memory proportion."""
        given = replace(settings, proportions=(proportion,))
        pricer = pricer_for(self.chip, given, 0, self.calibration)
        known: dict[tuple[object, ...], BlockTime] = {}
        found = []
        for block in self.graph.blocks:
            factor = serialization_factor(self.graph, block, settings)
            # Equal layers share their operation tuples.
            key = (id(block.forward_ops), id(block.backward_ops), block.kind, factor,
                   self.graph.parameter_bytes(block))  # fmt: skip
            if key not in known:
                known[key] = block_time(self.graph, block, pricer, given, factor)
            found.append(known[key])
        return tuple(found)


@dataclass(frozen=True)
class Seconds:
    """Loads of the cells of one pipeline depth and one choice of slices, per microbatch.

    Attributes:
        ground: Model and chip.
        settings: Any setting of this depth and these slices.
        proportions: Proportions that an IPU may get, rising.
    """

    ground: Ground
    settings: IPUSettings
    proportions: tuple[float, ...]
    _options: dict[tuple[int, int, int], tuple[tuple[float, float], ...]] = field(
        default_factory=dict
    )

    @cached_property
    def layout(self) -> StageLayout:
        """The even split, for what does not depend on the split."""
        return make_layout(self.ground.graph, replace(self.settings, layers_per_ipu=(-1,)))

    @cached_property
    def fixed(self) -> Mapping[str, int]:
        """IPU of the blocks that no split moves: embeddings, heads, losses."""
        layers = self.ground.layers
        first, last = (layers[0], layers[-1]) if layers else (0, -1)
        owners = {name: stage.ipu for stage in self.layout.stages for name in stage.blocks}
        return {
            block.name: owners[block.name]
            for i, block in enumerate(self.ground.graph.blocks)
            if block.kind in ("embedding", "head", "loss")
            or (block.kind != "layer" and not first < i < last)
        }

    @cached_property
    def least_layers(self) -> tuple[int, ...]:
        """Layers that each IPU must have, so that no stage is empty."""
        return tuple(int(i not in self.fixed.values()) for i in range(self.settings.num_ipus))

    @cached_property
    def returns(self) -> bool:
        """Whether the last stage is back on another IPU than the last (a tied head)."""
        return not self._last_keeps

    def forward_s(self, ipu: int, start: int, end: int, proportion: float) -> float:
        """Seconds of the forward pass of a cell."""
        fixed, running = self._forwards[proportion]
        return fixed[ipu] + running[end] - running[start]

    @cached_property
    def _forwards(self) -> Mapping[float, tuple[list[float], list[float]]]:
        """By proportion: forward seconds of what is fixed on every IPU, and running over layers."""
        tables = {}
        for proportion in self.proportions:
            times = self.ground.block_times(self.settings, proportion)
            fixed = [0.0] * self.settings.num_ipus
            moved = [0.0] * len(self.ground.layers)
            layer = -1
            for block, time in zip(self.ground.graph.blocks, times, strict=True):
                layer += block.kind == "layer"
                if block.name in self.fixed:
                    fixed[self.fixed[block.name]] += time.forward_s
                else:
                    moved[layer] += time.forward_s
            tables[proportion] = (fixed, _running(moved))
        return tables

    @cached_property
    def rest(self) -> tuple[tuple[float, ...], ...]:
        """Least seconds of IPUs i and later with layers from a on, per microbatch: ``rest[i][a]``.

        Recomputation of the layers that end up on the last IPU is left out.
        """
        count, ipus = len(self.ground.layers), self.settings.num_ipus
        fixed, plain, _ = self._tables[self.proportions[-1]]
        return tuple(
            tuple(sum(fixed[ipu:]) + plain[count] - plain[start] for start in range(count + 1))
            for ipu in range(ipus + 1)
        )

    @cached_property
    def _tables(self) -> Mapping[float, tuple[list[float], list[float], list[float]]]:
        """By proportion: fixed load of every IPU, and running sums over layers, plain and again."""
        tables = {}
        final = set(self.layout.stages[-1].blocks)
        for proportion in self.proportions:
            times = self.ground.block_times(self.settings, proportion)
            fixed = [0.0] * self.settings.num_ipus
            plain, again = [0.0] * len(self.ground.layers), [0.0] * len(self.ground.layers)
            layer = -1
            for block, time in zip(self.ground.graph.blocks, times, strict=True):
                load = time.forward_s + time.backward_s
                if block.name in self.fixed:
                    repeated = 0.0 if block.name in final else time.forward_s
                    fixed[self.fixed[block.name]] += load + repeated
                    continue
                layer += block.kind == "layer"
                plain[layer] += load
                again[layer] += load + time.forward_s
            tables[proportion] = (fixed, _running(plain), _running(again))
        return tables

    @cached_property
    def _last_keeps(self) -> bool:
        """Whether layers on the last IPU are in the last stage, which recomputes nothing."""
        return self.layout.stages[-1].ipu == self.settings.num_ipus - 1

    def options(self, ipu: int, start: int, end: int) -> tuple[tuple[float, float], ...]:
        """Return (load in seconds, proportion), quickest first; useless proportions left out."""
        key = (ipu, start, end)
        if key not in self._options:
            kept = self._last_keeps and ipu == self.settings.num_ipus - 1
            found: list[tuple[float, float]] = []
            for proportion in self.proportions:
                fixed, plain, again = self._tables[proportion]
                sums = plain if kept or not self.settings.recompute else again
                load = fixed[ipu] + sums[end] - sums[start]
                if not found or load < found[-1][0] * (1 - 1e-12):
                    found.append((load, proportion))
            self._options[key] = tuple(reversed(found))
        return self._options[key]

    @cached_property
    def least_cycle_s(self) -> float:
        """Load of the busiest IPU of the best split, memory ignored: seconds per microbatch."""
        count, ipus = len(self.ground.layers), self.settings.num_ipus
        best = [self.options(0, 0, end)[0][0] for end in range(count + 1)]
        best[: self.least_layers[0]] = [float("inf")] * self.least_layers[0]
        for ipu in range(1, ipus):
            least = self.least_layers[ipu]
            best = [
                min(
                    (max(best[start], self.options(ipu, start, end)[0][0])
                     for start in range(end + 1 - least)),
                    default=float("inf"),
                )
                for end in range(count + 1)
            ]  # fmt: skip
        return best[count]


@dataclass(frozen=True)
class Bytes:
    """Bytes of the fullest tile of the cells of one setting, and seconds of its splits, as seen."""

    ground: Ground
    settings: IPUSettings
    known: dict[Cell, int] = field(default_factory=dict)
    times: dict[tuple[tuple[int, ...], tuple[float, ...]], float] = field(default_factory=dict)

    def key(self, ipu: int, start: int, end: int, proportion: float) -> Cell:
        """Name a cell; where all layers are equal only their number counts."""
        if self.ground.alike:
            start, end = 0, end - start
        return (ipu, start, end, proportion)

    def look(self, counts: Sequence[int], proportions: Sequence[float]) -> None:
        """Predict the memory of one split, and remember every IPU's."""
        ends = [0, *accumulate(counts)]
        settings = replace(
            self.settings, layers_per_ipu=tuple(counts), proportions=tuple(proportions)
        )
        layout = make_layout(self.ground.graph, settings)
        memory = ipu_memory(
            self.ground.graph, layout, settings, self.ground.chip, self.ground.calibration
        )
        for ipu, (start, end) in enumerate(pairwise(ends)):
            key = self.key(ipu, start, end, proportions[ipu])
            self.known[key] = memory[ipu].fullest_tile_bytes(self.ground.chip)


def _running(values: Sequence[float]) -> list[float]:
    return [0.0, *accumulate(values)]
