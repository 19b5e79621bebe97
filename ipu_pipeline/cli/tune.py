"""The command ``tune``: the search over every setting of a pod, or every parallel size of GPUs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    save_plan,
)
from ipu_pipeline.cli.progress import progress_bar

if TYPE_CHECKING:
    from ipu_pipeline.backends.ipu.config import IPUConfig
    from ipu_pipeline.backends.ipu.prices import Prediction
    from ipu_pipeline.backends.ipu.tune import TunePoint, TuneResult
    from ipu_pipeline.capture import CapturedModel
    from ipu_pipeline.ir.graph import BlockGraph
    from ipu_pipeline.ir.machine import Machine
    from ipu_pipeline.ir.plan import ModelIdentity

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
# Micro batches that are captured: with few samples the tokens are as many as some width of a model
# rather often, and operations of different shapes then look alike.
CAPTURED = (3, 5)
Capture = Callable[[int], "CapturedModel"]


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
        fixed = {
            "global_batch": global_batch, "micro_batch": micro_batch, "replicas": replicas,
            "pp": pp, "tp": tp, "cp": cp, "ep": ep, "vpp": vpp, "schedule": schedule,
            "zero_stage": zero_stage, "recompute": recompute, "vocabulary": vocabulary,
        }  # fmt: skip
        settings = {"precision": precision and precision.value, "optimizer": optimizer,
                    "engine": engine}  # fmt: skip
        capturer = partial(gpu_capturer, model, task, seq_length)
        _tune_gpus(capturer, described, fixed, settings, output, as_json=as_json)
        return
    asked = {
        "global_batch": global_batch, "micro_batch": micro_batch, "replicas": replicas,
        "ipus_per_replica": ipus_per_replica, "least_free": free,
    }  # fmt: skip
    run = {"device_iterations": device_iterations, "optimizer": optimizer}
    capture = _capturer(model, task, seq_length)
    result = _tune_ipus(capture, described, asked, run, compare, as_json=as_json)
    for said in _written(result, capture, output, ipu_config_output):
        typer.echo(said, err=as_json)


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


def _tune_ipus(
    capture: Capture,
    machine: Machine,
    asked: dict[str, Any],
    run: dict[str, Any],
    compare: str | None,
    *,
    as_json: bool,
) -> TuneResult:
    """Search the settings of a pod and print the front, and a configuration to compare with.

    Args:
        capture: Captures the model for a micro batch.
        machine: A pod.
        asked: Fields of the request.
        run: Settings that all programs have in common.
        compare: Name of the configuration.
        as_json: Print figures instead of text.

    Raises:
        ValueError: The optimizer is unknown.
    """
    from ipu_pipeline.backends.ipu.settings import OPTIMIZERS
    from ipu_pipeline.backends.ipu.tune import SETTINGS, TuneRequest, tune
    from ipu_pipeline.backends.ipu.tune_text import comparison_text, result_text

    optimizer = run["optimizer"]
    if optimizer.lower() not in map(str.lower, OPTIMIZERS):
        raise ValueError(f"optimizer {optimizer!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    request = TuneRequest(**asked, settings=replace(SETTINGS, **run))
    rival = None if compare is None else _published(compare, machine)
    with progress_bar() as shown:
        result = tune(capture, machine, request, shown)
    other = None if rival is None else result.predict(rival, capture)
    if as_json:
        typer.echo(json.dumps(_as_json(result, other), indent=1))
    else:
        typer.echo(result_text(result))
        if compare is not None and other is not None:
            typer.echo(f"\n{comparison_text(result, compare, other)}")
    return result


def _written(
    result: TuneResult,
    capture: Capture,
    output: Path | None,
    ipu_config_output: Path | None,
) -> Iterator[str]:
    """Write the best point to the files that were asked for, and say so."""
    from ipu_pipeline.capture import model_identity

    size = result.best.prediction.micro_batch
    if output is not None:
        result.plan(model_identity(capture(size).model)).save(output)
        yield f"plan written to {output}"
    if ipu_config_output is not None:
        path = result.ipu_config().save(ipu_config_output)
        yield f"IPU configuration written to {path} (micro batch {size})"


def _capturer(model: str, task: str | None, seq_length: int) -> Capture:
    from ipu_pipeline.capture import capture
    from ipu_pipeline.capture.from_config import config_named, from_config

    @cache
    def captured(micro_batch: int) -> CapturedModel:
        built, batch = from_config(model, task, batch_size=micro_batch, seq_length=seq_length)
        with config_named(model):
            return capture(built, batch)

    return captured


def _published(name: str, machine: Machine) -> IPUConfig:
    """Return a published configuration, with its replicas for a pod of this size."""
    from ipu_pipeline.backends.ipu.config import find_config

    pod = re.search(r"pod\d+", machine.name)
    return find_config(name).for_pod(pod[0] if pod else None)


def _as_json(result: TuneResult, other: Prediction | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": result.machine.name,
        "global_batch": result.request.global_batch,
        "settings": len(result.front.pipelines),
        "seconds": result.front.seconds,
        "complete": result.front.complete,
        "front": [_point_json(result, point) for point in result.front.points],
    }
    if other is not None:
        found["compared"] = {
            "samples_per_s": other.samples_per_s,
            "samples_per_step": other.samples_per_step,
            "micro_batch": other.micro_batch,
            "recomputation": other.settings.recomputation,
            "fits": other.fits,
            "free": other.free,
        }
    return found


def _point_json(result: TuneResult, point: TunePoint) -> dict[str, Any]:
    return {
        "samples_per_s": point.samples_per_s,
        "step_s": point.prediction.time.total_s,
        "bound_s": point.bound_s,
        "free": point.free,
        "micro_batch": point.prediction.micro_batch,
        "recomputation": point.prediction.settings.recomputation,
        "ipu_config": result.ipu_config(point).to_dict(),
    }


def _tune_gpus(
    capturer: Callable[..., tuple[ModelIdentity, Callable[[int], BlockGraph]]],
    machine: Machine,
    fixed: dict[str, Any],
    named: dict[str, Any],
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Search the sizes on GPUs, print the front and write the best plan.

    Args:
        capturer: As :func:`gpu_capturer`.
        machine: GPUs.
        fixed: Fields of the request.
        named: Settings; those without a value are left to their defaults.
        output: File of the best plan.
        as_json: Print figures instead of text.
    """
    from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings
    from ipu_pipeline.backends.cluster.tune.search import tune
    from ipu_pipeline.backends.cluster.tune.space import GpuRequest
    from ipu_pipeline.backends.cluster.tune.text import as_json as figures
    from ipu_pipeline.backends.cluster.tune.text import result_text

    given = {name: value for name, value in named.items() if value is not None}
    settings = GpuSettings.read({"engine": "megatron", **given})
    request = GpuRequest(**fixed, settings=settings)
    identity, capture = capturer(
        named["precision"],
        searched=request.micro_batch is None,
        fused=settings.engine == "megatron",
    )
    with progress_bar() as shown:
        result = tune(capture, machine, request, identity, shown)
    typer.echo(json.dumps(figures(result), indent=1) if as_json else result_text(result))
    save_plan(result.best.plan, output, quiet=as_json)


