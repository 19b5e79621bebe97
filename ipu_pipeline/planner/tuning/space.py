"""What is searched: every combination of numbers that an ``ipu_config.json`` can express.

Dimensions: IPUs of a replica and replicas (powers of two: PopTorch attaches to nothing else),
micro batch (divisors of the batch), what is recomputed from (layer inputs or stage inputs),
slices of embedding and projection, optimizer state on or off the chip. Gradient accumulation
follows from the batch. Layers and memory proportion of every IPU are chosen in ``split.py``.

Replicated tensor sharding is used wherever there are replicas: it divides optimizer state and its
arithmetic by the replicas and adds nothing in the model of the prices, so the
same setting without it is never quicker and never smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from ipu_pipeline.backends.ipu.prices import IPUSettings
from ipu_pipeline.backends.ipu.prices.blocks import block_table_rows
from ipu_pipeline.backends.ipu.prices.settings import FrontEnd
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph

PROPORTIONS = (0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6)
FACTORS = (1, 2, 4)
MAX_MICRO_BATCH = 32


@dataclass(frozen=True)
class TuneRequest:
    """What the user fixes; everything left at ``None`` is searched.

    Attributes:
        global_batch: Samples of one optimizer step over all replicas.
        micro_batch: Samples of one microbatch.
        ipus_per_replica: IPUs of one replica.
        replicas: Copies of the pipeline.
        device_iterations: Optimizer steps per return to the host. More is always quicker (and
            delays logging and learning rates), so it is given, not searched.
        optimizer: ``sgd`` has no state, every other optimizer has two moments.
        half_first_moment: First moment in float16.
        front_end: Library that builds the program.
        proportions: Memory proportions that an IPU may get.
        factors: Slices that an embedding or a projection with a large table may get.
        max_micro_batch: Largest micro batch that is tried.
        least_free: Share of a tile's memory that must stay free on every IPU, 0 to 1.
    """

    global_batch: int
    micro_batch: int | None = None
    ipus_per_replica: int | None = None
    replicas: int | None = None
    device_iterations: int = 4
    optimizer: str = "adamw"
    half_first_moment: bool = False
    front_end: FrontEnd = "poptorch"
    proportions: tuple[float, ...] = PROPORTIONS
    factors: tuple[int, ...] = FACTORS
    max_micro_batch: int = MAX_MICRO_BATCH
    least_free: float = 0.0

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "ipus_per_replica", "replicas",
                     "device_iterations", "max_micro_batch"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.least_free < 1:
            raise ValueError(f"least_free must be at least 0 and below 1, got {self.least_free}")
        if not self.proportions or not self.factors:
            raise ValueError("proportions and factors must each hold at least one value")


@dataclass(frozen=True)
class Shape:
    """IPUs of a replica, replicas, and how the batch divides."""

    num_ipus: int
    replicas: int
    micro_batch: int
    accumulation: int


def shapes(request: TuneRequest, num_devices: int) -> list[Shape]:
    """Return every way to divide the batch over the pod.

    A pipeline of F IPUs needs at least 2F-1 microbatches; deeper ones (a head that returns to the
    first IPU is one more stage) are checked again when the model is known.

    Raises:
        PartitionError: The batch does not divide as asked for, or is too small for it.
    """
    found = [
        Shape(num_ipus, replicas, micro_batch, per_replica // micro_batch)
        for num_ipus, replicas in _pipelines(request, num_devices)
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


def _pipelines(request: TuneRequest, num_devices: int) -> Iterator[tuple[int, int]]:
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
    pipelines = list(_pipelines(request, num_devices))
    if not pipelines:
        return (
            f"{request.replicas or 1} replicas of {request.ipus_per_replica or 1} IPUs need "
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
        f"{unit} (micro batch x replicas) and at least {least} (a pipeline of {num_ipus} IPUs "
        f"needs {2 * num_ipus - 1} microbatches); the nearest that work are "
        f"{' and '.join(map(str, near))}"
    )


def settings_of(shape: Shape, graph: BlockGraph, request: TuneRequest) -> Iterator[IPUSettings]:
    """Yield every setting of ``shape``, without layers and proportions."""
    for offchip, by_layer, (embedding, projection) in product(
        _placements(request), (True, False) if shape.num_ipus > 1 else (False,),
        _factors(graph, request),
    ):  # fmt: skip
        yield IPUSettings(
            num_ipus=shape.num_ipus,
            replicas=shape.replicas,
            accumulation=shape.accumulation,
            device_iterations=request.device_iterations,
            embedding_factor=embedding,
            projection_factor=projection,
            optimizer=request.optimizer,
            optimizer_offchip=offchip,
            sharded=shape.replicas > 1,
            half_first_moment=request.half_first_moment,
            checkpoint_layers=by_layer,
            front_end=request.front_end,
            pipelined=shape.num_ipus > 1,
        )


def _placements(request: TuneRequest) -> tuple[bool, ...]:
    return (False,) if "sgd" in request.optimizer.lower() else (False, True)


def _factors(graph: BlockGraph, request: TuneRequest) -> list[tuple[int, int]]:
    large = {block.kind for block in graph.blocks if block_table_rows(graph, block)}
    kinds: Mapping[str, bool] = {
        "embedding": "embedding" in large,
        "projection": bool(large & {"head", "other"}),
    }
    sizes = [request.factors if kinds[name] else (1,) for name in ("embedding", "projection")]
    return list(product(*sizes))  # type: ignore[arg-type] # two factors of each pair
