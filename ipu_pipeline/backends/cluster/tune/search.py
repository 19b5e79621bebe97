"""Tune a model for GPUs and a batch: the outer loop over every parallel size.

Configurations come with a bound each (:mod:`~ipu_pipeline.backends.cluster.tune.quick`). First a
quick split of every one that may be the best (stages of even time, layers recomputed where memory
asks for it) finds good plans; then the one search (:mod:`ipu_pipeline.planner.search`) takes the
configurations in the order of their bounds, until none is below the best plan or the time is over.
Every plan is priced by :func:`~ipu_pipeline.backends.cluster.prices.rank_plan.rank_price`; the
bound that is reported is the least one of all configurations that were not searched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import inf

from ipu_pipeline.backends.cluster.prices.rank_plan import RankCosts, rank_step_of
from ipu_pipeline.backends.cluster.prices.rank_step import RankStep
from ipu_pipeline.backends.cluster.tune.quick import Profiles, QuickSplit
from ipu_pipeline.backends.cluster.tune.space import GpuConfiguration, GpuRequest, configurations
from ipu_pipeline.errors import PartitionError, PlanError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage, VocabularyRows
from ipu_pipeline.ir.rates import Rates, rates_of
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.options.vocabulary import can_spread
from ipu_pipeline.planner.price import make_plan, schedule_problem, step_s
from ipu_pipeline.planner.search import WORTHWHILE, Constraints
from ipu_pipeline.planner.search.pipeline_search import search
from ipu_pipeline.planner.search.spread import SpreadSearch

# Seconds of this process's own work, which other processes do not shorten.
QUICK_S = 2.5  # of quick splits
EXACT_S = 5.0  # of everything
SPLIT_S = 1.5  # of the search of one configuration
_PRICED = 24  # quick splits that get their real price
_SLOWEST = 2.0  # points of the front take at most so many times the best step
_Key = tuple[GpuConfiguration, tuple[PlannedStage, ...], VocabularyRows | None]
Progress = Callable[[str, int, int], None]
Capture = Callable[[int], BlockGraph]


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
        PlanError: The machine's kernels are not known, or its backend does not run the schedule.
    """
    if machine.devices[0].kernels is None:
        raise PlanError(
            f"{machine.name} gives no kernels for its devices: what GPUs reach of their peaks; "
            "tune for a known machine such as h100-x64, or add kernels to the machine file"
        )
    if wrong := request.schedule and schedule_problem(machine, request.schedule):
        raise PlanError(wrong)
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
        self.points: dict[_Key, GpuPoint] = {}

    def run(self, found: list[GpuConfiguration]) -> GpuTuneResult:
        """Return the front and the bound."""
        spread = self.request.vocabulary is not None
        bounds = {config: self.profiles.of(config).bound_s(spread=spread) for config in found}
        for split in self._promising(self._quick(bounds)):
            self._price(split.config, split.stages)
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

    # -- quick splits ----------------------------------------------------------------------------

    def _quick(self, bounds: Mapping[GpuConfiguration, float]) -> list[QuickSplit]:
        """Return splits of the configurations that may be the best, the likely ones first."""
        estimates = {
            config: max(bound, self.profiles.of(config).even_s())
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
            split = self.profiles.of(config).split(self.request.recompute)
            if split is not None:
                found.append(split)
                best_s = min(best_s, split.seconds)
        return found

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
        costs = RankCosts(work).all()
        assert costs.ranks is not None
        try:
            found = search(work.graph, costs, costs.ranks, limits)
        except PartitionError:
            return self._spread(config, work, limits)  # the constraints leave no other split
        if not found.partitions:
            return min(self._spread(config, work, limits), found.lower_bound)
        priced = [(step_s(work, item), number) for number, item in enumerate(found.partitions)]
        seconds, number = min(priced)
        if seconds < inf:
            self._price(config, found.partitions[number].stages)
        spread_s = self._spread(config, work, limits, WORTHWHILE * min(seconds, best_s))
        return min(spread_s, found.step_bound(min(seconds, best_s)))

    def _spread(
        self, config: GpuConfiguration, work: Workload, limits: Constraints, most_s: float = inf
    ) -> float:
        """Try the vocabulary spread over the stages; return the bound of such plans.

        A plan is kept if its step takes at most ``most_s`` seconds.
        """
        if self.request.vocabulary is None or config.sizes.pp == 1 or not can_spread(work.graph):
            return inf

        def costs_of(graph: BlockGraph, _: object) -> GraphCosts:
            return RankCosts(replace(work, graph=graph)).all()

        limits = replace(limits, vocabulary="auto")
        spread = SpreadSearch(work.graph, self.machine, config.schedule, costs_of,
                              partial(step_s, work))  # fmt: skip
        try:
            found = spread.split(limits)
        except PartitionError:
            return inf
        if found.objective <= most_s:
            self._keep(config, found.stages, make_plan(self.model, work, found))
        return found.lower_bound

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
        if (config, stages, None) not in self.points:
            self._keep(config, stages, make_plan(self.model, self._work(config), stages))

    def _keep(self, config: GpuConfiguration, stages: tuple[PlannedStage, ...], plan: Plan) -> None:
        if not plan.misfits:
            self.points[config, stages, plan.vocabulary] = GpuPoint(plan, config)

    def _misfit(self, bounds: Mapping[GpuConfiguration, float]) -> str:
        least = min(self.profiles.of(config).state_bytes / config.sizes.pp for config in bounds)
        more = self.request.settings.engine == "megatron" and self.request.zero_stage is None
        return (
            f"none of {count_of(len(bounds), 'configuration')} fits "
            f"{count_of(len(self.machine.devices), 'GPU')} of {self.machine.name}: weights, "
            f"gradients and optimizer state alone take at least {least / 1e9:.4g} GB of a GPU's "
            f"{self.profiles.capacity / 1e9:.4g} GB; use more or larger GPUs, a shorter sequence, "
            "or fix fewer of the sizes"
            f"{'; zero_stage 3 shards weights and gradients, too' if more else ''}"
        )


def front_of(points: Iterable[GpuPoint]) -> Iterator[GpuPoint]:
    """Yield the points of which none is quicker and smaller, quickest first."""
    least = inf
    for point in sorted(points, key=lambda p: (p.plan.objective_s, p.memory_bytes)):
        if point.memory_bytes < least:
            least = point.memory_bytes
            yield point
