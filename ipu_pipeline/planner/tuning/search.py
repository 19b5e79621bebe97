"""The front: for rising free memory, the quickest setting of all that leaves it free.

Settings are taken in the order of a lower bound of their step that needs no split; the first
whose bound is not below the best step ends the search, so nothing better is ever left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ipu_pipeline.backends.ipu.prices import (
    DEFAULT_CALIBRATION,
    Calibration,
    Chip,
    IPUSettings,
    Prediction,
    predict_on_chip,
)
from ipu_pipeline.backends.ipu.prices.timing import (
    copy_time,
    input_time,
    trainable_elements,
    update_times,
)
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.planner.tuning.cells import Bytes, Ground, Seconds
from ipu_pipeline.planner.tuning.space import Shape, TuneRequest, settings_of
from ipu_pipeline.planner.tuning.split import SplitSearch

FREE_STEP = 0.05  # the next point of the front leaves at least so much more of a tile free
MOST_FREE = 0.5  # nobody gives up speed for more than half a tile
Progress = Callable[[str, int, int], None]


def free_share(prediction: Prediction) -> float:
    """Share of a tile's memory that is free on the fullest tile of all IPUs."""
    chip = prediction.chip
    fullest = max(memory.fullest_tile_bytes(chip) for memory in prediction.memory)
    return 1 - fullest / chip.tile_memory_bytes


@dataclass
class Candidate:
    """One setting with the bound of its step.

    Attributes:
        shape: How the batch divides.
        settings: Everything but layers and proportions.
        seconds: Loads of its cells.
        memory: Bytes of its cells.
        floor_s: Seconds that every split has besides the busiest load.
        bound_s: No split of it takes less per step.
        best_s: Quickest step found; ``None`` when none was looked for or none fits.
        searched: Whether splits were enumerated.
    """

    shape: Shape
    settings: IPUSettings
    seconds: Seconds
    memory: Bytes
    floor_s: float
    bound_s: float
    best_s: float | None = None
    searched: bool = False


@dataclass(frozen=True)
class Point:
    """One point of the front.

    Attributes:
        prediction: What it does.
        free: Share of a tile that stays free on the fullest tile.
        bound_s: No setting that leaves as much free takes less seconds per step.
    """

    prediction: Prediction
    free: float
    bound_s: float

    @property
    def samples_per_s(self) -> float:
        """Samples per second over all replicas."""
        return self.prediction.samples_per_s


@dataclass
class Front:
    """Outcome of :func:`search`.

    Attributes:
        points: Quickest first, each with more free memory than the one before.
        candidates: Every setting, in the order of its bound.
        complete: False when the time limit ended the search for more free memory.
        seconds: Time it took.
    """

    points: list[Point] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    complete: bool = True
    seconds: float = 0.0


def candidates(
    shapes: list[Shape],
    graphs: Mapping[int, BlockGraph],
    chip: Chip,
    request: TuneRequest,
    calibration: Calibration = DEFAULT_CALIBRATION,
) -> list[Candidate]:
    """Return every setting that PopART accepts, those with the lowest bound first.

    Args:
        shapes: From :func:`~ipu_pipeline.planner.tuning.space.shapes`.
        graphs: The model by micro batch.
        chip: The IPU.
        request: What is fixed.
        calibration: Constants of the time model.
    """
    proportions = tuple(sorted(request.proportions))
    times: dict[object, dict[tuple[tuple[int, ...], tuple[float, ...]], float]] = {}
    grounds = {size: Ground(graph, chip, calibration) for size, graph in graphs.items()}
    tables: dict[object, Seconds] = {}
    found = []
    for shape in shapes:
        ground = grounds[shape.micro_batch]
        for settings in settings_of(shape, ground.graph, request):
            key = (shape.micro_batch, shape.num_ipus, settings.embedding_factor,
                   settings.projection_factor, shape.accumulation == 1)  # fmt: skip
            seconds = tables.setdefault(key, Seconds(ground, settings, proportions))
            if _runs(seconds, settings):
                # What is recomputed from changes bytes only, so its two settings share seconds.
                same = times.setdefault((*key, shape.replicas, settings.optimizer_offchip), {})
                found.append(_candidate(shape, settings, seconds, same))
    return sorted(found, key=lambda item: item.bound_s)


def _runs(seconds: Seconds, settings: IPUSettings) -> bool:
    """Whether every IPU gets work and there are enough microbatches."""
    if sum(seconds.least_layers) > len(seconds.ground.layers):
        return False
    if settings.num_ipus == 1:
        return True
    returns = seconds.layout.stages[-1].ipu != settings.num_ipus - 1
    num_stages = settings.num_ipus + returns
    return settings.accumulation >= 2 * num_stages - 1


