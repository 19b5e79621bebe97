"""Tune a model for GPUs and a batch: the outer loop over every parallel size.

Configurations come with a bound each (:mod:`~ipu_pipeline.backends.cluster.tune.space`). First a
quick split of every one that may be the best (stages of even time, layers recomputed where memory
asks for it) finds good plans; then the one search (:mod:`ipu_pipeline.planner.search`) takes the
configurations in the order of their bounds, until none is below the best plan or the time is over.
Every plan is priced by :func:`~ipu_pipeline.backends.cluster.prices.rank_plan.rank_price`; the
bound that is reported is the least one of all configurations that were not searched.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import inf
from typing import Any

from ipu_pipeline.backends.cluster.prices.rank import RankParameters
from ipu_pipeline.backends.cluster.prices.rank_plan import RankCosts, rank_step_of
from ipu_pipeline.backends.cluster.prices.rank_step import RankStep
from ipu_pipeline.backends.cluster.tune.space import (
    ChainProfile,
    GpuConfiguration,
    GpuRequest,
    Profiles,
    configurations,
    in_flight,
)
from ipu_pipeline.errors import PartitionError, PlanError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage
from ipu_pipeline.ir.rates import Rates, rates_of
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.price import make_plan, step_s
from ipu_pipeline.planner.schedules import schedule_kind
from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.search import Constraints
from ipu_pipeline.planner.search.pipeline_search import search
from ipu_pipeline.planner.search.result import Partition

# Seconds of this process's own work, which other processes do not shorten.
QUICK_S = 2.5  # of quick splits
EXACT_S = 5.0  # of everything
SPLIT_S = 1.5  # of the search of one configuration
_PRICED = 24  # quick splits that get their real price
_SLOWEST = 2.0  # points of the front take at most so many times the best step
Progress = Callable[[str, int, int], None]
Capture = Callable[[int], BlockGraph]


@dataclass(frozen=True)
class QuickSplit:
    """A configuration with stages of even time.

    Attributes:
        config: The configuration.
        ends: Blocks done after every stage.
        recompute: Positions of the blocks that are recomputed whole.
        seconds: Estimate of its step.
        num_bytes: Estimate of its fullest rank.
    """

    config: GpuConfiguration
    ends: tuple[int, ...]
    recompute: frozenset[int]
    seconds: float
    num_bytes: float


@dataclass(frozen=True)
class GpuPoint:
    """One point of the front.

    Attributes:
        plan: Priced; its bound is that of all plans.
        config: Its configuration.
    """

    plan: Plan
    config: GpuConfiguration

    @cached_property
    def step(self) -> RankStep:
        """Its pipeline."""
        return rank_step_of(self.plan)

    @cached_property
    def memory_bytes(self) -> float:
        """Bytes of the fullest GPU."""
        return self.step.peak_bytes

    @cached_property
    def rates(self) -> Rates:
        """Samples and tokens per second, and the share of the GPUs' peak."""
        found = rates_of(self.plan)
        assert found is not None  # a step takes some time
        return found

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all replicas per second; samples, where the input is no text."""
        return self.rates.tokens_per_s or self.rates.samples_per_s

    @property
    def mfu(self) -> float:
        """Share of the peak of all GPUs."""
        return self.rates.mfu or 0.0


@dataclass
class GpuTuneResult:
    """What the search found.

    Attributes:
        request: What was asked.
        machine: The GPUs.
        points: Of the front, quickest first, each smaller than the one before.
        bound_s: No configuration of the set has a quicker plan.
        configurations: How many there are.
        searched: How many had their splits searched.
        seconds: Time of the search.
    """

    request: GpuRequest
    machine: Machine
    points: list[GpuPoint] = field(default_factory=list)
    bound_s: float = 0.0
    configurations: int = 0
    searched: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> GpuPoint:
        """The quickest point."""
        return self.points[0]


def tune(
    capture: Capture,
    machine: Machine,
    request: GpuRequest,
    model: ModelIdentity,
    progress: Progress = lambda *_: None,
    time_limit_s: float = EXACT_S,
) -> GpuTuneResult:
    """Search every configuration of ``request`` on all GPUs of ``machine``.

    Args:
        capture: Returns the model captured for a micro batch.
        machine: GPUs with known kernels.
        request: What is fixed.
        model: Written into the plans.
        progress: Called with what is done, how much of it, and of how much.
        time_limit_s: For everything but capturing.

    Raises:
        PartitionError: No configuration uses all GPUs and divides the batch, or none fits.
        PlanError: The machine's kernels are not known.
    """
    if machine.devices[0].kernels is None:
        raise PlanError(
            f"{machine.name} gives no kernels for its devices: what GPUs reach of their peaks; "
            "tune for a known machine such as h100-x64, or add kernels to the machine file"
        )
    first = capture(request.micro_batch or 1)
    found = configurations(request, first, machine)
    graphs = {request.micro_batch or 1: first}
    sizes = sorted({config.sizes.micro_batch for config in found})
    for number, size in enumerate(sizes):
        progress("capturing the model", number, len(sizes))
        if size not in graphs:
            graphs[size] = capture(size)
    begin = time.process_time()
    made = _Search(graphs, machine, request, model, begin + time_limit_s, progress).run(found)
    made.seconds = time.process_time() - begin
    return made


class _Search:
    """The search over one set of configurations."""

    def __init__(
        self,
        graphs: Mapping[int, BlockGraph],
        machine: Machine,
        request: GpuRequest,
        model: ModelIdentity,
        deadline: float,
        progress: Progress,
    ) -> None:
        self.graphs, self.machine, self.request, self.model = graphs, machine, request, model
        self.deadline, self.progress = deadline, progress
        self.profiles = Profiles(graphs, machine, request.settings)
        self.points: dict[tuple[GpuConfiguration, tuple[PlannedStage, ...]], GpuPoint] = {}

    def run(self, found: list[GpuConfiguration]) -> GpuTuneResult:
        """Return the front and the bound."""
        bounds = {config: self._bound_s(config) for config in found}
        for split in self._promising(self._quick(bounds)):
            self._price(split.config, self._stages(split))
        searched = self._exact(bounds)
        if not self.points:
            raise PartitionError(self._misfit(bounds))
        best_s = min(point.plan.objective_s for point in self.points.values())
        bound_s = min(best_s, *bounds.values())
        points = [
            GpuPoint(replace(point.plan, lower_bound_s=bound_s), point.config)
            for point in front_of(self.points.values())
            if point.plan.objective_s <= _SLOWEST * best_s
        ]
        return GpuTuneResult(self.request, self.machine, points, bound_s, len(found), searched)

    def _bound_s(self, config: GpuConfiguration) -> float:
        pricer = self.profiles.pricer(config)
        return self.profiles.of(config).bound_s(config, pricer, self.profiles.capacity)

    def _estimate_s(self, config: GpuConfiguration) -> float:
        pricer = self.profiles.pricer(config)
        return self.profiles.of(config).estimate_s(config, pricer, self.profiles.capacity)

    # -- quick splits ----------------------------------------------------------------------------

    def _quick(self, bounds: Mapping[GpuConfiguration, float]) -> list[QuickSplit]:
        """Return splits of the configurations that may be the best, the likely ones first."""
        estimates = {
            config: max(bound, self._estimate_s(config))
            for config, bound in bounds.items()
            if bound < inf
        }
        until = min(self.deadline, time.process_time() + QUICK_S)
        found: list[QuickSplit] = []
        best_s = inf
        ordered = sorted(estimates, key=lambda config: estimates[config])
        for number, config in enumerate(ordered):
            late = time.process_time() > until and found
            if late or estimates[config] > _SLOWEST * best_s:
                break
            self.progress("looking for good plans", number, len(ordered))
            split = quick_split(
                self.profiles.of(config), config, self._once_s(config), self._state(config),
                self.profiles.capacity, only=self.request.recompute,
            )  # fmt: skip
            if split is not None:
                found.append(split)
                best_s = min(best_s, split.seconds)
        return found

    def _once_s(self, config: GpuConfiguration) -> Callable[[RankParameters, float], float]:
        pricer = self.profiles.pricer(config)
        return lambda held, beside_s: (
            pricer.update_s(held) + max(0.0, pricer.reduction_s(held) - beside_s)
        )

    def _state(self, config: GpuConfiguration) -> Callable[[RankParameters], float]:
        return self.profiles.pricer(config).state_bytes

    def _promising(self, splits: list[QuickSplit]) -> list[QuickSplit]:
        """Return the quickest splits, and those that are the quickest of so few bytes."""
        ordered = sorted(splits, key=lambda split: (split.seconds, split.num_bytes))
        least, small = inf, []
        for split in ordered:
            if split.num_bytes < 0.97 * least:
                least = split.num_bytes
                small.append(split)
        half = _PRICED // 2
        return list(dict.fromkeys([*ordered[:half], *small[:half]]))

    def _stages(self, split: QuickSplit) -> tuple[PlannedStage, ...]:
        graph = self.graphs[split.config.sizes.micro_batch]
        names, begin, stages = tuple(graph.block_index), 0, []
        for device, end in zip(split.config.shape.devices, split.ends, strict=True):
            again = tuple(names[n] for n in range(begin, end) if n in split.recompute)
            stages.append(PlannedStage(device, names[begin:end], again))
            begin = end
        return tuple(stages)

    # -- exact ones ------------------------------------------------------------------------------

    def _exact(self, bounds: dict[GpuConfiguration, float]) -> int:
        """Search the configurations in the order of their bounds; note what is proven of each."""
        searched = 0
        for config in sorted(bounds, key=lambda item: bounds[item]):
            best_s = min((p.plan.objective_s for p in self.points.values()), default=inf)
            late = time.process_time() > self.deadline and self.points
            if bounds[config] >= best_s or late:
                break
            self.progress("searching splits", searched, len(bounds))
            bounds[config] = max(bounds[config], self._searched(config, best_s))
            searched += 1
        return searched

    def _searched(self, config: GpuConfiguration, best_s: float) -> float:
        """Search the splits of one configuration; return the bound of all of them."""
        work, limits = self._work(config), self._limits(config)
        costs = RankCosts(work, replace(self.request.settings, **_own(config))).all()
        assert costs.ranks is not None
        try:
            found = search(work.graph, costs, costs.ranks, limits)
        except PartitionError:
            return inf  # the constraints leave no split
        if not found.partitions:
            return found.lower_bound
        priced = [(step_s(work, item), number) for number, item in enumerate(found.partitions)]
        seconds, number = min(priced)
        if seconds < inf:
            self._price(config, found.partitions[number].stages)
        return found.step_bound(min(seconds, best_s))

    def _limits(self, config: GpuConfiguration) -> Constraints:
        ways = {"none": "never", "full": "always"}
        chosen = self.request.recompute
        left_s = max(0.05, min(SPLIT_S, self.deadline - time.process_time()))
        return Constraints(
            num_stages=config.shape.num_stages,
            stage_devices=config.shape.devices,
            num_microbatches=config.num_microbatches,
            schedule=config.schedule,
            replicas=config.sizes.dp,
            execution_order=True,
            recompute=ways.get(chosen or "", "auto" if chosen is None else "never"),  # type: ignore[arg-type]
            time_limit_s=left_s,
        )

    def _work(self, config: GpuConfiguration) -> Workload:
        return Workload(
            self.graphs[config.sizes.micro_batch], self.machine, config.schedule,
            config.num_microbatches, config.sizes.dp, config.settings(self.request.settings),
        )  # fmt: skip

    def _price(self, config: GpuConfiguration, stages: tuple[PlannedStage, ...]) -> None:
        """Keep a plan by its real price, if it fits."""
        key = (config, stages)
        if key in self.points:
            return
        work = self._work(config)
        split = Partition(
            stages, 0.0, 0.0, "", config.schedule, config.num_microbatches, config.sizes.dp,
            work.settings,
        )  # fmt: skip
        plan = make_plan(self.model, work, split)
        if not plan.misfits:
            self.points[key] = GpuPoint(plan, config)

    def _misfit(self, bounds: Mapping[GpuConfiguration, float]) -> str:
        profiles = self.profiles
        least = min(
            (profiles.pricer(c).state_bytes(profiles.of(c).parameters) / c.sizes.pp, c.sizes.pp)
            for c in bounds
        )[0]
        return (
            f"none of {len(bounds)} configurations fits {len(self.machine.devices)} GPUs of "
            f"{self.machine.name}: weights, gradients and optimizer state alone take at least "
            f"{least / 1e9:.4g} GB of a GPU's {profiles.capacity / 1e9:.4g} GB; use more or larger "
            "GPUs, a shorter sequence, or fix fewer of the sizes"
        )


def _own(config: GpuConfiguration) -> dict[str, Any]:
    sizes = config.sizes
    return {
        "tp": sizes.tp, "cp": sizes.cp, "ep": sizes.ep, "zero_stage": sizes.zero_stage,
        "recompute": sizes.recompute,
    }  # fmt: skip


def front_of(points: Iterable[GpuPoint]) -> Iterator[GpuPoint]:
    """Yield the points of which none is quicker and smaller, quickest first."""
    least = inf
    for point in sorted(points, key=lambda p: (p.plan.objective_s, p.memory_bytes)):
        if point.memory_bytes < least:
            least = point.memory_bytes
            yield point


def quick_split(
    profile: ChainProfile,
    config: GpuConfiguration,
    once_s: Callable[[RankParameters, float], float],
    state: Callable[[RankParameters], float],
    capacity: float,
    *,
    only: str | None = None,
) -> QuickSplit | None:
    """Cut the blocks into stages of even time and recompute layers where a rank is too full.

    Args:
        profile: Prices of the blocks.
        config: The configuration.
        once_s: Seconds per step of a rank with some weights, one backward pass beside.
        state: Bytes of some weights.
        capacity: Bytes of a rank.
        only: ``none`` or parts: no layer is recomputed whole; ``full``: every layer is.

    Returns:
        The split with estimates, or ``None`` where it does not fit so.
    """
    chosen = profile.again if only == "full" else profile.plain
    loads = [one.forward_s + one.backward_s for one in chosen]
    ends = even_ends(loads, config.shape.num_stages)
    if ends is None:
        return None
    begins = (0, *ends[:-1])
    again: set[int] = set()
    if only == "full":
        again = {n for n, one in enumerate(profile.plain) if one is not profile.again[n]}
    fullest = worst_once_s = 0.0
    for rank in range(config.sizes.pp):
        own = [n for n, device in enumerate(config.shape.devices) if device == rank]
        places = [place for n in own for place in range(begins[n], ends[n])]
        flying = in_flight(config, rank) / len(own)
        more, num_bytes = _fitted(
            profile, places, flying, state, capacity, again, free=only is None
        )
        if num_bytes > capacity:
            return None
        again |= more
        fullest = max(fullest, num_bytes)
        blocks = [profile.again[n] if n in again else profile.plain[n] for n in places]
        held = sum((one.parameters for one in blocks), RankParameters())
        worst_once_s = max(worst_once_s, once_s(held, sum(one.backward_s for one in blocks)))
    prices = []
    for begin, end in zip(begins, ends, strict=True):
        own_blocks = [
            profile.again[n] if n in again else profile.plain[n] for n in range(begin, end)
        ]
        forward_s = sum(one.forward_s for one in own_blocks)
        backward_s = sum(one.backward_s for one in own_blocks)
        prices.append(StagePrice(forward_s, backward_s, 0.0, 0.0))
    form = schedule_kind(config.schedule).objective(config.shape)
    seconds = form.seconds(config.shape.devices, prices) + worst_once_s
    return QuickSplit(config, ends, frozenset(again), seconds, fullest)


def _fitted(
    profile: ChainProfile,
    places: list[int],
    flying: float,
    state: Callable[[RankParameters], float],
    capacity: float,
    already: set[int],
    *,
    free: bool,
) -> tuple[set[int], float]:
    """Return the layers of a rank to recompute so that it fits, and the bytes it then holds."""
    blocks = [profile.again[n] if n in already else profile.plain[n] for n in places]
    held = state(sum((one.parameters for one in blocks), RankParameters()))
    kept = flying * sum(one.saved_bytes for one in blocks)
    space = max(one.workspace_bytes for one in blocks)
    chosen: set[int] = set()
    if held + kept + space <= capacity or not free:
        return chosen, held + kept + space
    for n in places:
        plain, other = profile.plain[n], profile.again[n]
        if other is plain or n in already:
            continue
        chosen.add(n)
        kept -= flying * (plain.saved_bytes - other.saved_bytes)
        space = max(space, other.workspace_bytes)
        if held + kept + space <= capacity:
            break
    return chosen, held + kept + space


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
