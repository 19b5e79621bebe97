"""Explain a configuration: per-IPU memory, the parts of a step, samples per second, and notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices.calibration import DEFAULT_CALIBRATION, Calibration
from ipu_pipeline.backends.ipu.prices.chip import Chip, chip_of
from ipu_pipeline.backends.ipu.prices.layout import StageLayout, make_layout
from ipu_pipeline.backends.ipu.prices.memory import IPUMemory, ipu_memory
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.timing import StepTime, step_time
from ipu_pipeline.errors import ConfigError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine


@dataclass(frozen=True)
class Prediction:
    """What one configuration is expected to do.

    Attributes:
        settings: The run.
        chip: The IPU.
        layout: Stages and their IPUs.
        memory: Of every IPU of a replica.
        time: Of one optimizer step (in inference: one call of the device).
        micro_batch: Samples of one microbatch.
        layers: Names of the blocks that are layers.
        notes: What the reader should know: refusals of PopART, IPUs that are too full.
    """

    settings: IPUSettings
    chip: Chip
    layout: StageLayout
    memory: tuple[IPUMemory, ...]
    time: StepTime
    micro_batch: int
    layers: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the fullest tile of every IPU fits."""
        return all(memory.fits(self.chip) for memory in self.memory)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step of one replica (in inference: of a call)."""
        run = self.settings
        return run.accumulation if run.training else run.device_iterations

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step (in inference: one call) over all replicas."""
        return self.micro_batch * self.num_microbatches * self.settings.replicas

    @property
    def samples_per_s(self) -> float:
        """Samples per second over all replicas."""
        return self.samples_per_step / self.time.total_s

    def text(self) -> str:
        """Return a report for a terminal."""
        from ipu_pipeline.backends.ipu.prices.text import prediction_text

        return prediction_text(self)


def predict(
    graph: BlockGraph,
    config: IPUConfig | IPUSettings,
    machine: Machine,
    *,
    layers: Mapping[str, int] | None = None,
    optimizer: str | None = None,
    training: bool | None = None,
    calibration: Calibration = DEFAULT_CALIBRATION,
) -> Prediction:
    """Predict a published configuration as it is.

    Args:
        graph: The model, captured for one microbatch; its inputs give the micro batch size.
        config: An ``ipu_config.json``, or the same in the model's own terms.
        machine: A pod; its first replica's IPUs are predicted, all replicas counted.
        layers: IPU of every layer block, where ``layers_per_ipu`` cannot say it.
        optimizer: Name of the optimizer; ``None``: AdamW, or what ``config`` says.
        training: Training or inference; ``None``: what the graph was captured for.
        calibration: Constants of the time model.

    Raises:
        ConfigError: The configuration does not fit the model or the machine.
        PlanError: The machine has no IPUs.
    """
    chip = chip_of(machine)
    settings = _settings(graph, config, optimizer, training)
    if settings.num_ipus * settings.replicas > len(machine.devices):
        raise ConfigError(
            f"{settings.replicas} replicas of {settings.num_ipus} IPUs need "
            f"{settings.num_ipus * settings.replicas}, {machine.name} has {len(machine.devices)}; "
            "lower replication_factor or choose a larger pod"
        )
    return predict_on_chip(graph, settings, chip, layers=layers, calibration=calibration)


def predict_on_chip(
    graph: BlockGraph,
    settings: IPUSettings,
    chip: Chip,
    *,
    layers: Mapping[str, int] | None = None,
    calibration: Calibration = DEFAULT_CALIBRATION,
) -> Prediction:
    """Predict ``settings`` on IPUs of generation ``chip`` (see :func:`predict`)."""
    return predict_layout(graph, make_layout(graph, settings, layers), settings, chip, calibration)


def predict_layout(
    graph: BlockGraph,
    layout: StageLayout,
    settings: IPUSettings,
    chip: Chip,
    calibration: Calibration = DEFAULT_CALIBRATION,
) -> Prediction:
    """Predict stages that are given: THE price of an IPU pipeline, whoever chose it."""
    prediction = Prediction(
        settings=settings,
        chip=chip,
        layout=layout,
        memory=ipu_memory(graph, layout, settings, chip, calibration),
        time=step_time(graph, layout, settings, chip, calibration),
        micro_batch=graph.micro_batch_size,
        layers=frozenset(block.name for block in graph.blocks if block.kind == "layer"),
    )
    return replace(prediction, notes=_notes(prediction))


def _settings(
    graph: BlockGraph,
    config: IPUConfig | IPUSettings,
    optimizer: str | None,
    training: bool | None,  # noqa: FBT001 - None means what the graph says
) -> IPUSettings:
    wanted = graph.training if training is None else training
    if isinstance(config, IPUSettings):
        return replace(
            config, training=wanted, optimizer=config.optimizer if optimizer is None else optimizer
        )
    return IPUSettings.from_config(config, optimizer=optimizer or "adamw", training=wanted)


def _notes(prediction: Prediction) -> tuple[str, ...]:
    settings, chip = prediction.settings, prediction.chip
    num_stages = len(prediction.layout.stages)
    least = 2 * num_stages - 1 if settings.training else num_stages
    given = settings.accumulation if settings.training else settings.device_iterations
    found = []
    if settings.pipelined and given < least:
        name = "gradient_accumulation_steps" if settings.training else "device_iterations"
        found.append(
            f"PopART refuses this: {num_stages} forward stages need {name} of at least {least}, "
            f"it is {given}"
        )
    for ipu, memory in enumerate(prediction.memory):
        over = memory.fullest_tile_bytes(chip) - chip.tile_memory_bytes
        if over > 0:
            kinds = {name: size for name, size in vars(memory).items() if size}
            largest = max(kinds, key=lambda name: kinds[name])
            found.append(
                f"IPU {ipu} does not fit: its fullest tile needs "
                f"{memory.fullest_tile_bytes(chip) / 1024:.0f} KiB of "
                f"{chip.tile_memory_bytes / 1024:.0f} KiB; most of it is {largest} "
                f"({kinds[largest] / 1e6:.0f} MB)"
            )
    return tuple(found)
