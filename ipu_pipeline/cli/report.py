"""Commands about saved plans: ``simulate``, ``report``, ``compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ipu_pipeline.cli.options import Force, JsonOption, PlanFile


def simulate_command(
    plan_file: PlanFile,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="Another one that its machine runs; default: the plan's."),
    ] = None,
    as_json: JsonOption = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write a trace for ui.perfetto.dev."),
    ] = None,
    force: Force = False,
) -> None:
    """Simulate one optimizer step: time, bubble, and memory of every device."""
    from ipu_pipeline.ir.files import check_outputs
    from ipu_pipeline.ir.plan import Plan
    from ipu_pipeline.planner.report.text import drawn, simulation_text
    from ipu_pipeline.planner.report.trace import write_trace
    from ipu_pipeline.planner.schedules.simulate import simulate

    check_outputs({"--trace": trace}, force=force)
    plan = Plan.load(plan_file)
    timeline = simulate(plan, schedule)
    if as_json:
        typer.echo(json.dumps(timeline.to_json(), indent=1))
    else:
        typer.echo(f"{simulation_text(plan, timeline)}\n\n{drawn(plan, timeline)}")
    if trace is not None:
        write_trace(plan, trace, timeline)
        typer.echo(f"trace written to {trace}", err=as_json)


def report_command(
    plan_file: PlanFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write one HTML page; default: print text."),
    ] = None,
    force: Force = False,
) -> None:
    """Report what a plan decides, costs, and how it would change with other settings."""
    from ipu_pipeline.ir.files import check_outputs
    from ipu_pipeline.ir.plan import Plan
    from ipu_pipeline.planner.report import text_report, write_report

    check_outputs({"--output": output}, force=force)
    plan = Plan.load(plan_file)
    if output is None:
        typer.echo(text_report(plan))
        return
    write_report(plan, output)
    typer.echo(f"report written to {output}")


def compare_command(
    first: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan written by plan -o.")],
    second: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one.")],
) -> None:
    """Print two plans side by side, and what makes the difference."""
    from ipu_pipeline.ir.plan import Plan
    from ipu_pipeline.planner.report.compare import compare_text

    names = [path.stem for path in (first, second)]
    if names[0] == names[1]:
        names = [str(path) for path in (first, second)]
    typer.echo(compare_text(Plan.load(first), Plan.load(second), names))
