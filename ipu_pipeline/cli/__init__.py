"""The command line: plan a model, read a plan, list blocks, check the installation.

Heavy imports stay inside functions, so that ``--help`` answers at once. An error that the user
can act on is one message on stderr and exit code 1; with ``IPU_PIPELINE_TRACEBACK=1`` in the
environment it is raised instead.
"""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import io
import logging
import os
import sys
from collections.abc import Callable
from enum import Enum
from typing import Annotated, ParamSpec

import typer

from ipu_pipeline.cli.bundle import emit_command, run_command
from ipu_pipeline.cli.launch import dryrun_command, launch_command
from ipu_pipeline.cli.layouts import export_command, import_command, predict_command
from ipu_pipeline.cli.options import (
    Force,
    IPUConfigName,
    IPUConfigOverrides,
    MicroBatch,
    Model,
    PlanFile,
    PlanOutput,
    PodType,
    PrecisionOption,
    SeqLength,
    TaskOption,
    Tp,
    counted,
    gpu_settings,
    has_kernels,
    read_ipu_config,
    read_shares,
    save_plan,
)
from ipu_pipeline.cli.progress import LOGGER, progress_line
from ipu_pipeline.cli.report import compare_command, report_command, simulate_command
from ipu_pipeline.cli.tune import tune_command
from ipu_pipeline.errors import INTERRUPTED, PipelineError, printable

P = ParamSpec("P")
TRACEBACK_VARIABLE = "IPU_PIPELINE_TRACEBACK"
CONTEXT = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="ipu-pipeline",
    help="Find the fastest pipeline split of a Transformers model that fits a machine.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Granularity(str, Enum):
    """How finely a model is cut into blocks."""

    layer = "layer"
    sublayer = "sublayer"
    op = "op"


class Costs(str, Enum):
    """Where the prices of the blocks come from."""

    analytic = "analytic"
    profiled = "profiled"


GranularityOption = Annotated[Granularity, typer.Option("--granularity", help="Size of a block.")]


def _one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors that the user can act on, and Ctrl-C, into one message and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (PipelineError, ValueError) as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            typer.echo(f"error: {printable(str(error))}", err=True)
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno == errno.EPIPE or os.environ.get(TRACEBACK_VARIABLE):
                raise  # whoever read the output has enough
            typer.echo(f"error: {printable(str(error))}; make room, or write elsewhere", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error

    return wrapped


def _version(*, wanted: bool) -> None:
    if wanted:
        from ipu_pipeline import __version__

        typer.echo(f"ipu-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[  # noqa: ARG001 - its callback has acted
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which, exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say on stderr what is done, and how long.")
    ] = False,
) -> None:
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        LOGGER.setLevel(logging.INFO)


AnyMachine = Annotated[
    str, typer.Option("--machine", help="local, a known machine such as pod16, or a file.")
]
NumStages = Annotated[
    int | None, counted("--num-stages", "num_stages", "Default: the config's, or the best.")
]
Microbatches = Annotated[
    int | None,
    counted(
        "--microbatches",
        "num_microbatches",
        "Per step of a replica, or of all if searched; default: the config's, or at least 8.",
    ),
]
Replicas = Annotated[
    int | None,
    counted("--replicas", "replicas", "Default: the config's; on GPUs the best; else 1."),
]
Schedule = Annotated[
    str | None,
    typer.Option("--schedule", help="1f1b, gpipe, interleaved, zbv, ...; default: 1f1b."),
]
Optimizer = Annotated[
    str | None, typer.Option("--optimizer", help="GPUs: adamw (default), momentum, sgd.")
]
CostsOption = Annotated[
    Costs, typer.Option("--costs", help="Compute the prices, or measure them here.")
]
Passes = Annotated[
    str, typer.Option("--passes", help="Such as serialize_projection{factor=4},recompute.")
]
Vocabulary = Annotated[
    str | None,
    typer.Option(
        "--vocabulary", help="Spread head, loss and embeddings over stages: auto, even, or 1,1,2."
    ),
]


