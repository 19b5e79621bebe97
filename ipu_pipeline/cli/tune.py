"""The command ``tune``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ipu_pipeline.cli.options import (
    Force,
    JsonOption,
    Model,
    PlanOutput,
    SeqLength,
    TaskOption,
    counted,
    measured,
)

if TYPE_CHECKING:
    from ipu_pipeline.backends.ipu.config import IPUConfig
    from ipu_pipeline.backends.ipu.prices import Prediction
    from ipu_pipeline.backends.ipu.tune import Progress, TunePoint, TuneResult
    from ipu_pipeline.capture import CapturedModel
    from ipu_pipeline.ir.machine import Machine


# Options that mean something on one kind of machines only, by the names of their parameters.
IPU_OPTIONS = ("ipus_per_replica", "device_iterations", "free", "compare", "ipu_config_output")
GPU_OPTIONS = ("pp", "tp", "cp", "ep", "vpp", "schedule", "zero_stage", "recompute", "precision",
               "engine")  # fmt: skip


def tune_command(
    context: typer.Context,
    model: Model,
    global_batch: Annotated[
        int, counted("--global-batch", "global_batch", "Samples of one optimizer step.")
    ],
    task: TaskOption = None,
    machine: Annotated[
        str,
        typer.Option("--machine", help="pod16, h100-x64, gb200-x72, ..., or a machine file."),
    ] = "pod16",
    seq_length: SeqLength = 128,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="sgd, or one with two moments.")
    ] = "adamw",
    micro_batch: Annotated[
        int | None, counted("--micro-batch", "micro_batch", "Default: searched.")
    ] = None,
    ipus_per_replica: Annotated[
        int | None, counted("--ipus-per-replica", "num_stages", "Default: searched.")
    ] = None,
    replicas: Annotated[int | None, counted("--replicas", "replicas", "Default: searched.")] = None,
    device_iterations: Annotated[
        int, counted("--device-iterations", "device_iterations", "Steps per return to the host.")
    ] = 4,
    free: Annotated[
        float, measured("--free", "Share of every tile that must stay free.", most=0.99)
    ] = 0.0,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="CONFIG", help="ipu_config.json or published name."),
    ] = None,
    pp: Annotated[int | None, counted("--pp", "num_devices", "GPUs: ranks of a pipeline.")] = None,
    tp: Annotated[
        int | None, counted("--tp", "num_devices", "GPUs: ranks that share every product.")
    ] = None,
    cp: Annotated[
        int | None, counted("--cp", "num_devices", "GPUs: ranks that share a sequence.")
    ] = None,
    ep: Annotated[
        int | None, counted("--ep", "num_devices", "GPUs: ranks that share the experts.")
    ] = None,
    vpp: Annotated[int | None, counted("--vpp", "num_devices", "GPUs: stages of a rank.")] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="GPUs: 1f1b, interleaved, zbv, ...")
    ] = None,
    zero_stage: Annotated[
        int | None, typer.Option("--zero-stage", min=0, max=3, help="GPUs: 0 to 3.")
    ] = None,
    recompute: Annotated[
        str | None,
        typer.Option("--recompute", help="GPUs: none, full, or parts: core_attn,mlp,layernorm."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="GPUs: bfloat16, float16, float32, float8, float4."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="GPUs: megatron (default), or torch: this project's own."),
    ] = None,
    output: PlanOutput = None,
    ipu_config_output: Annotated[
        Path | None,
        typer.Option("--ipu-config-output", help="Write the best ipu_config.json here."),
    ] = None,
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
            "zero_stage": zero_stage, "recompute": recompute, "precision": precision,
            "optimizer": optimizer, "engine": engine,
        }  # fmt: skip
        with _progress() as progress:
            tune_gpus(model, task, described, seq_length, fixed, output, progress, as_json=as_json)
        return
    from ipu_pipeline.backends.ipu.settings import OPTIMIZERS
    from ipu_pipeline.backends.ipu.tune import SETTINGS, TuneRequest, tune
    from ipu_pipeline.backends.ipu.tune_text import comparison_text, result_text

    if optimizer.lower() not in map(str.lower, OPTIMIZERS):
        raise ValueError(f"optimizer {optimizer!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    run = replace(SETTINGS, device_iterations=device_iterations, optimizer=optimizer)
    request = TuneRequest(global_batch, micro_batch, ipus_per_replica, replicas, run,
                          least_free=free)  # fmt: skip
    rival = None if compare is None else _published(compare, described)
    capture = _capturer(model, task, seq_length)
    with _progress() as progress:
        result = tune(capture, described, request, progress)
    other = None if rival is None else result.predict(rival, capture)
    if as_json:
        typer.echo(json.dumps(_as_json(result, other), indent=1))
    else:
        typer.echo(result_text(result))
        if compare is not None and other is not None:
            typer.echo(f"\n{comparison_text(result, compare, other)}")
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


def _written(
    result: TuneResult,
    capture: Callable[[int], CapturedModel],
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


def _capturer(model: str, task: str | None, seq_length: int) -> Callable[[int], CapturedModel]:
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


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


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
