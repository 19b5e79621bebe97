"""The processes of a plan: ``launch`` starts a script in them, ``dryrun`` plays one rank."""

from __future__ import annotations

import functools
import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ipu_pipeline.cli.options import Force, JsonOption, PlanFile, TaskOption, counted
from ipu_pipeline.ir.limits import count_of

if TYPE_CHECKING:
    from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec
    from ipu_pipeline.ir.plan import Plan


Program = Annotated[
    list[str],
    typer.Argument(metavar="SCRIPT", help="After --: a script or -m module, and its arguments."),
]
Processes = Annotated[
    int | None,
    counted("--processes", "num_devices", "Default: what the plan and its schedule ask for."),
]
Schedule = Annotated[
    str | None,
    typer.Option("--schedule", help="gpipe, 1f1b, interleaved, zbv, ...; default: the plan's."),
]
Threads = Annotated[
    int | None,
    counted("--threads", "threads", "Of a process; default: its share of the cores."),
]
MaxRestarts = Annotated[
    int, counted("--max-restarts", "max_restarts", "Start all again after a failure.", 0)
]
LogDir = Annotated[Path | None, typer.Option("--log-dir", help="Keep what every rank writes.")]
Nodes = Annotated[int | None, counted("--nodes", "nodes", "Machines, for --print or --slurm.")]
GpusPerNode = Annotated[
    int | None, counted("--gpus-per-node", "gpus_per_node", "GPUs of each of them.")
]
OnMachine = Annotated[
    str | None, typer.Option("--machine", help="All of them together, such as a100-80g-x16.")
]
Endpoint = Annotated[
    str | None,
    typer.Option("--rdzv-endpoint", help="HOST[:PORT] of one node; default: this host."),
]
PrintOnly = Annotated[
    bool, typer.Option("--print", help="Print the command of every node, start nothing.")
]
Slurm = Annotated[
    Path | None, typer.Option("--slurm", metavar="FILE", help="Write a file for sbatch.")
]


def launch_command(
    plan_file: PlanFile,
    program: Program,
    processes: Processes = None,
    schedule: Schedule = None,
    threads: Threads = None,
    max_restarts: MaxRestarts = 0,
    log_dir: LogDir = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    machine: OnMachine = None,
    endpoint: Endpoint = None,
    print_only: PrintOnly = False,
    slurm: Slurm = None,
    force: Force = False,
) -> None:
    """Start a script in the processes that a plan needs, here or on a cluster.

    Such as: ipu-pipeline launch plan.json -- train.py --its-own option. It finds the plan in
    IPU_PIPELINE_PLAN, the target in IPU_PIPELINE_TARGET, and what --schedule says in
    IPU_PIPELINE_SCHEDULE. A plan for IPUs is started by poprun: --print or --slurm, and the run.py
    of its bundle as the script.
    """
    from ipu_pipeline.backends.cluster.launch.spec import check_program, make_spec
    from ipu_pipeline.ir.files import check_outputs
    from ipu_pipeline.ir.machines import machine_by_name
    from ipu_pipeline.ir.plan import Plan
    from ipu_pipeline.planner.backend import backend_of

    check_outputs({"--slurm": slurm}, force=force)
    here = not print_only and slurm is None
    _check_where(log_dir, endpoint, here=here, print_only=print_only)
    plan = Plan.load(plan_file)
    started = check_program(program, Path.cwd(), here=here)
    if backend_of(plan.machine).target == "poptorch":
        others = {"--schedule": schedule, "--threads": threads, "--max-restarts": max_restarts,
                  "--gpus-per-node": gpus_per_node, "--machine": machine,
                  "--rdzv-endpoint": endpoint}  # fmt: skip
        _refuse_for_ipus([flag for flag, value in others.items() if value], here=here)
        _print_poprun(plan, started, processes, nodes, slurm, print_only=print_only)
        return
    cores, gpus = _room() if here else (0, 0)
    spec = make_spec(
        plan, plan_file.absolute(), started, processes=processes, schedule=schedule,
        threads=threads, max_restarts=max_restarts, here=here, nodes=nodes,
        gpus_per_node=gpus_per_node,
        machine=None if machine is None else machine_by_name(machine),
        room=(gpus or cores) if here else None,
    )  # fmt: skip
    if here:
        _start(spec, cores, gpus, log_dir)
    if print_only:
        _print(spec, plan, endpoint)
    if slurm is not None:
        _write_slurm_file(spec, plan, slurm)


