"""The public door of the tuner: a model, a pod and a batch in; front, plan and config out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import IPUSettings, Prediction, chip_of, predict
from ipu_pipeline.backends.ipu.prices.planning import partition_of
from ipu_pipeline.capture import CapturedModel, model_identity
from ipu_pipeline.errors import ConfigError, PartitionError
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.price import make_plan
from ipu_pipeline.planner.tuning.search import Front, Point, Progress, candidates, search
from ipu_pipeline.planner.tuning.space import TuneRequest, shapes

CaptureMicroBatch = Callable[[int], CapturedModel]
LARGER = (2, 4)  # pods that are tried, by their size, when nothing fits


@dataclass
class Models:
    """The model by micro batch, each captured once, when it is first needed."""

    capture: CaptureMicroBatch
    known: dict[int, CapturedModel] = field(default_factory=dict)

    def of(self, micro_batch: int) -> CapturedModel:
        """Return the model captured for ``micro_batch`` samples."""
        if micro_batch not in self.known:
            self.known[micro_batch] = self.capture(micro_batch)
        return self.known[micro_batch]


@dataclass(frozen=True)
class TuneResult:
    """What the search found.

    Attributes:
        request: What was asked.
        machine: The pod.
        front: Points, quickest first, and every setting with its bound.
        models: The model by micro batch.
    """

    request: TuneRequest
    machine: Machine
    front: Front
    models: Models

    @property
    def best(self) -> Point:
        """The quickest point."""
        return self.front.points[0]

    def ipu_config(self, point: Point | None = None) -> IPUConfig:
        """Return the point (default: the best) as ``ipu_config.json`` holds it.

        The micro batch is not part of that file: it is ``per_device_train_batch_size``.
        """
        return ipu_config_of((point or self.best).prediction.settings)

    def plan(self, point: Point | None = None) -> Plan:
        """Return the point (default: the best) as a plan."""
        chosen = point or self.best
        prediction = chosen.prediction
        captured = self.models.of(prediction.micro_batch)
        partition = partition_of(captured.graph, prediction, chosen.bound_s)
        settings = prediction.settings
        work = Workload(
            captured.graph, self.machine, "popart", settings.accumulation, settings.replicas
        )
        return make_plan(model_identity(captured.model), work, partition)

    def predict(self, config: IPUConfig) -> Prediction:
        """Predict another configuration, for its own share of the batch where that is whole.

        Raises:
            ConfigError: It does not fit the model or the pod.
        """
        per_sample = config.replicas() * config.gradient_accumulation_steps
        size, rest = divmod(self.request.global_batch, per_sample)
        micro_batch = size if size and not rest else 1
        settings = replace(
            IPUSettings.from_config(config, front_end=self.request.front_end),
            optimizer=self.request.optimizer,
        )
        return predict(self.models.of(micro_batch).graph, settings, self.machine)


def ipu_config_of(settings: IPUSettings) -> IPUConfig:
    """Return ``settings`` as a configuration; :func:`predict` reads it back to the same settings.

    Raises:
        ConfigError: Pipeline recomputation is off, which the file cannot say.
    """
    if not settings.recompute:
        raise ConfigError("an ipu_config.json cannot switch recomputation off; set recompute=True")
    return IPUConfig(
        layers_per_ipu=settings.layers_per_ipu,
        ipus_per_replica=settings.num_ipus,
        replication_factor=settings.replicas,
        gradient_accumulation_steps=settings.accumulation,
        device_iterations=settings.device_iterations,
        matmul_proportion=settings.proportions,
        embedding_serialization_factor=settings.embedding_factor,
        projection_serialization_factor=settings.projection_factor,
        optimizer_state_offchip=settings.optimizer_offchip,
        replicated_tensor_sharding=settings.sharded,
        recompute_checkpoint_every_layer=settings.checkpoint_layers,
        enable_half_partials=settings.precision == "16.16",
        enable_half_first_order_momentum=True if settings.half_first_moment else None,
    )


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
    models = Models(capture)
    front = _front(models, machine, len(machine.devices), request, progress, time_limit_s)
    if not front.points:
        raise PartitionError(_misfit(models, machine, request, front, progress))
    return TuneResult(request, machine, front, models)


def _front(
    models: Models, machine: Machine, num_devices: int, request: TuneRequest,
    progress: Progress, time_limit_s: float,
) -> Front:  # fmt: skip
    chip = chip_of(machine)
    found = shapes(request, num_devices)
    sizes = sorted({shape.micro_batch for shape in found})
    graphs = {}
    for position, size in enumerate(sizes):
        progress("capturing the model", position, len(sizes))
        graphs[size] = models.of(size).graph
    return search(candidates(found, graphs, chip, request), request, progress, time_limit_s)


def _misfit(
    models: Models, machine: Machine, request: TuneRequest, front: Front, progress: Progress
) -> str:
    """Say how close the closest setting is, and which larger pod fits, if one does."""
    head = f"nothing fits {machine.name} with a global batch of {request.global_batch}"
    if request.least_free:
        head += f" and {request.least_free:.0%} of every tile free"
    tile = chip_of(machine).tile_memory_bytes
    worst: dict[int, float] = {}
    for number, candidate in enumerate(front.candidates):
        sizes = candidate.memory.known.values()
        if sizes:
            worst[number] = max(sizes) / tile
    if worst:
        number = min(worst, key=lambda n: worst[n])
        shape = front.candidates[number].shape
        head += (
            f"; closest were {shape.num_ipus} IPUs per replica with a micro batch of "
            f"{shape.micro_batch}, whose fullest tile needs {worst[number]:.0%} of its memory"
        )
    for factor in LARGER:
        wider = replace(request, ipus_per_replica=None, replicas=None, micro_batch=None)
        count = factor * len(machine.devices)
        larger = _front(models, machine, count, wider, progress, 0.0)
        if larger.points:
            best = larger.points[0].prediction.settings
            return f"{head}; it fits on {count} IPUs, with {best.num_ipus} per replica"
    return f"{head}; nor does it on {LARGER[-1]} times as many IPUs: use a shorter sequence"
