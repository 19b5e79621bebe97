"""The command ``predict``: what a published IPU configuration does; ``cli.py`` registers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

Wrapper = Callable[[Callable[..., None]], Callable[..., None]]


def predict_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub name, local folder, or config.json.")
    ],
    ipu_config: Annotated[
        str,
        typer.Option("--ipu-config", help="ipu_config.json, its folder, or a published name."),
    ],
    machine: Annotated[
        str, typer.Option("--machine", help="pod4, pod16, bow-pod16, ..., or a machine file.")
    ] = "pod16",
    task: Annotated[
        str | None,
        typer.Option("--task", help="Such as question-answering; default: what the config names."),
    ] = None,
    micro_batch: Annotated[
        int, typer.Option("--micro-batch", min=1, help="Samples of a microbatch.")
    ] = 1,
    seq_length: Annotated[
        int, typer.Option("--seq-length", min=4, help="Tokens of a sequence.")
    ] = 128,
    pod_type: Annotated[
        str | None, typer.Option("--pod-type", help="Such as pod16: chooses the replicas.")
    ] = None,
    ipu_config_overrides: Annotated[
        str, typer.Option("--ipu-config-overrides", help="Such as a=1,b=[0.2 0.3],c=true.")
    ] = "",
) -> None:
    """Predict an IPU configuration as it is: memory of every IPU, parts of a step, samples/s."""
    from ipu_pipeline.capture import capture
    from ipu_pipeline.capture.from_config import from_config, infer_task, load_config
    from ipu_pipeline.config import find_config
    from ipu_pipeline.cost.ipu import predict
    from ipu_pipeline.ir.machines import machine_by_name

    settings = find_config(ipu_config).apply_overrides(ipu_config_overrides).for_pod(pod_type)
    pod = machine_by_name(machine)
    config = load_config(model)
    built, batch = from_config(
        config, task or infer_task(config), batch_size=micro_batch, seq_length=seq_length
    )
    prediction = predict(capture(built, batch).graph, settings, pod)
    typer.echo(prediction.text())


def register(app: typer.Typer, wrapper: Wrapper) -> None:
    """Add the command to ``app``; ``wrapper`` turns errors into one line and exit code 1."""
    app.command("predict")(wrapper(predict_command))
