"""What a configuration costs without a search: a bound, an estimate, a split of even stages.

The bound holds for every split:

* a rank has at least its share of all microbatches' passes: ``G T / pp`` for passes of T seconds;
* 1f1b with G > pp: ``(G + pp - 1) T / pp``. The paths through the steady part of every stage
  (:mod:`ipu_pipeline.planner.schedules.kinds.one_stage`) are equally long where the stages are
  equal, and a mean of them with weights above 0 counts every stage alike;
* to both comes the least update of a rank, and what recomputation adds that memory asks for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import inf
from typing import Any

from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings
from ipu_pipeline.backends.cluster.prices.rank import RankBlock, RankParameters, RankPricer
from ipu_pipeline.backends.cluster.prices.rank_plan import Known, ways_of
from ipu_pipeline.backends.cluster.prices.rank_step import BUFFER_BYTES
from ipu_pipeline.backends.cluster.tune.space import GpuConfiguration
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import PlannedStage
from ipu_pipeline.planner.schedules import schedule_kind
from ipu_pipeline.planner.schedules.objective import StagePrice


@dataclass(frozen=True)
class ChainProfile:
    """What every block costs a rank, in execution order; equal blocks are one object.

    Attributes:
        plain: Blocks as they run plainly, but for parts that are recomputed.
        again: The same with whole layers recomputed.
    """

    plain: tuple[RankBlock, ...]
    again: tuple[RankBlock, ...]

    @cached_property
    def parameters(self) -> RankParameters:
        """All weights."""
        return sum((one.parameters for one in self.plain), RankParameters())

    @cached_property
    def total_s(self) -> float:
        """Seconds of one microbatch's passes through all blocks."""
        return sum(one.forward_s + one.backward_s for one in self.plain)

    @cached_property
    def saved_bytes(self) -> float:
        """Bytes that one microbatch keeps in all blocks."""
        return sum(one.saved_bytes for one in self.plain)

    @cached_property
    def layers(self) -> tuple[tuple[float, float], ...]:
        """Seconds per byte and bytes that recomputing every whole layer saves, cheapest first."""
        pairs = zip(self.plain, self.again, strict=True)
        saved = [
            (other.backward_s - plain.backward_s, plain.saved_bytes - other.saved_bytes)
            for plain, other in pairs
            if plain is not other and plain.saved_bytes > other.saved_bytes
        ]
        return tuple(sorted((seconds / size, size) for seconds, size in saved))

    def recomputed_s(self, num_bytes: float) -> float:
        """Return the least seconds by which recomputation saves so many bytes of a microbatch.

        Infinite where all layers do not save as many; parts of layers count.
        """
        found = 0.0
        for slope, size in self.layers:
            if num_bytes <= 0:
                return found
            found += slope * min(size, num_bytes)
            num_bytes -= size
        return found if num_bytes <= 0 else inf


@dataclass(frozen=True)
class QuickSplit:
    """A configuration with stages of even time.

    Attributes:
        config: The configuration.
        stages: Its stages.
        seconds: Estimate of its step.
        num_bytes: Estimate of its fullest rank.
    """

    config: GpuConfiguration
    stages: tuple[PlannedStage, ...]
    seconds: float
    num_bytes: float


