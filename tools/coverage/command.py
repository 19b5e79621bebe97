"""The command of ``python -m tools.coverage``: every model class of transformers, checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ipu_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from tools.coverage.record import Record


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def coverage_command(  # noqa: PLR0913 - options of one command
    classes: Annotated[
        str,
        typer.Option("--classes", help="Name, architecture or task, with wildcards."),
    ] = "*",
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Only so many, spread over the tasks.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes; default: one per core.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write this JSON file, and a page beside it (.md)."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an interrupted run has found.")
    ] = False,
    at_most: Annotated[
        int | None,
        typer.Option("--at-most", min=0, help="Check so many more; write what is known then."),
    ] = None,
    ipus: Annotated[
        bool,
        typer.Option("--ipus", help="Plan for 2, 4 and 8 IPUs, and emit what is planned, instead."),
    ] = False,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="Generate on ranks for 2 and 4 stages instead."),
    ] = False,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=1.0, help="Seconds for one class.")
    ] = 60.0,
) -> None:
    """Capture, plan and train one step of every model class of transformers; compare with eager."""
    from ipu_pipeline.ir.files import check_outputs, make_folder
    from tools.coverage.classes import model_classes
    from tools.coverage.classes import sample as spread
    from tools.coverage.emitted import check_emitted
    from tools.coverage.generated import check_generated, generates
    from tools.coverage.session import check_all

    try:
        if output is not None:
            make_folder("--output", output.parent)
            page, journal = output.with_suffix(".md"), output.with_suffix(".jsonl")
            outputs = {"--output": output, "its page": page, "its journal": journal}
            check_outputs(outputs, force=True)
        check = check_emitted if ipus else check_generated if generate else None
        known = [item for item in model_classes() if not generate or generates(item)]
        chosen = [item for item in model_classes(classes) if item in known]
        if sample is not None:
            chosen = spread(chosen, sample)
        records = check_all(
            chosen,
            jobs=jobs,
            output=output,
            resume=resume,
            time_limit_s=time_limit,
            check=check,
            at_most=at_most,
            total=len(known),
        )
    except PipelineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for record in records:
        if record.counted and record.result != "pass":
            typer.echo(f"{record.name}: {record.result}: {record.reason}")
    typer.echo(_last_line(records))
    if output is not None:
        typer.echo(f"written to {output} and {output.with_suffix('.md')}")


def _last_line(records: list[Record]) -> str:
    from tools.coverage.table import summary

    numbers = summary(records)
    kinds = ", ".join(f"{count} {kind}" for kind, count in numbers["results"].items())
    return (
        f"{numbers['passed']} of {numbers['counted']} counted classes pass, of "
        f"{numbers['architectures_passed']} architectures ({kinds})"
    )
