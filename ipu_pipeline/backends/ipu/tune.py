"""Tune a model for a pod and a batch: the outer loop over parallel configurations.

A parallel configuration says how many IPUs a replica has, how many replicas there are, and how the
batch divides into micro batches and accumulation. For each of them the planning (``prices``) lists
the programs: recomputation, what is recomputed from, slices, place of the optimizer state; layers
and memory proportion of every IPU are found by the one search. All pipelines together are taken in
the order of their bounds, so that the first point is the quickest there is. Every further point of
the front is the quickest one that leaves more memory free.

Replicated tensor sharding is used wherever there are replicas: it divides optimizer state and its
arithmetic by the replicas and adds nothing in the model of the prices, so the same setting
without it is never quicker and never smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import (
    Chip,
    IPUPlanning,
    IPUSettings,
    Prediction,
    ProgramChoices,
    chip_of,
    predict,
)
from ipu_pipeline.backends.ipu.prices.chain import ChainPrices
from ipu_pipeline.backends.ipu.prices.layout import placement_of
from ipu_pipeline.backends.ipu.prices.pipeline import IPUPipeline, best_prediction, closest
from ipu_pipeline.backends.ipu.prices.planning import PROPORTIONS
from ipu_pipeline.backends.ipu.prices.predict import partition_of
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import check_count, count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.priced import quickest

if TYPE_CHECKING:
    from ipu_pipeline.ir.plan import ModelIdentity, Plan

SETTINGS = IPUSettings(num_ipus=1, device_iterations=4, sharded=True)
CHOICES = ProgramChoices(
    embedding_factors=(1, 2, 4), projection_factors=(1, 2, 4), proportions=PROPORTIONS
)
MAX_MICRO_BATCH = 32
FREE_STEP = 0.05  # the next point of the front leaves at least so much more of a tile free
MOST_FREE = 0.5  # nobody gives up speed for more than half a tile
LARGER = (2, 4)  # pods that are tried, by their size, when nothing fits
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TuneRequest:
    """What the user fixes; everything left at ``None`` is searched.

    Attributes:
        global_batch: Samples of one optimizer step over all replicas.
        micro_batch: Samples of one microbatch.
        ipus_per_replica: IPUs of one replica.
        replicas: Copies of the pipeline.
        settings: What all programs have in common: optimizer, front end, ... More device iterations
            are always quicker (and delay logging and learning rates), so they are given, too.
        choices: What programs differ in.
        max_micro_batch: Largest micro batch that is tried.
        least_free: Share of a tile's memory that must stay free on every IPU, 0 to 1.
    """

    global_batch: int
    micro_batch: int | None = None
    ipus_per_replica: int | None = None
    replicas: int | None = None
    settings: IPUSettings = SETTINGS
    choices: ProgramChoices = CHOICES
    max_micro_batch: int = MAX_MICRO_BATCH
    least_free: float = 0.0

    def __post_init__(self) -> None:
        limits = {"ipus_per_replica": "num_stages", "max_micro_batch": "micro_batch"}
        for name in ("global_batch", "micro_batch", "replicas", *limits):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value, limits.get(name, ""))
        if not 0 <= self.least_free < 1:
            raise ValueError(f"least_free must be at least 0 and below 1, got {self.least_free}")
        empty = [name for name, values in vars(self.choices).items() if not values]
        if empty:
            raise ValueError(f"choices.{empty[0]} must hold at least one value")


@dataclass(frozen=True)
class BatchDivision:
    """IPUs of a replica, replicas, and how the batch divides among them."""

    num_ipus: int
    replicas: int
    micro_batch: int
    accumulation: int


@dataclass(frozen=True)
class TunePoint:
    """One point of the front.

    Attributes:
        prediction: What it does.
        bound_s: No setting that leaves as much free takes less seconds per step.
    """

    prediction: Prediction
    bound_s: float

    @property
    def free(self) -> float:
        """Share of a tile that stays free on the fullest tile."""
        return self.prediction.free

    @property
    def samples_per_s(self) -> float:
        """Samples per second over all replicas."""
        return self.prediction.samples_per_s


@dataclass
class Front:
    """Outcome of :func:`front_of`.

    Attributes:
        points: Quickest first, each with more free memory than the one before.
        pipelines: Every pipeline that was to be tried.
        searched: Those whose splits were searched for the first point, with the seconds of their
            best step (``inf``: none fits, or none is below what was known).
        complete: False when the time limit ended the search for more free memory.
        seconds: Time it took.
    """

    points: list[TunePoint] = field(default_factory=list)
    pipelines: list[IPUPipeline] = field(default_factory=list)
    searched: list[tuple[IPUPipeline, float]] = field(default_factory=list)
    complete: bool = True
    seconds: float = 0.0


class TunedModel(Protocol):
    """A model captured for one micro batch."""

    @property
    def graph(self) -> BlockGraph:
        """Its block graph."""
        ...


CaptureMicroBatch = Callable[[int], TunedModel]


@dataclass(frozen=True)
class TuneResult:
    """What the search found.

    Attributes:
        request: What was asked.
        machine: The pod.
        front: Points, quickest first.
        graphs: The model by micro batch.
    """

    request: TuneRequest
    machine: Machine
    front: Front
    graphs: Mapping[int, BlockGraph]

    @property
    def best(self) -> TunePoint:
        """The quickest point."""
        return self.front.points[0]

    def settings(self, point: TunePoint | None = None) -> IPUSettings:
        """Return the point (default: the best) as settings that say its placement."""
        found = (point or self.best).prediction
        return placement_of(found.graph, found.layout, found.settings)

    def ipu_config(self, point: TunePoint | None = None) -> IPUConfig:
        """Return the point (default: the best) as ``ipu_config.json`` holds it.

        The micro batch is not part of that file: it is ``per_device_train_batch_size``.
        """
        return self.settings(point).ipu_config()

    def plan(self, model: ModelIdentity, point: TunePoint | None = None) -> Plan:
        """Return the point (default: the best) as a plan for ``model``."""
        from ipu_pipeline.planner.backend import Workload
        from ipu_pipeline.planner.price import make_plan

        chosen = point or self.best
        split = partition_of(chosen.prediction, chosen.bound_s)
        run = (split.schedule, split.num_microbatches, split.replicas)
        return make_plan(model, Workload(chosen.prediction.graph, self.machine, *run), split)

    def predict(self, config: IPUConfig, capture: CaptureMicroBatch) -> Prediction:
        """Predict another configuration, for its own share of the batch where that is whole.

        Raises:
            ConfigError: It does not fit the model or the pod.
        """
        per_sample = config.replicas() * config.accumulation()
        size, rest = divmod(self.request.global_batch, per_sample)
        micro_batch = size if size and not rest else 1
        graph = self.graphs.get(micro_batch) or capture(micro_batch).graph
        own = self.request.settings
        settings = replace(
            IPUSettings.from_config(config), front_end=own.front_end, optimizer=own.optimizer
        )
        return predict(graph, settings, self.machine)


def tune(
    capture: CaptureMicroBatch,
    machine: Machine,
    request: TuneRequest,
    progress: Progress = lambda *_: None,
    time_limit_s: float = 25.0,
) -> TuneResult:
    """Search every setting for the batch and pod of ``request``.

    Args:
        capture: Returns the model captured for a micro batch of so many samples.
        machine: A pod.
        request: What is fixed.
        progress: Called with what is done, how much of it, and of how much.
        time_limit_s: For points beyond the quickest one.

    Raises:
        PartitionError: No split divides the batch, or nothing fits (says what would).
        PlanError: The machine has no IPUs.
    """
    chip = chip_of(machine)
    found = batch_divisions(request, len(machine.devices))
    sizes = sorted({division.micro_batch for division in found})
    graphs: dict[int, BlockGraph] = {}
    for position, size in enumerate(sizes):
        progress("capturing the model", position, len(sizes))
        graphs[size] = capture(size).graph
    pipelines = pipelines_of(found, graphs, machine, request, chip)
    front = front_of(pipelines, request, progress, time_limit_s)
    if not front.points:
        raise PartitionError(_misfit(capture, machine, request, front))
    return TuneResult(request, machine, front, graphs)


def batch_divisions(request: TuneRequest, num_devices: int) -> list[BatchDivision]:
    """Return every way to divide the batch over the pod.

    A pipeline of F IPUs needs at least 2F-1 microbatches; deeper ones (a head that returns to the
    first IPU is one more stage) are checked again when the model is known.

    Raises:
        PartitionError: The batch does not divide as asked for, or is too small for it.
    """
    found = [
        BatchDivision(num_ipus, replicas, micro_batch, per_replica // micro_batch)
        for num_ipus, replicas in _replicated(request, num_devices)
        for per_replica in [request.global_batch // replicas]
        if request.global_batch % replicas == 0
        for micro_batch in _micro_batches(request, per_replica)
        if per_replica // micro_batch >= 2 * num_ipus - 1
    ]
    if not found:
        raise PartitionError(_undivided(request, num_devices))
    return found


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]


def _replicated(request: TuneRequest, num_devices: int) -> Iterator[tuple[int, int]]:
    depths = [request.ipus_per_replica] if request.ipus_per_replica else _powers(num_devices)
    for num_ipus in depths:
        most = num_devices // num_ipus
        for replicas in [request.replicas] if request.replicas else _powers(most):
            if replicas <= most:
                yield num_ipus, replicas


def _micro_batches(request: TuneRequest, per_replica: int) -> Iterator[int]:
    wanted = request.micro_batch
    for size in [wanted] if wanted else range(1, request.max_micro_batch + 1):
        if per_replica % size == 0:
            yield size


def _undivided(request: TuneRequest, num_devices: int) -> str:
    pipelines = list(_replicated(request, num_devices))
    if not pipelines:
        return (
            f"{count_of(request.replicas or 1, 'replica')} of "
            f"{count_of(request.ipus_per_replica or 1, 'IPU')} need "
            f"{(request.replicas or 1) * (request.ipus_per_replica or 1)}, the pod has "
            f"{num_devices}; ask for fewer, or choose a larger pod"
        )
    unit = min(replicas for _, replicas in pipelines) * (request.micro_batch or 1)
    num_ipus = min(num_ipus for num_ipus, _ in pipelines)
    least = unit * (2 * num_ipus - 1)
    below = request.global_batch // unit * unit
    near = sorted({max(least, below), max(least, below + unit)})
    return (
        f"no split divides a global batch of {request.global_batch}: it must be a multiple of "
        f"{unit} (micro batch x replicas) and at least {least} (a pipeline of "
        f"{count_of(num_ipus, 'IPU')} needs {count_of(2 * num_ipus - 1, 'microbatch')}); the "
        f"nearest that work are {' and '.join(map(str, near))}"
    )


def pipelines_of(
    divisions: list[BatchDivision],
    graphs: Mapping[int, BlockGraph],
    machine: Machine,
    request: TuneRequest,
    chip: Chip,
) -> list[IPUPipeline]:
    """Return every pipeline of every division that PopART accepts.

    Args:
        divisions: From :func:`batch_divisions`.
        graphs: The model by micro batch.
        machine: The pod.
        request: What is fixed.
        chip: The IPU.
    """
    chains = {size: ChainPrices(graph, chip) for size, graph in graphs.items()}
    found = []
    for division in divisions:
        planning = IPUPlanning(chains[division.micro_batch], request.settings, request.choices)
        limits = Constraints(
            num_stages=division.num_ipus,
            num_microbatches=division.accumulation,
            replicas=division.replicas,
            schedule="popart",
        )
        found += [
            item
            for item in planning.pipelines(machine, limits, or_none=True)
            if item.settings.num_ipus == division.num_ipus
        ]
    return found


def front_of(
    pipelines: list[IPUPipeline],
    request: TuneRequest,
    progress: Progress = lambda *_: None,
    time_limit_s: float = 25.0,
    quickest_limit_s: float = 35.0,
) -> Front:
    """Return the front over ``pipelines`` (see the module).

    Args:
        pipelines: To try.
        request: Names the least free memory.
        progress: Called with what is looked for, pipelines done and pipelines in all.
        time_limit_s: No further point is begun or finished later than this.
        quickest_limit_s: The quickest point's search stops here once it has a fitting split; its
            bound then says what is left open.
    """
    started = time.monotonic()
    front = Front(pipelines=pipelines)
    free = request.least_free
    while free <= max(MOST_FREE, request.least_free):
        limit_s = time_limit_s if front.points else quickest_limit_s
        if front.points and time.monotonic() - started > limit_s:
            front.complete = False
            break
        seen = partial(progress, f"at least {free:.0%} free")
        asked = [replace(item, least_free=free) for item in pipelines]
        best = quickest(asked, deadline=started + limit_s, progress=seen)
        if not front.points:
            front.searched = [(item, found.objective) for item, found in best.searched]
        elif time.monotonic() - started > limit_s:
            front.complete = False
            break
        prediction = best_prediction(best)
        if prediction is None:
            break
        bound_s = min(prediction.time.total_s, best.lower_bound_s)
        front.points.append(TunePoint(prediction, bound_s))
        free = max(free, front.points[-1].free) + FREE_STEP
    front.points = non_dominated(front.points)
    front.seconds = time.monotonic() - started
    return front


def non_dominated(points: list[TunePoint]) -> list[TunePoint]:
    """Return the points that no other one beats in both, quickest first."""
    kept: list[TunePoint] = []
    for point in sorted(points, key=lambda p: (-p.samples_per_s, -p.free)):
        if not kept or point.free > kept[-1].free:
            kept.append(point)
    return kept


def _misfit(
    capture: CaptureMicroBatch, machine: Machine, request: TuneRequest, front: Front
) -> str:
    """Say how full the closest pipeline is, and which larger pod fits, if one does."""
    head = f"nothing fits {machine.name} with a global batch of {request.global_batch}"
    if request.least_free:
        head += f" and {request.least_free:.0%} of every tile free"
    if front.pipelines:
        best = closest(front.pipelines)
        head += (
            f"; closest were {count_of(best.settings.num_ipus, 'IPU')} per replica with a micro "
            f"batch of {best.micro_batch}, whose fullest tile needs {1 - best.free:.0%} of its "
            "memory"
        )
    wider = replace(request, ipus_per_replica=None, replicas=None, micro_batch=None)
    for factor in LARGER:
        count = factor * len(machine.devices)
        larger = replace(machine, devices=machine.devices * factor)
        found = batch_divisions(wider, count)
        least = min(division.micro_batch for division in found)
        found = [division for division in found if division.micro_batch == least]
        graphs = {least: capture(least).graph}
        pipelines = pipelines_of(found, graphs, larger, wider, chip_of(machine))
        if any(item.fits() for item in pipelines):
            return f"{head}; it fits on {count_of(count, 'IPU')}"
    return f"{head}; nor does it on {LARGER[-1]} times as many IPUs: use a shorter sequence"
