"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ipu_pipeline.ir.limits import LIMITS

if TYPE_CHECKING:
    from ipu_pipeline.backends.ipu.config import IPUConfig
    from ipu_pipeline.ir.plan import Plan


def counted(flag: str, limit: str, text: str, least: int = 1) -> Any:
    """Return an option for a whole number from ``least`` to one of the limits."""
    return typer.Option(flag, min=least, max=LIMITS[limit], help=text)


def measured(flag: str, text: str, least: float = 0.0, most: float = 1e30) -> Any:
    """Return an option for a number from ``least`` to ``most``, which NaN is not."""
    return typer.Option(flag, min=least, max=most, callback=_refuse_nan, help=text)


def _refuse_nan(value: float | None) -> float | None:
    if value is not None and isnan(value):
        raise typer.BadParameter("NaN is no number.")
    return value


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub name, local folder, or config.json.")
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan written by plan -o.")]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="Such as question-answering; default: what the config names."),
]
SeqLength = Annotated[int, counted("--seq-length", "seq_length", "Tokens of a sequence.", 4)]
MicroBatch = Annotated[int, counted("--micro-batch", "micro_batch", "Samples of a microbatch.")]
PlanOutput = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the plan to this file.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
PodOption = Annotated[
    str, typer.Option("--machine", help="pod4, pod16, bow-pod16, ..., or a machine file.")
]
IPUConfigName = Annotated[
    str | None,
    typer.Option("--ipu-config", help="ipu_config.json, its folder, or a published name."),
]
IPUConfigOverrides = Annotated[
    str, typer.Option("--ipu-config-overrides", help="Such as a=1,b=[0.2 0.3],c=true.")
]
PodType = Annotated[
    str | None, typer.Option("--pod-type", help="Such as pod16: chooses the replicas.")
]


class Precision(str, Enum):
    """What matrix products are computed in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float8 = "float8"
    float4 = "float4"


# Sizes and settings of a run on GPUs. Left out, tune searches them.
GpuMachine = Annotated[str, typer.Option("--machine", help="Such as h100-x64, or a file.")]
Pp = Annotated[int | None, counted("--pp", "num_devices", "GPUs: ranks of a pipeline.")]
Tp = Annotated[int | None, counted("--tp", "num_devices", "GPUs: ranks that share every product.")]
Cp = Annotated[int | None, counted("--cp", "num_devices", "GPUs: ranks that share a sequence.")]
Ep = Annotated[int | None, counted("--ep", "num_devices", "GPUs: ranks that share the experts.")]
ZeroStage = Annotated[
    int | None, typer.Option("--zero-stage", min=0, max=3, help="GPUs: 0 to 3; default: 1.")
]
Recompute = Annotated[
    str | None,
    typer.Option("--recompute", help="GPUs: none, full, or parts: core_attn,mlp,layernorm."),
]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option("--precision", help="GPUs; default: the config's, or bfloat16."),
]
Microbatches = Annotated[
    int | None, counted("--microbatches", "num_microbatches", "Per step of one pipeline.")
]
GlobalBatch = Annotated[int | None, counted("--global-batch", "global_batch", "Samples of a step.")]


def save_plan(plan: Plan, path: Path | None, *, quiet: bool = False) -> None:
    """Write a plan where a file was asked for and say so, on stderr if ``quiet``."""
    if path is not None:
        plan.save(path)
        typer.echo(f"plan written to {path}", err=quiet)


def read_shares(text: str | None) -> Any:
    """Return what ``--vocabulary`` says, for :func:`ipu_pipeline.plan`, which checks it.

    Raises:
        ValueError: It is neither a word nor numbers with commas.
    """
    if text is None or text.isalpha():
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--vocabulary is {text!r}; give auto, even, or one share for each stage, such as 1,1,2"
        ) from None


def read_ipu_config(name: str | None, overrides: str, pod_type: str | None) -> IPUConfig | None:
    """Return the config that the three options describe, ``None`` when all are absent."""
    from ipu_pipeline.backends.ipu.config import IPUConfig, find_config

    if name is None and not overrides and pod_type is None:
        return None
    config = IPUConfig() if name is None else find_config(name)
    for note in config.legacy_notes():
        typer.echo(f"note: {note}", err=True)
    return config.apply_overrides(overrides).for_pod(pod_type)


def has_kernels(machine: str) -> bool:
    """Whether a machine has GPUs with known kernels."""
    from ipu_pipeline.planner.backend import backend_names, find_machine

    return machine not in backend_names() and bool(find_machine(machine, None).devices[0].kernels)


def gpu_settings(machine: str, **given: Any) -> dict[str, Any]:
    """Return the options of GPUs that were given, as settings of a plan.

    Raises:
        ValueError: They were, and the machine has no GPUs with known kernels.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if found and not has_kernels(machine):
        raise ValueError(
            f"--{next(iter(found))} is for GPUs with known kernels, such as h100-x64, and "
            f"{machine} has none; leave it out"
        )
    return found
