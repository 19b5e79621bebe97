"""Measured rows joined with their configuration and captured graph, and what is predicted for them.

Grades: A and B are fitted and judged; C rows ran through a host-bound trainer and are lower
bounds on the device's speed (README of the shared data).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from benchmarks.ipu_architectures import architecture, capture_architecture
from benchmarks.ipu_rows import (
    Raw,
    Row,
    UnjudgeableRowError,
    chip_name,
    load_rows,
    placed_layers,
    throughput_row,
)
from ipu_pipeline.backends.ipu.prices import (
    DEFAULT_CALIBRATION,
    Calibration,
    Chip,
    Prediction,
    chip_named,
)
from ipu_pipeline.backends.ipu.prices.layout import StageLayout, make_layout
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.graph import BlockGraph


@dataclass(frozen=True)
class Observation:
    """One measured run.

    Attributes:
        id: Its id in the throughput file.
        model: Model name: the group that leave-one-model-out leaves out.
        grade: ``A``, ``B`` or ``C``.
        items_per_s: Measured items per second, counting unpacked sequences.
        packing: Items per row of a packed run, else 1.
        row: Its configuration.
        graph: The model, captured for its micro batch.
        chip: IPU generation.
    """

    id: str
    model: str
    grade: str
    items_per_s: float
    packing: float
    row: Row
    graph: BlockGraph
    chip: Chip

    def predict(self, calibration: Calibration = DEFAULT_CALIBRATION) -> Prediction:
        """Return the whole prediction."""
        return predict_row(self.row, self.graph, replace(self.chip, calibration=calibration))[0]

    @cached_property
    def layout(self) -> StageLayout:
        """Stages of the run."""
        layers, _ = placed_layers(self.row, self.graph)
        return make_layout(self.graph, self.row.settings, layers)

    def predicted_items_per_s(self, calibration: Calibration = DEFAULT_CALIBRATION) -> float:
        """Return predicted items per second, counted as measured (time only, no memory)."""
        settings = self.row.settings
        chip = replace(self.chip, calibration=calibration)
        step = Prediction(self.graph, self.layout, settings, chip).time
        count = settings.accumulation if settings.training else settings.device_iterations
        return self.row.micro_batch * count * settings.replicas * self.packing / step.total_s


def predict_row(row: Row, graph: BlockGraph, chip: Chip) -> tuple[Prediction, str]:
    """Predict one configuration; also return a note on how its layers were placed.

    Raises:
        UnjudgeableRowError: The placement does not fit the model.
    """
    try:
        layers, note = placed_layers(row, graph)
        layout = make_layout(graph, row.settings, layers)
        found = Prediction(graph, layout, row.settings, chip)
    except (PipelineError, ValueError) as error:
        raise UnjudgeableRowError(f"cannot be placed: {error}") from error
    return found, note


def load_observations(
    configs: str | Path, throughput: str | Path
) -> tuple[list[Observation], list[dict[str, str]]]:
    """Join both files; also return the rows that cannot be judged, with the reason."""
    by_id = {row.get("id"): row for row in load_rows(configs)}
    found: list[Observation] = []
    unjudged: list[dict[str, str]] = []
    for measured in load_rows(throughput):
        try:
            found.append(_observe(measured, by_id.get(measured.get("config_id"))))
        except UnjudgeableRowError as error:
            unjudged.append({"id": str(measured.get("id")), "reason": str(error)})
    return found, unjudged


def _observe(measured: Raw, config: Raw | None) -> Observation:
    if config is None:
        raise UnjudgeableRowError(f"no configuration {measured.get('config_id')!r}")
    value = measured.get("throughput")
    if not isinstance(value, (int, float)) or value <= 0:
        raise UnjudgeableRowError(f"no throughput: {value!r}")
    grade = str(measured.get("quality") or "B")[:1].upper()
    if grade not in "ABC":
        raise UnjudgeableRowError(f"unknown grade {measured.get('quality')!r}")
    row = throughput_row(config, measured)
    graph = capture_architecture(architecture(row))
    packing = measured.get("packing_factor") or 1.0
    unit = str(measured.get("unit") or "")
    if "token" in unit:
        packing *= row.arch.get("seq_len") or row.seq_length or 1
    return Observation(
        id=str(measured.get("id")),
        model=str(measured.get("model") or row.model),
        grade=grade,
        items_per_s=float(value),
        packing=float(packing),
        row=row,
        graph=graph,
        chip=chip_named(f"ipu-{chip_name(measured)}"),
    )


def judged(observations: Sequence[Observation]) -> list[Observation]:
    """Return the observations of grades A and B."""
    return [observation for observation in observations if observation.grade in "AB"]