def _candidate(
    shape: Shape,
    settings: IPUSettings,
    seconds: Seconds,
    times: dict[tuple[tuple[int, ...], tuple[float, ...]], float],
) -> Candidate:
    ground = seconds.ground
    floor_s = _floor(seconds, settings)
    return Candidate(
        shape=shape,
        settings=settings,
        seconds=seconds,
        memory=Bytes(ground, settings, times=times),
        floor_s=floor_s,
        bound_s=floor_s + settings.accumulation * seconds.least_cycle_s,
    )


def _floor(seconds: Seconds, settings: IPUSettings) -> float:
    """Seconds per step that no split avoids: copies, input, update, host.

    The update is that of the even split, scaled to IPUs that all hold the same number of
    parameters: all parts of it grow with the largest holding, or do not depend on the split.
    """
    ground, layout = seconds.ground, seconds.layout
    graph, chip, calibration = ground.graph, ground.chip, ground.calibration
    copies = copy_time(graph, layout, settings, chip, calibration) if ground.alike else 0.0
    flushes = 0 if settings.num_ipus == 1 else 2 * (settings.num_ipus - 1 + seconds.returns)
    between = settings.accumulation * input_time(graph, settings, chip)
    between += (settings.accumulation + flushes) * copies
    held = trainable_elements(graph, layout, settings)
    total = sum(item.numel for item in graph.parameters if item.trainable)
    evenly = min(1.0, total / (settings.num_ipus * max(1, *held.values(), 1)))
    update = sum(update_times(graph, layout, settings, chip, calibration))
    host = calibration.step_host_s / settings.device_iterations
    return between + evenly * update + host


def search(
    found: list[Candidate],
    request: TuneRequest,
    progress: Progress = lambda *_: None,
    time_limit_s: float = 25.0,
    quickest_limit_s: float = 35.0,
) -> Front:
    """Return the front over ``found`` (see the module).

    Args:
        found: From :func:`candidates`.
        request: Names the least free memory.
        progress: Called with what is looked for, settings done and settings in all.
        time_limit_s: No further point is begun or finished later than this.
        quickest_limit_s: The quickest point's search stops here once it has a fitting split; its
            bound then says what is left open.
    """
    started = time.perf_counter()
    front = Front(candidates=found)
    free = request.least_free
    while free <= max(MOST_FREE, request.least_free):
        deadline = started + time_limit_s if front.points else None
        stop = started + quickest_limit_s
        point, done = _quickest(front, free, progress, deadline, stop)
        if not done:
            front.complete = False
            break
        if point is None:
            break
        front.points.append(point)
        free = max(free, point.free) + FREE_STEP
    front.points = non_dominated(front.points)
    front.seconds = time.perf_counter() - started
    return front


def _quickest(
    front: Front, free: float, progress: Progress, deadline: float | None, stop: float
) -> tuple[Point | None, bool]:
    """Return the quickest point that leaves ``free``, and whether the search ended by itself."""
    best: tuple[Candidate, SplitSearch] | None = None
    best_s = open_s = float("inf")
    count = len(front.candidates)
    for position, candidate in enumerate(front.candidates):
        progress(f"at least {free:.0%} free", position, count)
        if candidate.bound_s >= best_s:
            break
        if deadline is not None and time.perf_counter() > deadline:
            return None, False
        if best is not None and time.perf_counter() > stop:
            open_s = min(open_s, candidate.bound_s)
            break
        tile = candidate.memory.ground.chip.tile_memory_bytes
        runner = SplitSearch(
            candidate.seconds, candidate.memory, candidate.settings, candidate.floor_s,
            int(tile * (1 - free)), best_s,
        )  # fmt: skip
        split = runner.run()
        candidate.searched = True
        if not runner.exhausted:
            open_s = min(open_s, candidate.bound_s)
        if split is not None:
            best, best_s = (candidate, runner), split.step_s
            candidate.best_s = min(split.step_s, candidate.best_s or split.step_s)
    progress(f"at least {free:.0%} free", count, count)
    return (None if best is None else _point(*best, open_s)), True


def _point(candidate: Candidate, runner: SplitSearch, open_s: float) -> Point:
    """Make the point; ``open_s`` bounds the settings whose splits were not all looked at."""
    assert runner.best is not None
    split = runner.relaxed(runner.best)
    settings = replace(
        candidate.settings, layers_per_ipu=split.counts, proportions=split.proportions
    )
    ground = candidate.memory.ground
    prediction = predict_on_chip(ground.graph, settings, ground.chip,
                                 calibration=ground.calibration)  # fmt: skip
    bound = min(prediction.time.total_s, open_s)
    return Point(prediction, free_share(prediction), bound)


def non_dominated(points: list[Point]) -> list[Point]:
    """Return the points that no other one beats in both, quickest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.samples_per_s, -p.free)):
        if not kept or point.free > kept[-1].free:
            kept.append(point)
    return kept
