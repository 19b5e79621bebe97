"""The command ``predict``: what a published IPU configuration does."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from ipu_pipeline.cli.options import (
    IPUConfigOverrides,
    MicroBatch,
    Model,
    PodOption,
    PodType,
    SeqLength,
    TaskOption,
    read_ipu_config,
)


def predict_command(
    model: Model,
    ipu_config: Annotated[
        str,
        typer.Option("--ipu-config", help="ipu_config.json, its folder, or a published name."),
    ],
    machine: PodOption = "pod16",
    task: TaskOption = None,
    micro_batch: MicroBatch = 1,
    seq_length: SeqLength = 128,
    pod_type: PodType = None,
    ipu_config_overrides: IPUConfigOverrides = "",
) -> None:
    """Predict an IPU configuration: memory of every IPU, parts of a step, samples/s.

    Layers that the configuration leaves open ([-1]) are placed as plan places them, or evenly
    where nothing fits.
    """
    from ipu_pipeline.backends.ipu.prices.predict import predict, prediction_of
    from ipu_pipeline.capture import capture
    from ipu_pipeline.capture.from_config import config_named, from_config
    from ipu_pipeline.compiler import plan
    from ipu_pipeline.errors import PartitionError
    from ipu_pipeline.ir.machines import machine_by_name

    settings = read_ipu_config(ipu_config, ipu_config_overrides, pod_type)
    assert settings is not None
    pod = machine_by_name(machine)
    built, batch = from_config(model, task, batch_size=micro_batch, seq_length=seq_length)
    prediction = None
    with config_named(model):
        if settings.leaves_layers_open:
            with suppress(PartitionError):
                planned = plan(built, batch, machine=pod, config=settings)
                prediction = prediction_of(planned)
        prediction = prediction or predict(capture(built, batch).graph, settings, pod)
    typer.echo(prediction.text())
