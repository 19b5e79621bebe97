"""``ipu-pipeline tune`` on IPUs: the search over every setting of a pod."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ipu_pipeline.cli.progress import progress_bar

if TYPE_CHECKING:
    from ipu_pipeline.backends.ipu.config import IPUConfig
    from ipu_pipeline.backends.ipu.prices import Prediction
    from ipu_pipeline.backends.ipu.tune import TunePoint, TuneResult
    from ipu_pipeline.capture import CapturedModel
    from ipu_pipeline.ir.machine import Machine


def tune_ipus(
    model: str,
    task: str | None,
    machine: Machine,
    seq_length: int,
    asked: dict[str, Any],
    run: dict[str, Any],
    compare: str | None,
    output: Path | None,
    ipu_config_output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Search, print the front and write the best plan and configuration.

    Args:
        model: What the user calls it.
        task: Of the model.
        machine: A pod.
        seq_length: Tokens of a sequence.
        asked: Fields of the request.
        run: Settings that all programs have in common.
        compare: A configuration to compare with.
        output: File of the best plan.
        ipu_config_output: File of the best configuration.
        as_json: Print figures instead of text.

    Raises:
        ValueError: The optimizer is unknown.
    """
    from ipu_pipeline.backends.ipu.settings import OPTIMIZERS
    from ipu_pipeline.backends.ipu.tune import SETTINGS, TuneRequest, tune
    from ipu_pipeline.backends.ipu.tune_text import comparison_text, result_text

    optimizer = run["optimizer"]
    if optimizer.lower() not in map(str.lower, OPTIMIZERS):
        raise ValueError(f"optimizer {optimizer!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    request = TuneRequest(**asked, settings=replace(SETTINGS, **run))
    rival = None if compare is None else _published(compare, machine)
    capture = _capturer(model, task, seq_length)
    with progress_bar() as shown:
        result = tune(capture, machine, request, shown)
    other = None if rival is None else result.predict(rival, capture)
    if as_json:
        typer.echo(json.dumps(_as_json(result, other), indent=1))
    else:
        typer.echo(result_text(result))
        if compare is not None and other is not None:
            typer.echo(f"\n{comparison_text(result, compare, other)}")
    for said in _written(result, capture, output, ipu_config_output):
        typer.echo(said, err=as_json)


def _written(
    result: TuneResult,
    capture: Callable[[int], CapturedModel],
    output: Path | None,
    ipu_config_output: Path | None,
) -> Iterator[str]:
    """Write the best point to the files that were asked for, and say so."""
    from ipu_pipeline.capture import model_identity

    size = result.best.prediction.micro_batch
    if output is not None:
        result.plan(model_identity(capture(size).model)).save(output)
        yield f"plan written to {output}"
    if ipu_config_output is not None:
        path = result.ipu_config().save(ipu_config_output)
        yield f"IPU configuration written to {path} (micro batch {size})"


def _capturer(model: str, task: str | None, seq_length: int) -> Callable[[int], CapturedModel]:
    from ipu_pipeline.capture import capture
    from ipu_pipeline.capture.from_config import config_named, from_config

    @cache
    def captured(micro_batch: int) -> CapturedModel:
        built, batch = from_config(model, task, batch_size=micro_batch, seq_length=seq_length)
        with config_named(model):
            return capture(built, batch)

    return captured


def _published(name: str, machine: Machine) -> IPUConfig:
    """Return a published configuration, with its replicas for a pod of this size."""
    from ipu_pipeline.backends.ipu.config import find_config

    pod = re.search(r"pod\d+", machine.name)
    return find_config(name).for_pod(pod[0] if pod else None)


def _as_json(result: TuneResult, other: Prediction | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": result.machine.name,
        "global_batch": result.request.global_batch,
        "settings": len(result.front.pipelines),
        "seconds": result.front.seconds,
        "complete": result.front.complete,
        "front": [_point_json(result, point) for point in result.front.points],
    }
    if other is not None:
        found["compared"] = {
            "samples_per_s": other.samples_per_s,
            "samples_per_step": other.samples_per_step,
            "micro_batch": other.micro_batch,
            "recomputation": other.settings.recomputation,
            "fits": other.fits,
            "free": other.free,
        }
    return found


def _point_json(result: TuneResult, point: TunePoint) -> dict[str, Any]:
    return {
        "samples_per_s": point.samples_per_s,
        "step_s": point.prediction.time.total_s,
        "bound_s": point.bound_s,
        "free": point.free,
        "micro_batch": point.prediction.micro_batch,
        "recomputation": point.prediction.settings.recomputation,
        "ipu_config": result.ipu_config(point).to_dict(),
    }
