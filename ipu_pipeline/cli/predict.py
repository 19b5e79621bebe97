"""The command ``predict``: what a published IPU configuration does; ``cli.py`` registers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from ipu_pipeline.cli.options import MicroBatch, Model, PodOption, SeqLength, TaskOption

Wrapper = Callable[[Callable[..., None]], Callable[..., None]]


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
    pod_type: Annotated[
        str | None, typer.Option("--pod-type", help="Such as pod16: chooses the replicas.")
    ] = None,
    ipu_config_overrides: Annotated[
        str, typer.Option("--ipu-config-overrides", help="Such as a=1,b=[0.2 0.3],c=true.")
    ] = "",
) -> None:
    """Predict an IPU configuration: memory of every IPU, parts of a step, samples/s.

    Layers that the configuration leaves open ([-1]) are placed as plan places them, or evenly
    where nothing fits.
    """
    from ipu_pipeline.backends.ipu.config import find_config
    from ipu_pipeline.backends.ipu.prices import IPUPlanning, predict
    from ipu_pipeline.capture import capture
    from ipu_pipeline.capture.from_config import config_and_task, from_config
    from ipu_pipeline.ir.machines import machine_by_name

    settings = find_config(ipu_config).apply_overrides(ipu_config_overrides).for_pod(pod_type)
    pod = machine_by_name(machine)
    built, batch = from_config(
        *config_and_task(model, task), batch_size=micro_batch, seq_length=seq_length
    )
    graph = capture(built, batch).graph
    prediction = IPUPlanning.of_configuration(graph, settings, pod)
    if prediction is None:
        prediction = predict(graph, settings, pod)
    typer.echo(prediction.text())


def register(app: typer.Typer, wrapper: Wrapper) -> None:
    """Add the command to ``app``; ``wrapper`` turns errors into one line and exit code 1."""
    app.command("predict")(wrapper(predict_command))
