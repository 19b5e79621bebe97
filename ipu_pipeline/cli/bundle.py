"""Two commands about bundles for IPUs, ``emit`` and ``run``."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from ipu_pipeline.cli.options import (
    Force,
    IPUConfigName,
    IPUConfigOverrides,
    PlanFile,
    PodType,
    counted,
    measured,
    read_ipu_config,
)
from ipu_pipeline.ir.limits import count_of

BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder written by emit.")]


BundleOutput = Annotated[Path, typer.Option("--output", "-o", help="Folder for the bundle.")]
ModelConfig = Annotated[
    Path | None,
    typer.Option("--model", help="config.json or its folder, copied for fresh weights."),
]
OptimizerName = Annotated[
    str, typer.Option("--optimizer", help="AdamW, Adam, LAMB, SGD or RMSprop.")
]
LearningRate = Annotated[float, measured("--learning-rate", "At the start.")]
WeightDecay = Annotated[float, measured("--weight-decay", "Of all groups.")]
LossScaling = Annotated[
    float, measured("--loss-scaling", "Factor of the loss before its backward pass.", 1e-6)
]
MaxGradNorm = Annotated[
    float | None, measured("--max-grad-norm", "Clip gradients; default: do not.", 1e-6)
]
Half = Annotated[bool, typer.Option("--half", help="Weights and activations in float16.")]
Seed = Annotated[int, counted("--seed", "seed", "Of every random number.", 0)]


def emit_command(
    plan_file: PlanFile,
    output: BundleOutput,
    ipu_config: IPUConfigName = None,
    ipu_config_overrides: IPUConfigOverrides = "",
    pod_type: PodType = None,
    model: ModelConfig = None,
    optimizer: OptimizerName = "AdamW",
    learning_rate: LearningRate = 5e-5,
    weight_decay: WeightDecay = 0.0,
    loss_scaling: LossScaling = 1.0,
    max_grad_norm: MaxGradNorm = None,
    half: Half = False,
    seed: Seed = 42,
    force: Force = False,
) -> None:
    """Write a plan as a folder that trains under poptorch, without this package."""
    from ipu_pipeline.backends.ipu.bundle import emit
    from ipu_pipeline.backends.ipu.check import notes
    from ipu_pipeline.backends.ipu.settings import OptimizerSettings, settings_for
    from ipu_pipeline.ir.files import make_folder
    from ipu_pipeline.ir.plan import Plan

    make_folder("--output", output, force=force)
    plan = Plan.load(plan_file)
    config = read_ipu_config(ipu_config, ipu_config_overrides, pod_type)
    settings = settings_for(
        plan,
        config,
        optimizer=OptimizerSettings(
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            loss_scaling=loss_scaling,
            max_grad_norm=max_grad_norm,
            accum_dtype="float16" if half else "float32",
        ),
        half=half,
        seed=seed,
    )
    folder = emit(plan, settings, output, model_config=_model_config(model))
    said = settings.config.legacy_notes()  # when the configuration was read
    for note in (note for note in notes(plan, settings) if note not in said):
        typer.echo(f"note: {note}", err=True)
    samples = plan.total_batch_size * settings.config.device_iterations
    typer.echo(
        f"bundle written to {folder}: {count_of(plan.num_stages, 'stage')}, "
        f"{count_of(samples, 'sample')} per call of the device\nread "
        f"{folder / 'model_parallel.py'}; run it with: python {folder / 'run.py'} (where poptorch "
        f"is), or here: ipu-pipeline run {folder} --emulate"
    )


def _model_config(model: Path | None) -> str | None:
    """Return the text of ``config.json``, or of the one in a folder; ``None`` for none."""
    from ipu_pipeline.errors import LoweringError
    from ipu_pipeline.ir.codec import read_json

    if model is None:
        return None
    path = model / "config.json" if model.is_dir() else model
    found = read_json(path, "the model's configuration", LoweringError)
    if not isinstance(found, dict):
        raise LoweringError(f"cannot read the model's configuration {path}: it holds no object")
    return json.dumps(found, indent=2)


def run_command(
    context: typer.Context,
    bundle: BundleFolder,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Run on this machine's CPU with the stand-in.")
    ] = False,
) -> None:
    """Run a bundle, with the arguments of its run.py after its name (try: -- --help)."""
    from ipu_pipeline.errors import LoweringError

    script = bundle / "run.py"
    if not script.is_file():
        raise LoweringError(f"{bundle} is no bundle: it has no run.py; write one with emit")
    arguments = [str(script), *context.args]
    if not emulate:
        _require_poptorch(bundle)
        _run(arguments)
        return
    try:
        import ipu_pipeline_emulator as emulator
    except ModuleNotFoundError as error:
        raise LoweringError(
            "the stand-in for poptorch is not installed; get it with pip install "
            "ipu-pipeline-emulator, or from a checkout with pip install -e tools/emulator"
        ) from error
    with emulator.install():
        typer.echo(
            "emulated on the CPU: results as on the device, speed and memory are not", err=True
        )
        _run(arguments)


def _require_poptorch(bundle: Path) -> None:
    from importlib.util import find_spec

    from ipu_pipeline.errors import LoweringError

    if find_spec("poptorch") is None:
        raise LoweringError(
            "poptorch is not installed: it comes with Graphcore's SDK; copy the bundle to a "
            f"machine that has it, or emulate it here: ipu-pipeline run {bundle} --emulate"
        )


def _run(arguments: list[str]) -> None:
    """Run the script as ``python run.py`` would; its imports do not outlive it."""
    before, path = sys.argv, list(sys.path)
    loaded = set(sys.modules)
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            typer.echo(leaving.code, err=True)
            raise typer.Exit(1) from leaving
        if leaving.code:
            raise typer.Exit(int(leaving.code)) from leaving
    finally:
        sys.argv, sys.path[:] = before, path
        for name in set(sys.modules) - loaded:
            if name.split(".")[0] == "runtime":
                del sys.modules[name]
