"""Layouts that somebody else chose: ``export``, ``import`` and ``predict``."""

from __future__ import annotations

from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ipu_pipeline.cli.options import (
    Cp,
    Ep,
    Force,
    GlobalBatch,
    GpuMachine,
    IPUConfigName,
    IPUConfigOverrides,
    MicroBatch,
    Microbatches,
    Model,
    PlanFile,
    PodType,
    Pp,
    PrecisionOption,
    Recompute,
    SeqLength,
    TaskOption,
    Tp,
    ZeroStage,
    counted,
    read_ipu_config,
    save_plan,
)

if TYPE_CHECKING:
    from ipu_pipeline.backends.cluster.layouts.given_layout import GivenLayout, GivenModel


class Framework(str, Enum):
    """Whose settings a file holds."""

    megatron = "megatron"
    torchtitan = "torchtitan"
    automodel = "automodel"
    transformers = "transformers"


FormatOption = Annotated[Framework, typer.Option("--format", help="Whose settings.")]
Schedule = Annotated[
    str | None, typer.Option("--schedule", help="Default: 1f1b, interleaved if pp has more stages.")
]

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


def export_command(
    plan_file: PlanFile,
    framework: FormatOption,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file; default: print.")
    ] = None,
    force: Force = False,
) -> None:
    """Write a plan as the settings of another framework."""
    from ipu_pipeline.backends.cluster.layouts.exchange import export_plan
    from ipu_pipeline.ir.files import check_outputs, write_text
    from ipu_pipeline.ir.plan import Plan

    check_outputs({"--output": output}, force=force)
    text, notes = export_plan(Plan.load(plan_file), framework.value)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_text(output, text)
    typer.echo(f"{framework.value} settings written to {output}")


def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Settings of another framework.")],
    model: Model,
    framework: FormatOption,
    machine: GpuMachine,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the plan to this file.")],
    task: TaskOption = None,
    seq_length: SeqLength = 4096,
    pp: Pp = None,
    tp: Tp = None,
    micro_batch: Annotated[
        int | None, counted("--micro-batch", "micro_batch", "Default: the file's, or 1.")
    ] = None,
    microbatches: Annotated[
        int | None, counted("--microbatches", "num_microbatches", "Default: the file's.")
    ] = None,
    global_batch: GlobalBatch = None,
    force: Force = False,
) -> None:
    """Read settings of another framework as a plan with its price.

    Sizes that are given replace the file's.
    """
    from ipu_pipeline.backends.cluster.layouts.exchange import read_plan
    from ipu_pipeline.backends.cluster.layouts.given_layout import imported_plan
    from ipu_pipeline.ir.files import check_outputs, of_file
    from ipu_pipeline.ir.machines import machine_by_name

    check_outputs({"--output": output}, force=force)
    given = read_plan(file, framework.value).with_sizes(
        {"pp": pp, "tp": tp, "micro_batch": micro_batch, "microbatches": microbatches,
         "global_batch": global_batch}
    )  # fmt: skip
    described, captured = machine_by_name(machine), _captured(model, task, seq_length, given)
    with of_file(file):
        made = imported_plan(given, captured, described)
    typer.echo(made.explain())
    save_plan(made, output)


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
    _predict_layout(model, task, layout, machine, seq_length or 4096,
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


def _predict_layout(
    model: str, task: str | None, layout: str, machine: str | None, seq_length: int,
    sizes: dict[str, int | None], settings: dict[str, Any], schedule: str | None,
) -> None:  # fmt: skip
    """Price somebody's layout, and find ours for the same sizes."""
    from ipu_pipeline.backends.cluster.layouts.given_layout import GivenLayout, own_plan
    from ipu_pipeline.backends.cluster.layouts.given_text import layout_text
    from ipu_pipeline.backends.cluster.layouts.megatron_layout import blocks_of, parse_layout
    from ipu_pipeline.backends.cluster.prices.parallel_sizes import parts_named
    from ipu_pipeline.errors import PartitionError
    from ipu_pipeline.ir.machines import machine_by_name

    if machine is None:
        raise ValueError("--layout needs a machine of GPUs; give --machine, such as h100-x64")
    parsed = parse_layout(layout)
    parsed.check()
    said = {name: value for name, value in settings.items() if value is not None}
    recompute = said.pop("recompute", "none")
    parts = [] if recompute in ("none", "full") else list(parts_named(recompute))
    given = GivenLayout(
        lambda graph: blocks_of(parsed, graph),
        {name: size for name, size in sizes.items() if size is not None},
        {**said, "recompute": parts, "engine": "megatron"},
        schedule,
        parsed.num_extra_layers,
        recompute=recompute == "full",
    )
    described = machine_by_name(machine)
    made = given.plan(_captured(model, task, seq_length, given), described)
    try:
        ours, problem = own_plan(made), ""
    except PartitionError as error:
        ours, problem = None, str(error)
    typer.echo(layout_text(made, ours, problem))


def _captured(model: str, task: str | None, seq_length: int, given: GivenLayout) -> GivenModel:
    from ipu_pipeline.backends.cluster.layouts.given_layout import captured_model

    size, precision = given.sizes.get("micro_batch", 1), given.settings.get("precision")
    return captured_model(model, task, size, seq_length, precision)
