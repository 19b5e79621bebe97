"""Splits whose vocabulary is spread over stages.

A share takes ``entry + rate x rows`` seconds (``VocabularyRate``, found by pricing two shares), so
the search needs no new kind of variable: the rows become a chain of equal chunks, blocks that
nothing depends on and that any stage with other blocks may take, next to what is left of the model
without vocabulary. Which stages hold how many chunks is then part of the split, exact with memory,
recomputation and messages, and proven like every split. Behind the search the rows of the best
splits are shared out again, row by row, so that the holders are equally busy: for a time T of the
busiest one a stage with load L has room for ``(T - L - entry) / rate`` rows, and the least T is
``(sum of L + n entry + rate rows) / n`` for the n least busy stages.

Where a schedule puts several stages on a device, or stages share memory or devices, the chunks are
left out: the model without vocabulary is split, and the rows are shared out behind it.

The bound holds for every sharing. Of n devices with rows each pays for a share, and the busiest has
an n-th of the rows or more; some device has its share of all microbatches' work; and the paths
through the steady part of every stage (``one_stage.py``), weighted so that they count every stage
alike, are no shorter than their mean. The least of all n is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import inf

import numpy as np

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import PlannedStage
from ipu_pipeline.planner.options.block_cost import (
    BlockChoice,
    BlockCost,
    GraphCosts,
    VocabularyChunks,
)
from ipu_pipeline.planner.options.vocabulary import lookups, vocabulary_rows
from ipu_pipeline.planner.options.vocabulary_shares import Share, VocabularyShares
from ipu_pipeline.planner.schedules import PipelineShape, critical_paths, schedule_kind
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.parallel import pipeline_shapes
from ipu_pipeline.planner.search.pipeline_search import search
from ipu_pipeline.planner.search.problem import Problem
from ipu_pipeline.planner.search.result import Partition
from ipu_pipeline.planner.search.step_bound import least_path_s

# Boundaries with chunks that the fast search sweeps in about a second.
MOST_SETS = 2600
MOST_CHUNKS = 64
MOST_TRIED = 4  # splits of the search that are priced
PROOF_S = 5.0  # of the search of one depth, where there is no time limit

Measured = Mapping[str, tuple[float, float]]
CostsOf = Callable[[BlockGraph, Measured], GraphCosts]


@dataclass(frozen=True)
class VocabularyRate:
    """What a share costs, by its rows.

    Attributes:
        entry_s: Seconds a microbatch, besides those of the rows.
        asking_s: Of ``entry_s``, what the last stage has for every other one that it asks.
        computed_s: Of ``entry_s``, what is computed.
        message_s: Its messages, over the fastest link.
        row_s: Seconds a microbatch and row.
        row_space: Bytes a row, besides weights and their state.
        space: Bytes besides those of the rows.
        weights: Bytes of weights, gradients and optimizer state of all rows, by parameter.
    """

    entry_s: float
    asking_s: float
    computed_s: float
    message_s: float
    row_s: float
    row_space: float
    space: float
    weights: Mapping[str, int]


@dataclass(frozen=True)
class SpreadSearch:
    """Splits one model with its vocabulary spread.

    Attributes:
        graph: The model, with whole blocks.
        machine: Where it runs.
        schedule: Name of the schedule.
        costs_of: Prices the blocks of a graph, of which some were measured.
        step: Seconds of an optimizer step of a split, ``inf`` where it does not fit.
        measured_s: Forward and backward seconds of the model's blocks, where they were measured.
    """

    graph: BlockGraph
    machine: Machine
    schedule: str
    costs_of: CostsOf
    step: Callable[[Partition], float]
    measured_s: Measured = field(default_factory=dict)

    @cached_property
    def spread(self) -> VocabularyShares:
        """What is shared out."""
        return VocabularyShares(self.graph, with_lookups=not self.machine.shared_memory)

    @cached_property
    def _two(self) -> tuple[GraphCosts, GraphCosts, tuple[Share, Share]]:
        """Prices with all rows, and with half of them, in one share."""
        size, found = self.spread.size, []
        for rows in (size, size // 2):
            graph, (share,) = self.spread.shared([(0, rows)])
            measured_s = self.spread.measured(self.measured_s, [(0, rows)])
            found.append((self.costs_of(graph, measured_s), share))
        (all_of, first), (half, second) = found
        return all_of, half, (first, second)

    @cached_property
    def rate(self) -> VocabularyRate:
        """What a share costs."""
        (costs, fewer, shares), size = self._two, self.spread.size
        (whole_s, space), (half_s, less) = (
            _total(one, share) for one, share in zip((costs, fewer), shares, strict=True)
        )
        left = size - size // 2
        row_s, row_space = (whole_s - half_s) / left, (space - less) / left
        machine = costs.ranks or self.machine
        link = None if machine.shared_memory else machine.board_link or machine.link
        messages = self.spread.message_s(link, costs.message_overlap)
        computed_s = max(0.0, whole_s - row_s * size)
        links = {link, None if link is None else machine.link}
        return VocabularyRate(
            entry_s=computed_s + sum(messages),
            computed_s=computed_s,
            message_s=min(sum(self.spread.message_s(x, costs.message_overlap)) for x in links),
            asking_s=0.0 if costs.message_overlap else messages[0],
            row_s=max(row_s, 1e-15),  # products that take no time are shared out evenly
            row_space=row_space,
            space=max(0.0, space - row_space * size),
            weights={
                fqn: num_bytes
                for name in shares[0].names
                for fqn, num_bytes in costs.blocks[name].weight_bytes.items()
            },
        )

    def split(self, limits: Constraints, known_depth: int | None = None) -> Partition:
        """Return the best split with a spread vocabulary.

        Args:
            limits: What a split must respect.
            known_depth: Stages of a good split without one; tried beside the deepest pipeline,
                where the depth is free.

        Raises:
            PartitionError: Nothing fits.
            PlanError: The vocabulary cannot be spread.
        """
        if limits.num_stages is None and isinstance(limits.vocabulary, tuple):
            limits = replace(limits, num_stages=len(limits.vocabulary))
        shapes = pipeline_shapes(self.graph, self._two[0].ranks or self.machine, limits)
        shapes = [replace(one, spread=tuple(range(one.num_stages))) for one in shapes]
        depths = {max(one.num_stages for one in shapes)}
        if known_depth in {one.num_stages for one in shapes}:
            depths |= {known_depth}
        tried: list[Partition] = []
        for depth in sorted(depths, reverse=True):
            one = replace(limits, num_stages=depth, time_limit_s=limits.time_limit_s or PROOF_S)
            tried += self._of_depth(one)
        best = min(tried, key=lambda item: item.objective, default=None)
        if best is None or best.objective == inf:
            raise PartitionError(
                "no split with a vocabulary that is spread over stages fits; use more devices, or "
                "plan without vocabulary"
            )
        return best.with_bound(min(map(self._bound_s, shapes)))

    def _of_depth(self, limits: Constraints) -> list[Partition]:
        """Return priced splits of one depth; none where nothing fits.

        Of splits that the search cannot tell apart, those with even passes wait least for each
        other: the model without vocabulary is always split, too.
        """
        tried: list[Partition] = []
        for chunks in sorted({0, self._num_chunks(limits)}):
            graph, costs = self._problem(chunks)
            machine = costs.ranks or self.machine
            machine = machine if chunks else self._with_room(machine, limits)
            for split in search(graph, costs, machine, limits).partitions[:MOST_TRIED]:
                tried += self._with_rows(split, chunks, limits)
        if limits.vocabulary == "auto":  # rows in one stage are not spread
            tried = [one for one in tried if one.vocabulary and len(one.vocabulary.rows) > 1]
        return [replace(one, objective=self.step(one)) for one in tried]

    def _num_chunks(self, limits: Constraints) -> int:
        """Return into how many chunks the rows are cut for the search; 0: into none."""
        costs, depth = self._two[0], limits.num_stages or 1
        alone = limits.replicas == 1 or costs.ranks is not None
        fast = limits.schedule == "1f1b" and alone and not limits.update_s
        shared = self.machine.shared_memory or limits.stage_devices not in (
            None, tuple(range(depth)))  # fmt: skip
        if not fast or shared or limits.vocabulary != "auto" or limits.tied != "free":
            return 0
        most = min(MOST_CHUNKS, MOST_SETS // (len(self.graph.blocks) + 1))
        return min(self.spread.size, max(most - most % depth, depth))

    def _with_room(self, machine: Machine, limits: Constraints) -> Machine:
        """Return a machine with room for an even share of the rows on every device."""
        rate, size = self.rate, self.spread.size
        of_pipeline = max(1, len(machine.devices) // limits.replicas)
        parts = 1 if machine.shared_memory else min(limits.num_stages or 1, of_pipeline)
        held = (sum(rate.weights.values()) + rate.row_space * size) / parts + rate.space
        if machine.shared_memory:
            held /= len(machine.devices)
        devices = tuple(
            replace(one, reserved_bytes=min(one.memory_bytes, one.reserved_bytes + round(held)))
            for one in machine.devices
        )
        return replace(machine, devices=devices)

    def _bound_s(self, shape: PipelineShape) -> float:
        """Return a bound of the step of every split of ``shape``, whoever holds which rows."""
        costs, rate, names = self._two[0], self.rate, tuple(self.graph.block_index)
        speeds = {device: costs.speed(device) for device in shape.devices}
        rest = Problem(names, (0,) * len(names), tuple(costs.blocks[n].choices for n in names))
        kind, fastest = schedule_kind(self.schedule), max(speeds.values())
        work_s = sum(option.total_s for option in rest.fastest)
        passes, of_rows = 0.0, 0.0
        if shape.own_devices and kind.name == "1f1b":
            passes, of_rows = steady_counts(shape)
        count, size, speed = shape.num_microbatches, self.spread.size, sum(speeds.values())

        def least_s(holders: int) -> float:
            entry_s = rate.computed_s + rate.message_s * (holders > 1)
            rows_s = holders * entry_s + rate.row_s * size
            return max(
                count * (work_s + rows_s) / speed,
                count * rows_s / holders / fastest,
                (passes * work_s + of_rows * rows_s) / fastest,
            )

        path_s = least_path_s(rest, critical_paths(kind, shape), fastest)
        return max(path_s, min(map(least_s, range(1, len(speeds) + 1))))

    def _problem(self, chunks: int) -> tuple[BlockGraph, GraphCosts]:
        """Return the model without vocabulary, and its rows as chunks."""
        costs, rate, size = self._two[0], self.rate, self.spread.size
        graph, _ = self.spread.shared([])
        names = tuple(f"rows {number + 1}/{chunks}" for number in range(chunks))
        order = tuple(
            TensorSpec(f"{name} done", (0,), "float32", producer=name, consumers=(behind,))
            for name, behind in pairwise(names)
        )
        part = size / max(1, chunks)
        choice = BlockChoice(
            0.0, rate.row_s * part, workspace_bytes=rate.space, fixed_bytes=rate.row_space * part
        )
        blocks = {block.name: costs.blocks[block.name] for block in graph.blocks}
        for name in lookups(self.graph, self.spread.pair):  # what is spread is not serialized
            whole = tuple(way for way in blocks[name].choices if way.serialize_factor == 1)
            blocks[name] = replace(blocks[name], choices=whole)
        for name in names:
            held = {f"{fqn} {name}": -(-n // chunks) for fqn, n in rate.weights.items()}
            blocks[name] = BlockCost((choice,), held)
        return (
            replace(
                graph,
                blocks=(*graph.blocks, *map(Block, names)),
                tensors=(*graph.tensors, *order),
            ),
            replace(
                costs,
                blocks=blocks,
                together=((self.spread.pair.head.name, self.spread.pair.loss.name),),
                update_s={},  # the search is of the passes; the price of a plan has all
                chunks=VocabularyChunks(names, rate.entry_s),
            ),
        )

    # -- rows ------------------------------------------------------------------------------------

    def _with_rows(self, split: Partition, chunks: int, limits: Constraints) -> Iterator[Partition]:
        """Yield a split of the search with the rows of its chunks, and with rows shared again."""
        real = self.graph.block_index
        counts = [sum(name not in real for name in stage.blocks) for stage in split.stages]
        stages = tuple(_only(stage, real) for stage in split.stages)
        plain = replace(split, stages=stages)
        if limits.vocabulary != "auto":
            rows = vocabulary_rows(self.graph, len(stages), limits.vocabulary or "even")
            yield replace(plain, vocabulary=rows)
            return
        if chunks:
            yield replace(plain, vocabulary=vocabulary_rows(self.graph, len(stages), counts))
        shares = self._balanced(stages, [n / max(1, chunks) for n in counts], limits)
        yield replace(plain, vocabulary=vocabulary_rows(self.graph, len(stages), shares))

    def _balanced(
        self, stages: Sequence[PlannedStage], parts: Sequence[float], limits: Constraints
    ) -> list[float]:
        """Return the rows of every stage that make the holders equally busy.

        Of a device with several stages, the last one has its rows.

        Args:
            stages: With the seconds of their part of the rows.
            parts: Parts of all rows, by stage.
            limits: The number of microbatches is read.
        """
        loads: dict[int, float] = {}
        for stage, part in zip(stages, parts, strict=True):
            of_rows = part * self.spread.size * self.rate.row_s + self.rate.entry_s * (part > 0)
            load_s = stage.forward_s + stage.backward_s + stage.transfer_s
            load_s -= of_rows / self._two[0].speed(stage.device)
            loads[stage.device] = loads.get(stage.device, 0.0) + load_s
        loads[stages[-1].device] += max(0, len(loads) - 2) * self.rate.asking_s
        speeds = [self._two[0].speed(device) for device in loads]
        rows = balanced_rows(
            list(loads.values()), speeds, self.rate.entry_s, self.rate.row_s, self.spread.size,
            limits.num_microbatches,
        )  # fmt: skip
        found = [0.0] * len(stages)
        for device, own in zip(loads, rows, strict=True):
            last = max(n for n, stage in enumerate(stages) if stage.device == device)
            found[last] = own if own >= 1 else 0.0
        return found


def balanced_rows(
    loads: Sequence[float],
    speeds: Sequence[float],
    entry_s: float,
    row_s: float,
    size: int,
    num_microbatches: int,
) -> list[float]:
    """Share rows out so that ``(G - 1) x busiest device + sum of all devices`` is least.

    Args:
        loads: Seconds a microbatch of every device without rows.
        speeds: Of every device.
        entry_s: Seconds of a device with any rows, at speed 1.
        row_s: Seconds of a row, at speed 1.
        size: Number of rows.
        num_microbatches: G.

    Returns:
        Rows of every device, not whole.
    """
    least = [load + entry_s / speed for load, speed in zip(loads, speeds, strict=True)]
    order = sorted(range(len(loads)), key=least.__getitem__)
    found, best_s = [0.0] * len(loads), inf
    for count in range(1, len(order) + 1):
        own, speed = order[:count], sum(speeds[n] for n in order[:count])
        level_s = (sum(least[n] * speeds[n] for n in own) + row_s * size) / speed
        if level_s <= least[own[-1]]:
            break
        added_s = sum(level_s - loads[n] for n in own)
        step_s = (num_microbatches - 1) * max(level_s, *loads) + added_s
        if step_s < best_s:
            best_s, found = step_s, [0.0] * len(loads)
            for n in own:
                found[n] = (level_s - least[n]) * speeds[n] / row_s
    return found


def _total(costs: GraphCosts, share: Share) -> tuple[float, float]:
    """Seconds and bytes of workspace of a share."""
    plain = [costs.blocks[name].plain for name in share.names]
    return sum(way.total_s for way in plain), max(way.workspace_bytes for way in plain)


def _only(stage: PlannedStage, names: Mapping[str, int]) -> PlannedStage:
    """Return a stage without blocks that are none of the model's."""
    return replace(stage, blocks=tuple(name for name in stage.blocks if name in names))