@dataclass(frozen=True)
class QuickPrice:
    """One configuration.

    Attributes:
        config: The configuration.
        chain: Its blocks.
        pricer: What a rank keeps, updates and sends.
        capacity: Bytes of a rank that stages can use.
    """

    config: GpuConfiguration
    chain: ChainProfile
    pricer: RankPricer
    capacity: float

    @property
    def state_bytes(self) -> float:
        """Bytes of weights, gradients and optimizer state of all ranks of a pipeline."""
        return self.pricer.state_bytes(self.chain.parameters)

    def bound_s(self, *, spread: bool = False) -> float:
        """Return a bound of the step over all splits; infinite where nothing fits.

        All ranks together keep one microbatch of every block at least.

        Args:
            spread: Also over those whose vocabulary is spread: their rows are computed beside the
                passes that fill and flush the pipeline.
        """
        pp, count, room = self.config.sizes.pp, self.config.num_microbatches, self.capacity
        if self.state_bytes > pp * room:
            return inf
        needed = self.state_bytes + self.chain.saved_bytes
        more_s = self.chain.recomputed_s(needed - pp * room)
        passes = count / pp
        if self.config.schedule == "1f1b" and count > pp and not spread:
            passes = (count + pp - 1) / pp
        total_s = passes * (self.chain.total_s + more_s)
        return total_s + self.pricer.update_s(self.chain.parameters) / pp

    def even_s(self) -> float:
        """Return the seconds of a step if all stages were equal; infinite where they do not fit."""
        sizes, count = self.config.sizes, self.config.num_microbatches
        held = self.chain.parameters.times(1 / sizes.pp)
        flying = in_flight(self.config, 0) / sizes.vpp
        kept = flying * self.chain.saved_bytes / sizes.pp
        space = max(one.workspace_bytes for one in self.chain.plain)
        over = self.pricer.state_bytes(held) + kept + space - self.capacity
        more_s = self.chain.recomputed_s(over * sizes.pp / flying)
        each_s = (self.chain.total_s + more_s) / sizes.pp
        return (count + (sizes.pp - 1) / sizes.vpp) * each_s + self._once_s(held, each_s / 2)

    def _once_s(self, held: RankParameters, beside_s: float) -> float:
        """Seconds per step of a rank with some weights, one backward pass beside."""
        update_s = self.pricer.update_s(held)
        return update_s + max(0.0, self.pricer.reduction_s(held) - beside_s)

    def split(self, only: str | None = None) -> QuickSplit | None:
        """Cut the blocks into stages of even time; recompute layers where a rank is too full.

        Args:
            only: ``none`` or parts: no layer is recomputed whole; ``full``: every layer is.

        Returns:
            The split with estimates, or ``None`` where it does not fit so.
        """
        chain, shape = self.chain, self.config.shape
        chosen = list(chain.again if only == "full" else chain.plain)
        ends = even_ends([one.forward_s + one.backward_s for one in chosen], shape.num_stages)
        if ends is None:
            return None
        spans = [range(begin, end) for begin, end in zip((0, *ends), ends, strict=False)]
        fullest = once_s = 0.0
        for rank in range(self.config.sizes.pp):
            own = [
                span for span, device in zip(spans, shape.devices, strict=True) if device == rank
            ]
            places = [place for span in own for place in span]
            flying = in_flight(self.config, rank) / len(own)
            num_bytes = self._fitted(chosen, places, flying, free=only is None)
            if num_bytes > self.capacity:
                return None
            fullest = max(fullest, num_bytes)
            blocks = [chosen[place] for place in places]
            held = sum((one.parameters for one in blocks), RankParameters())
            once_s = max(once_s, self._once_s(held, sum(one.backward_s for one in blocks)))
        prices = [
            StagePrice(sum(chosen[place].forward_s for place in span),
                       sum(chosen[place].backward_s for place in span), 0.0, 0.0)
            for span in spans
        ]  # fmt: skip
        form = schedule_kind(self.config.schedule).objective(shape)
        seconds = form.seconds(shape.devices, prices) + once_s
        return QuickSplit(self.config, self._stages(spans, chosen), seconds, fullest)

    def _fitted(
        self, chosen: list[RankBlock], places: Sequence[int], flying: float, *, free: bool
    ) -> float:
        """Recompute the layers of a rank until it fits; return the bytes that it then holds."""
        own = [chosen[place] for place in places]
        held = self.pricer.state_bytes(sum((one.parameters for one in own), RankParameters()))
        kept = flying * sum(one.saved_bytes for one in own)
        space = max(one.workspace_bytes for one in own)
        for place in places if free else ():
            if held + kept + space <= self.capacity:
                break
            plain, other = self.chain.plain[place], self.chain.again[place]
            if other is not plain:
                chosen[place] = other
                kept -= flying * (plain.saved_bytes - other.saved_bytes)
                space = max(space, other.workspace_bytes)
        return held + kept + space

    def _stages(
        self, spans: Sequence[range], chosen: Sequence[RankBlock]
    ) -> tuple[PlannedStage, ...]:
        names, plain = tuple(self.pricer.graph.block_index), self.chain.plain
        return tuple(
            PlannedStage(
                device,
                tuple(names[place] for place in span),
                tuple(names[place] for place in span if chosen[place] is not plain[place]),
            )
            for device, span in zip(self.config.shape.devices, spans, strict=True)
        )