def gpu_capturer(
    model: str,
    task: str | None,
    seq_length: int,
    precision: str | None,
    *,
    searched: bool,
    fused: bool,
) -> tuple[ModelIdentity, Callable[[int], BlockGraph]]:
    """Return what the plan remembers of the model, and what captures it for a micro batch.

    Where the micro batch is searched, all follow from two that are captured. Attention with sinks
    is one operation where the engine fuses it.
    """
    from ipu_pipeline.capture import capture, model_identity
    from ipu_pipeline.capture.from_config import (
        config_named,
        dtype_for,
        from_config,
        in_dtype,
        on_meta,
    )
    from ipu_pipeline.capture.patches import fused_sinks
    from ipu_pipeline.ir.micro_batches import extrapolated

    graphs: dict[int, BlockGraph] = {}

    def captured(micro_batch: int) -> BlockGraph:
        if micro_batch not in graphs:
            first, second = (run(size) for size in CAPTURED) if searched else (None, None)
            found = first and second and extrapolated(first, second, micro_batch)
            graphs[micro_batch] = found or run(micro_batch)
        return graphs[micro_batch]

    @cache
    def run(micro_batch: int) -> BlockGraph:
        built, batch = from_config(
            model, task, batch_size=micro_batch, seq_length=seq_length, padded=False
        )
        with config_named(model), fused_sinks(built) if fused else nullcontext():
            return capture(*in_dtype(built, batch, dtype_for(built, precision))).graph

    return model_identity(on_meta(model, task)), captured