@app.command("plan")
@_one_line_errors
def plan_command(
    model: Model,
    task: TaskOption = None,
    machine: AnyMachine = "local",
    num_stages: NumStages = None,
    micro_batch: MicroBatch = 1,
    microbatches: Microbatches = None,
    replicas: Replicas = None,
    schedule: Schedule = None,
    tp: Tp = None,
    precision: PrecisionOption = None,
    optimizer: Optimizer = None,
    seq_length: SeqLength = 128,
    granularity: GranularityOption = Granularity.layer,
    costs: CostsOption = Costs.analytic,
    ipu_config: IPUConfigName = None,
    ipu_config_overrides: IPUConfigOverrides = "",
    pod_type: PodType = None,
    passes: Passes = "",
    vocabulary: Vocabulary = None,
    output: PlanOutput = None,
    force: Force = False,
) -> None:
    """Split a model for a machine and say how close to the optimum the split is."""
    from ipu_pipeline.capture.from_config import config_named, from_config
    from ipu_pipeline.compiler import plan
    from ipu_pipeline.ir.files import check_outputs

    check_outputs({"--output": output}, force=force)
    config = read_ipu_config(ipu_config, ipu_config_overrides, pod_type)
    with progress_line(), config_named(model):
        made = plan(
            *from_config(
                model,
                task,
                batch_size=micro_batch,
                seq_length=seq_length,
                device="cpu" if costs is Costs.profiled else "meta",
                padded=not has_kernels(machine),
            ),
            machine=machine,
            num_stages=num_stages,
            microbatches=microbatches,
            schedule=schedule,
            costs=costs.value,
            granularity=granularity.value,
            config=config,
            passes=passes,
            replicas=replicas,
            settings=gpu_settings(
                machine, tp=tp, precision=precision and precision.value, optimizer=optimizer
            ),
            vocabulary=read_shares(vocabulary),
        )
    typer.echo(made.explain())
    save_plan(made, output)


@app.command()
@_one_line_errors
def explain(plan_file: PlanFile) -> None:
    """Print what a saved plan decides and predicts."""
    from ipu_pipeline.ir.plan import Plan

    typer.echo(Plan.load(plan_file).explain())


_COMMANDS: dict[str, Callable[..., None]] = {
    "simulate": simulate_command,
    "report": report_command,
    "compare": compare_command,
    "dryrun": dryrun_command,
    "predict": predict_command,
    "export": export_command,
    "import": import_command,
    "tune": tune_command,
    "emit": emit_command,
    "run": run_command,
    "launch": launch_command,
}
for name, command in _COMMANDS.items():
    # What follows the name of a bundle is for its run.py.
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True} if name == "run" else {}
    app.command(name, context_settings=passed_on)(_one_line_errors(command))


@app.command()
@_one_line_errors
def blocks(
    model: Model,
    task: TaskOption = None,
    micro_batch: MicroBatch = 1,
    seq_length: SeqLength = 128,
    granularity: GranularityOption = Granularity.layer,
) -> None:
    """List the blocks that a model is cut into, with their sizes."""
    from ipu_pipeline.capture import capture
    from ipu_pipeline.capture.from_config import config_named, from_config
    from ipu_pipeline.ir.text import graph_table

    built, batch = from_config(model, task, batch_size=micro_batch, seq_length=seq_length)
    with config_named(model):
        graph = capture(built, batch, granularity=granularity.value).graph
    typer.echo(graph_table(graph))


@app.command("doctor")
def doctor_command() -> None:
    """Say what is installed, what this machine offers, and which targets can run."""
    from ipu_pipeline.cli.doctor import report

    typer.echo(report())


def run() -> None:
    """Run the command line as a process of its own.

    Importing torch and transformers makes millions of objects that live until the end; looking
    through them again and again, and once more at exit, takes a third of a short command's time.
    """
    gc.set_threshold(200_000, 20, 100)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no text, or not print here
        sys.stdout.reconfigure(errors="backslashreplace")
    atexit.register(gc.freeze)
    app(prog_name="ipu-pipeline")
