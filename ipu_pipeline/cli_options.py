"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub name, local folder, or config.json.")
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="Such as question-answering; default: what the config names."),
]
SeqLength = Annotated[int, typer.Option("--seq-length", min=4, help="Tokens of a sequence.")]
MicroBatch = Annotated[int, typer.Option("--micro-batch", min=1, help="Samples of a microbatch.")]
PodOption = Annotated[
    str, typer.Option("--machine", help="pod4, pod16, bow-pod16, ..., or a machine file.")
]