def steady_counts(shape: PipelineShape) -> tuple[float, float]:
    """Return how often a mean of paths through all stages of 1f1b counts every stage and its rows.

    The path of stage s with w stages behind it: the first microbatch to the end and back, the row
    of s from its first backward to its last forward pass, the last microbatch to the end and back.
    """
    kind, depth, count = schedule_kind("1f1b"), shape.num_stages, shape.num_microbatches
    short = kind.shortened(shape, 4 * depth)
    left = count - short.num_microbatches
    passes, rows = np.full((depth, depth), 1.0), np.zeros(depth)
    for stage, row in enumerate(kind.rows(short).rows):
        own = count - (depth - 1 - stage) - 1
        if own < 1:
            return 0.0, 0.0
        kinds = [action.kind for action in row]
        begin, end = kinds.index("B"), len(kinds) - kinds[::-1].index("F")
        if stage == depth - 1:
            own, begin, end = count, 0, len(kinds) - kinds[::-1].index("B")
        passes[stage, stage], passes[stage, stage + 1 :] = own, 2.0
        rows[stage] = left + min(kinds[begin:end].count("S"), kinds[begin:end].count("T"))
    try:
        weights = np.linalg.solve(passes.T, np.ones(depth))
    except np.linalg.LinAlgError:
        return 0.0, 0.0
    if weights.min() < 0:
        return 0.0, 0.0
    total = float(weights.sum())
    return 1.0 / total, float((weights * rows).min()) / total
