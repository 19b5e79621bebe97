"""The command ``predict``: what a published IPU configuration does, or a GPU layout."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from ipu_pipeline.cli.layouts import Schedule, predict_layout
from ipu_pipeline.cli.options import (
    Cp,
    Ep,
    GlobalBatch,
    IPUConfigName,
    IPUConfigOverrides,
    MicroBatch,
    Microbatches,
    Model,
    PodType,
    Pp,
    PrecisionOption,
    Recompute,
    TaskOption,
    Tp,
    ZeroStage,
    counted,
    read_ipu_config,
)

LayoutText = Annotated[
    str | None, typer.Option("--layout", help="Megatron's, such as 'Et*2|(t*2|)*3,tL'; see --pp.")
]
AnyMachine = Annotated[
    str | None, typer.Option("--machine", help="pod16 (default), h100-x64, ..., or a machine file.")
]
Tokens = Annotated[
    int | None, counted("--seq-length", "seq_length", "Tokens; default: 128, of a layout 4096.", 4)
]
Dp = Annotated[
    int | None, counted("--dp", "num_devices", "Data parallel copies; default: what is left.")
]


def predict_command(
    model: Model,
    ipu_config: IPUConfigName = None,
    layout: LayoutText = None,
    machine: AnyMachine = None,
    task: TaskOption = None,
    micro_batch: MicroBatch = 1,
    seq_length: Tokens = None,
    pod_type: PodType = None,
    ipu_config_overrides: IPUConfigOverrides = "",
    tp: Tp = None,
    pp: Pp = None,
    cp: Cp = None,
    ep: Ep = None,
    dp: Dp = None,
    microbatches: Microbatches = None,
    global_batch: GlobalBatch = None,
    schedule: Schedule = None,
    precision: PrecisionOption = None,
    recompute: Recompute = None,
    zero_stage: ZeroStage = None,
) -> None:
    """Predict an IPU configuration (--ipu-config), or somebody's GPU layout (--layout).

    An IPU configuration: memory of every IPU, parts of a step, samples/s. Layers that it leaves
    open ([-1]) are placed as plan places them, or evenly where nothing fits. A layout: step,
    tokens/s, MFU, memory of every rank, and our split for the same sizes.
    """
    if (ipu_config is None) == (layout is None):
        raise ValueError("give one of --ipu-config and --layout: what is predicted")
    sizes = {
        "tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp": dp, "microbatches": microbatches,
        "global_batch": global_batch,
    }  # fmt: skip
    settings = {
        "precision": None if precision is None else precision.value,
        "recompute": recompute,
        "zero_stage": zero_stage,
    }
    if layout is None:
        asked = [name for name, value in {**sizes, **settings, "schedule": schedule}.items()
                 if value is not None]  # fmt: skip
        if asked:
            raise ValueError(
                f"--{asked[0].replace('_', '-')} is for --layout; an IPU configuration says its own"
            )
        _predict_pod(model, ipu_config, machine or "pod16", task, micro_batch, seq_length or 128,
                     pod_type, ipu_config_overrides)  # fmt: skip
        return
    if pod_type is not None or ipu_config_overrides:
        raise ValueError("--pod-type and --ipu-config-overrides are for --ipu-config")
    predict_layout(model, task, layout, machine, seq_length or 4096,
                   {**sizes, "micro_batch": micro_batch}, settings, schedule)  # fmt: skip


def _predict_pod(
    model: str, ipu_config: str | None, machine: str, task: str | None, micro_batch: int,
    seq_length: int, pod_type: str | None, overrides: str,
) -> None:  # fmt: skip
    from ipu_pipeline.backends.ipu.prices.predict import predict, prediction_of
    from ipu_pipeline.capture import capture
    from ipu_pipeline.capture.from_config import config_named, from_config
    from ipu_pipeline.compiler import plan
    from ipu_pipeline.errors import PartitionError
    from ipu_pipeline.ir.machines import machine_by_name

    settings = read_ipu_config(ipu_config, overrides, pod_type)
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
