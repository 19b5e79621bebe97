"""The command ``tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ipu_pipeline.cli.options import (
    Cp,
    Ep,
    Force,
    JsonOption,
    Model,
    PlanOutput,
    Pp,
    PrecisionOption,
    Recompute,
    SeqLength,
    TaskOption,
    Tp,
    ZeroStage,
    counted,
    measured,
)

if TYPE_CHECKING:
    from ipu_pipeline.ir.machine import Machine

StepSamples = Annotated[
    int, counted("--global-batch", "global_batch", "Samples of one optimizer step.")
]
AnyMachine = Annotated[
    str, typer.Option("--machine", help="pod16, h100-x64, gb200-x72, ..., or a machine file.")
]
Optimizer = Annotated[str, typer.Option("--optimizer", help="sgd, or one with two moments.")]
FixedMicroBatch = Annotated[
    int | None, counted("--micro-batch", "micro_batch", "Default: searched.")
]
IPUsPerReplica = Annotated[
    int | None, counted("--ipus-per-replica", "num_stages", "Default: searched.")
]
FixedReplicas = Annotated[int | None, counted("--replicas", "replicas", "Default: searched.")]
DeviceIterations = Annotated[
    int, counted("--device-iterations", "device_iterations", "Steps per return to the host.")
]
Free = Annotated[float, measured("--free", "Share of every tile that must stay free.", most=0.99)]
Compare = Annotated[
    str | None,
    typer.Option("--compare", metavar="CONFIG", help="ipu_config.json or published name."),
]
Vpp = Annotated[int | None, counted("--vpp", "num_devices", "GPUs: stages of a rank.")]
Schedule = Annotated[
    str | None, typer.Option("--schedule", help="GPUs: 1f1b, interleaved, zbv, ...")
]
Vocabulary = Annotated[
    str | None,
    typer.Option("--vocabulary", help="Engine torch: auto tries it spread, too."),
]
Engine = Annotated[
    str | None,
    typer.Option("--engine", help="GPUs: megatron (default), or torch: this project's own."),
]
ConfigOutput = Annotated[
    Path | None, typer.Option("--ipu-config-output", help="Write the best ipu_config.json here.")
]
# Options that mean something on one kind of machines only, by the names of their parameters.
IPU_OPTIONS = ("ipus_per_replica", "device_iterations", "free", "compare", "ipu_config_output")
GPU_OPTIONS = ("pp", "tp", "cp", "ep", "vpp", "schedule", "zero_stage", "recompute", "precision",
               "vocabulary", "engine")  # fmt: skip


def tune_command(
    context: typer.Context,
    model: Model,
    global_batch: StepSamples,
    task: TaskOption = None,
    machine: AnyMachine = "pod16",
    seq_length: SeqLength = 128,
    optimizer: Optimizer = "adamw",
    micro_batch: FixedMicroBatch = None,
    ipus_per_replica: IPUsPerReplica = None,
    replicas: FixedReplicas = None,
    device_iterations: DeviceIterations = 4,
    free: Free = 0.0,
    compare: Compare = None,
    pp: Pp = None,
    tp: Tp = None,
    cp: Cp = None,
    ep: Ep = None,
    vpp: Vpp = None,
    schedule: Schedule = None,
    zero_stage: ZeroStage = None,
    recompute: Recompute = None,
    precision: PrecisionOption = None,
    vocabulary: Vocabulary = None,
    engine: Engine = None,
    output: PlanOutput = None,
    ipu_config_output: ConfigOutput = None,
    force: Force = False,
    as_json: JsonOption = False,
) -> None:
    """Search every setting for a batch and a machine: the quickest, and what less memory costs."""
    from ipu_pipeline.ir.files import check_outputs
    from ipu_pipeline.ir.machines import machine_by_name

    check_outputs({"--output": output, "--ipu-config-output": ipu_config_output}, force=force)
    described = machine_by_name(machine)
    if _refuse_foreign(context, described) == "cluster":
        from ipu_pipeline.cli.tune_gpus import tune_gpus

        fixed = {
            "global_batch": global_batch, "micro_batch": micro_batch, "replicas": replicas,
            "pp": pp, "tp": tp, "cp": cp, "ep": ep, "vpp": vpp, "schedule": schedule,
            "zero_stage": zero_stage, "recompute": recompute, "vocabulary": vocabulary,
            "precision": precision and precision.value, "optimizer": optimizer, "engine": engine,
        }  # fmt: skip
        tune_gpus(model, task, described, seq_length, fixed, output, as_json=as_json)
        return
    from ipu_pipeline.cli.tune_ipus import tune_ipus

    asked = {
        "global_batch": global_batch, "micro_batch": micro_batch, "replicas": replicas,
        "ipus_per_replica": ipus_per_replica, "least_free": free,
    }  # fmt: skip
    run = {"device_iterations": device_iterations, "optimizer": optimizer}
    tune_ipus(model, task, described, seq_length, asked, run, compare, output, ipu_config_output,
              as_json=as_json)  # fmt: skip


def _refuse_foreign(context: typer.Context, machine: Machine) -> str:
    """Return the name of the machine's backend; refuse options of another one.

    Raises:
        ValueError: An option means nothing there, or the backend has no search over settings.
    """
    from ipu_pipeline.planner.backend import backend_of

    name = backend_of(machine).name
    foreign = {"ipu": GPU_OPTIONS, "cluster": IPU_OPTIONS}
    if name not in foreign:
        raise ValueError(
            f"{machine.name} belongs to backend {name}, which has no settings to search; tune for "
            "IPUs (pod16) or GPUs (h100-x64), or use plan"
        )
    given = [
        option
        for option in foreign[name]
        if getattr(context.get_parameter_source(option), "name", "") == "COMMANDLINE"
    ]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        kinds = ("GPUs", "IPUs") if name == "ipu" else ("IPUs", "GPUs")
        raise ValueError(
            f"{flag} is for {kinds[0]}, and {machine.name} has {kinds[1]}; leave it out, or name "
            "another machine"
        )
    return name
