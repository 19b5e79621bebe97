"""``ipu-pipeline tune`` on GPUs: the search over every parallel size."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ipu_pipeline.cli.options import save_plan
from ipu_pipeline.cli.progress import progress_bar

if TYPE_CHECKING:
    from ipu_pipeline.ir.graph import BlockGraph
    from ipu_pipeline.ir.machine import Machine
    from ipu_pipeline.ir.plan import ModelIdentity

# Micro batches that are captured: with few samples the tokens are as many as some width of a model
# rather often, and operations of different shapes then look alike.
CAPTURED = (3, 5)
Fixed = dict[str, Any]


def tune_gpus(
    model: str,
    task: str | None,
    machine: Machine,
    seq_length: int,
    fixed: Fixed,
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Search, print the front and write the best plan.

    Args:
        model: What the user calls it.
        task: Of the model.
        machine: GPUs.
        seq_length: Tokens of a sequence.
        fixed: Fields of the request; ``precision``, ``optimizer`` and ``engine`` are settings.
        output: File of the best plan.
        as_json: Print figures instead of text.
    """
    from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings
    from ipu_pipeline.backends.cluster.tune.search import tune
    from ipu_pipeline.backends.cluster.tune.space import GpuRequest
    from ipu_pipeline.backends.cluster.tune.text import as_json as figures
    from ipu_pipeline.backends.cluster.tune.text import result_text

    named = {name: fixed.pop(name) for name in ("precision", "optimizer", "engine")}
    given = {name: value for name, value in named.items() if value is not None}
    settings = GpuSettings.read({"engine": "megatron", **given})
    request = GpuRequest(**fixed, settings=settings)
    identity, capture = capturer(
        model,
        task,
        seq_length,
        named["precision"],
        searched=request.micro_batch is None,
        fused=settings.engine == "megatron",
    )
    with progress_bar() as shown:
        result = tune(capture, machine, request, identity, shown)
    typer.echo(json.dumps(figures(result), indent=1) if as_json else result_text(result))
    save_plan(result.best.plan, output, quiet=as_json)


def capturer(
    model: str,
    task: str | None,
    seq_length: int,
    precision: str | None,
    *,
    searched: bool,
    fused: bool,
) -> tuple[ModelIdentity, Callable[[int], BlockGraph]]:
    """Return what the plan remembers of the model, and what captures it for a micro batch.

    Where the micro batch is searched, all follow from two that are captured. Attention with sinks
    is one operation where the engine fuses it.
    """
    from ipu_pipeline.capture import capture, model_identity
    from ipu_pipeline.capture.from_config import (
        config_named,
        dtype_for,
        from_config,
        in_dtype,
        on_meta,
    )
    from ipu_pipeline.capture.patches import fused_sinks
    from ipu_pipeline.ir.micro_batches import extrapolated

    graphs: dict[int, BlockGraph] = {}

    def captured(micro_batch: int) -> BlockGraph:
        if micro_batch not in graphs:
            first, second = (run(size) for size in CAPTURED) if searched else (None, None)
            found = first and second and extrapolated(first, second, micro_batch)
            graphs[micro_batch] = found or run(micro_batch)
        return graphs[micro_batch]

    @cache
    def run(micro_batch: int) -> BlockGraph:
        built, batch = from_config(
            model, task, batch_size=micro_batch, seq_length=seq_length, padded=False
        )
        with config_named(model), fused_sinks(built) if fused else nullcontext():
            return capture(*in_dtype(built, batch, dtype_for(built, precision))).graph

    return model_identity(on_meta(model, task)), captured