class Profiles:
    """Prices of configurations of one model, by the sizes that matter to a block."""

    def __init__(
        self, graphs: Mapping[int, BlockGraph], machine: Machine, settings: GpuSettings
    ) -> None:
        """Price ``graphs`` (by micro batch) on ``machine``."""
        self._graphs, self._machine = graphs, machine
        self._engines = {
            size: settings.rank_engine(graph, machine) for size, graph in graphs.items()
        }
        self._chains: dict[tuple[Any, ...], ChainProfile] = {}
        self._blocks: Known = {}
        rooms = (one.memory_bytes - one.reserved_bytes for one in machine.devices)
        # Bytes of a GPU that stages can use.
        self.capacity = float(min(rooms) - BUFFER_BYTES)

    def of(self, config: GpuConfiguration) -> QuickPrice:
        """Return the price of a configuration."""
        sizes = config.sizes
        size = sizes.micro_batch
        pricer = RankPricer(self._graphs[size], self._machine, sizes, self._engines[size])
        key: tuple[Any, ...] = (size, sizes.tp, sizes.cp, sizes.ep, sizes.recompute)
        if sizes.zero_stage >= 2:
            key = (*key, sizes.zero_stage, sizes.dp, sizes.pp)
        if key not in self._chains:
            ways = list(ways_of(pricer, known=self._blocks))
            plain, again = (tuple(own[place] for own in ways) for place in (0, -1))
            self._chains[key] = ChainProfile(plain, again)
        return QuickPrice(config, self._chains[key], pricer, self.capacity)


def in_flight(config: GpuConfiguration, rank: int) -> int:
    """Return about how many stages' microbatches a rank keeps at one time."""
    pp, vpp, count = config.sizes.pp, config.sizes.vpp, config.num_microbatches
    if config.schedule == "gpipe":
        return vpp * count
    if vpp == 1:
        kept = pp - rank
    elif schedule_kind(config.schedule).place(3 * pp, pp) is None:
        kept = 2 * pp  # in a V: all ranks alike
    else:
        kept = (vpp - 1) * pp + 2 * (pp - 1 - rank) + 1
    return min(kept, vpp * count)


def even_ends(loads: list[float], stages: int) -> tuple[int, ...] | None:
    """Return the blocks done after every stage, so that the busiest stage has least to do."""
    count = len(loads)
    if stages > count:
        return None
    total = [0.0, *accumulate(loads)]
    low, high = max(max(loads), total[-1] / stages), total[-1]
    best = _cut(total, high, stages)
    for _ in range(30):
        middle = (low + high) / 2
        found = _cut(total, middle, stages)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _cut(total: list[float], limit: float, stages: int) -> tuple[int, ...] | None:
    """Fill stages up to ``limit``, later ones first; ``None`` where they do not suffice."""
    count, begin, ends = len(total) - 1, 0, []
    for stage in range(stages):
        left = stages - 1 - stage
        end = bisect_right(total, total[begin] + limit * (1 + 1e-12)) - 1
        end = max(begin + 1, min(end, count - left))
        ends.append(end)
        begin = end
    return tuple(ends) if begin == count else None
