"""The command ``dryrun``: one rank of a job of any size, played on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ipu_pipeline.cli.options import JsonOption, PlanFile, TaskOption, counted


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