def _check_where(
    log_dir: Path | None, endpoint: str | None, *, here: bool, print_only: bool
) -> None:
    """Refuse options that belong to another place of the processes; make their folder."""
    from ipu_pipeline.ir.files import make_folder

    if log_dir is not None and not here:
        raise ValueError(
            "--log-dir is for processes that start here; give --print or --slurm alone"
        )
    if endpoint is not None and not print_only:
        raise ValueError(
            "--rdzv-endpoint is for --print: here, and under Slurm, the processes find each other"
        )
    if log_dir is not None:
        make_folder("--log-dir", log_dir)


def _refuse_for_ipus(given: list[str], *, here: bool) -> None:
    if given:
        raise ValueError(
            f"{', '.join(given)} is not for a plan for IPUs; --processes and --nodes are"
        )
    if here:
        raise ValueError(
            "a plan for IPUs is started by poprun, which comes with Graphcore's SDK: give --print "
            "or --slurm FILE, and the run.py of its bundle (ipu-pipeline emit) as the script"
        )


def _print_poprun(
    plan: Plan, started: Sequence[str], processes: int | None, nodes: int | None,
    slurm: Path | None, *, print_only: bool,
) -> None:  # fmt: skip
    from ipu_pipeline.backends.ipu.poprun import command_text, make_poprun, slurm_text
    from ipu_pipeline.ir.files import write_text

    run, folder = make_poprun(plan, started, instances=processes, hosts=nodes), Path.cwd()
    if print_only:
        typer.echo(command_text(run, python="python", folder=folder))
    if slurm is not None:
        write_text(slurm, slurm_text(run, python="python", folder=folder, name=_name(plan)))
        typer.echo(f"Slurm file written to {slurm}: {count_of(run.instances, 'process')} on "
                   f"{run.num_hosts} node(s)")  # fmt: skip


def _name(plan: Plan) -> str:
    return f"ipu-pipeline-{plan.model.model_class}"


def _room() -> tuple[int, int]:
    """Return the cores and GPUs of this machine."""
    import torch

    from ipu_pipeline.backends.cluster.launch.spec import usable_cores

    return usable_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0


def _start(spec: LaunchSpec, cores: int, gpus: int, log_dir: Path | None) -> None:
    from ipu_pipeline.backends.cluster.launch.spec import crowding
    from ipu_pipeline.backends.cluster.launch.torchrun import start

    if note := crowding(spec.num_processes, cores, gpus):
        typer.echo(f"note: {note}", err=True)
    threads = spec.threads(os.environ, cores)
    typer.echo(f"launch: {spec.described}; threads of each: {min(threads.values())}", err=True)
    tell = functools.partial(typer.echo, err=True)
    if code := start(spec, {**spec.settings(), **threads}, tell, log_dir):
        raise typer.Exit(code)


def _print(spec: LaunchSpec, plan: Plan, endpoint: str | None) -> None:
    from ipu_pipeline.backends.cluster.launch.torchrun import node_command

    typer.echo(
        node_command(
            spec, python=sys.executable, folder=Path.cwd(),
            run_id=f"ipu-pipeline-{plan.digest()}",
            endpoint=socket.gethostname() if endpoint is None else endpoint,
        )
    )  # fmt: skip


def _write_slurm_file(spec: LaunchSpec, plan: Plan, file: Path) -> None:
    from ipu_pipeline.backends.cluster.launch.torchrun import slurm_file
    from ipu_pipeline.ir.files import write_text

    text = slurm_file(spec, python=sys.executable, folder=Path.cwd(), name=_name(plan))
    write_text(file, text)
    typer.echo(
        f"Slurm file written to {file}: {spec.described} on {spec.num_nodes} node(s)\n"
        f"submit it with: sbatch --time HH:MM:SS {shlex.quote(str(file))}"
    )


def dryrun_command(
    plan_file: PlanFile,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Its config, as given to plan; default: only messages."),
    ] = None,
    task: TaskOption = None,
    rank: Annotated[
        int, counted("--rank", "num_devices", "Of replica x pipeline x tp, tp fastest.", 0)
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check the messages of all ranks, and play one rank: its memory, collectives, messages."""
    from ipu_pipeline.backends.cluster.dryrun.report import dry_run, model_of
    from ipu_pipeline.cli.progress import progress_line
    from ipu_pipeline.ir.plan import Plan

    plan = Plan.load(plan_file)
    with progress_line():
        given = () if model is None else model_of(plan, model, task)
        found = dry_run(plan, rank, *given)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else found.text())
    if found.messages.problem:
        raise typer.Exit(1)
