"""The command ``launch``: start a script in the processes of a plan; ``cli.py`` registers it."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ipu_pipeline.backends.cluster.launch.request import Request
    from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec
    from ipu_pipeline.ir.plan import Plan

Wrapper = Callable[[Callable[..., None]], Callable[..., None]]


def launch_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan written by plan -o.")],
    program: Annotated[
        list[str],
        typer.Argument(
            metavar="SCRIPT", help="After --: a script or -m module, and its arguments."
        ),
    ],
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Default: what the plan and its schedule ask for."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="gpipe, 1f1b, interleaved, zbv, ...; default: the plan's."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Of a process; default: its share of the cores."),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="Start all again after a failure.")
    ] = 0,
    log_dir: Annotated[
        Path | None, typer.Option("--log-dir", help="Keep what every rank writes.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Machines, for --print or --slurm.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="GPUs of each of them.")
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option("--machine", help="All of them together, such as a100-80g-x16."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--rdzv-endpoint", help="HOST[:PORT] of one node; default: this host."),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the command of every node, start nothing.")
    ] = False,
    slurm: Annotated[
        Path | None, typer.Option("--slurm", metavar="FILE", help="Write a file for sbatch.")
    ] = None,
) -> None:
    """Start a script in the processes that a plan needs, here or on a cluster.

    Such as: ipu-pipeline launch plan.json -- train.py --its-own option. It finds the plan in
    IPU_PIPELINE_PLAN, the target in IPU_PIPELINE_TARGET, and what --schedule says in
    IPU_PIPELINE_SCHEDULE.
    """
    from ipu_pipeline.backends.cluster.launch.request import Request, make_spec
    from ipu_pipeline.backends.cluster.launch.spec import check_program
    from ipu_pipeline.ir.machines import machine_by_name
    from ipu_pipeline.ir.plan import Plan

    here = not print_only and slurm is None
    plan = Plan.load(plan_file)
    started = check_program(program, Path.cwd())
    request = Request(
        processes=processes,
        schedule=schedule,
        threads=threads,
        max_restarts=max_restarts,
        here=here,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        machine=None if machine is None else machine_by_name(machine),
    )
    if here:
        _start(plan, plan_file.absolute(), started, request, log_dir)
        return
    spec = make_spec(plan, plan_file.absolute(), started, request)
    if print_only:
        typer.echo(_command(spec, plan, endpoint or socket.gethostname()))
    if slurm is not None:
        _write_slurm(spec, plan, slurm)


def _start(
    plan: Plan, plan_path: Path, program: tuple[str, ...], request: Request, log_dir: Path | None
) -> None:
    from ipu_pipeline.backends.cluster.launch.cores import usable_cores
    from ipu_pipeline.backends.cluster.launch.elastic import count_gpus, start
    from ipu_pipeline.backends.cluster.launch.request import make_spec
    from ipu_pipeline.backends.cluster.launch.spec import notes

    cores, gpus = usable_cores(), count_gpus()
    spec = make_spec(plan, plan_path, program, request, room=gpus or cores)
    for note in notes(spec, cores, gpus):
        typer.echo(f"note: {note}", err=True)
    threads = spec.threads(os.environ, cores)
    typer.echo(f"launch: {spec.described}; threads of each: {min(threads.values())}", err=True)
    code = start(spec, {**spec.settings(), **threads}, _tell, log_dir)
    if code:
        raise typer.Exit(code)


def _tell(text: str) -> None:
    typer.echo(text, err=True, nl=False)


def _command(spec: LaunchSpec, plan: Plan, endpoint: str) -> str:
    from ipu_pipeline.backends.cluster.launch.cluster import described_command, node_command

    command = node_command(
        spec,
        python=sys.executable,
        folder=Path.cwd(),
        run_id=f"ipu-pipeline-{plan.digest()}",
        endpoint=endpoint,
    )
    return described_command(spec, command, endpoint)


def _write_slurm(spec: LaunchSpec, plan: Plan, path: Path) -> None:
    from ipu_pipeline.backends.cluster.launch.cluster import slurm_file

    name = f"ipu-pipeline-{plan.model.model_class}"
    path.write_text(
        slurm_file(spec, python=sys.executable, folder=Path.cwd(), name=name), encoding="utf-8"
    )
    typer.echo(
        f"Slurm file written to {path}: {spec.described} on {spec.num_nodes} node(s)\n"
        f"submit it with: sbatch --time HH:MM:SS {shlex.quote(str(path))}"
    )


def register(app: typer.Typer, wrapper: Wrapper) -> None:
    """Add the command to ``app``; ``wrapper`` turns errors into one line and exit code 1."""
    app.command("launch")(wrapper(launch_command))
