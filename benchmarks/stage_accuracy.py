"""Predicted against measured seconds of every stage, on this machine, in this process.

A stage's predicted time is its forward and backward seconds times the microbatches; its measured
time is ``StepResult.stage_s``, what it computed in one step without waiting, median of the steps.
The optimizer is in neither. A machine that slows down for some seconds between the two would be
taken for a wrong prediction, so both are done ``PASSES`` times in turns, for the split of the first
pass; medians count. Three ways to run a plan (``WAYS``):

- ``alone``: one stage with all threads;
- ``concurrent``: one thread for each of two stages, which run at the same time;
- ``in turns``: 2 or 4 stages one after another on one thread, because more stages than cores
  would measure how they share cores. The machine that the plan is made for is described so, too.

    python -m benchmarks.stage_accuracy [--models bert gpt2 ...] [--steps 2] [--clock processor]

``--clock processor`` takes the processor time of the stage's thread on both sides instead of wall
time, for a machine that does other work meanwhile; it misses what more than one thread per stage
does, so ``alone`` then has one thread. All is measured anew: the user's cache of measurements is
neither read nor written.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, median
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

import ipu_pipeline as ipp
from benchmarks.stage_models import MODELS
from ipu_pipeline.backends.local.measure import local_machine
from ipu_pipeline.backends.local.measure.cache import CACHE_VARIABLE, cache_folder
from ipu_pipeline.compiler import measured_seconds
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan, PlannedStage
from ipu_pipeline.planner.search import Constraints

SOURCES = ("analytic", "profiled")
LIMITS = {"analytic": 25.0, "profiled": 10.0}  # mean error in percent, of issue 9
MICROBATCHES = 4
PASSES = 3
CLOCKS = {"wall": time.perf_counter, "processor": time.thread_time}


@dataclass(frozen=True)
class Way:
    """A way to run a plan.

    Attributes:
        name: See the module.
        num_stages: Stages of the plan.
        at_once: Stages that run at the same time.
    """

    name: str
    num_stages: int
    at_once: int


WAYS = (
    Way("alone", 1, 1),
    Way("concurrent", 2, 2),
    Way("in turns", 2, 1),
    Way("in turns", 4, 1),
)


def measure(
    models: Sequence[str] = tuple(MODELS),
    *,
    steps: int = 2,
    ways: Sequence[Way] = WAYS,
    clock: str = "wall",
    progress: Callable[[str], object] | None = None,
) -> list[dict[str, Any]]:
    """Return one row per model, way, source of costs and stage.

    Args:
        models: Names in ``stage_models.MODELS``.
        steps: Timed steps of each plan in every pass; one more warms up.
        ways: How the plans are run.
        clock: ``wall``, or ``processor`` for the seconds of the stage's own thread.
        progress: Gets a line for each model, way and source of costs when it is measured.

    Returns:
        Rows with ``model``, ``way``, ``num_stages``, ``costs``, ``stage``, ``predicted_s``,
        ``measured_s`` and ``error_percent`` (positive: predicted too long).
    """
    rows = []
    with _fresh_cache(), mock.patch.object(time, "perf_counter", CLOCKS[clock]):
        for name in models:
            model, batch = MODELS[name].build()
            for way in ways:
                one_thread = clock == "processor" or way.name == "in turns"
                with _threads(1 if one_thread and way.at_once == 1 else None):
                    found = [{"model": name, **row} for row in _rows(model, batch, way, steps)]
                rows += found
                for line in _lines(found) if progress is not None else ():
                    progress(line)
            del model
            gc.collect()
    return rows


def _rows(
    model: nn.Module, batch: Mapping[str, Tensor], way: Way, steps: int
) -> Iterator[dict[str, Any]]:
    plans = {source: _planned(model, batch, way, source) for source in SOURCES}
    # The sources often agree on the split, which is then run once.
    runs = {_split(plan): _Run(model, plan, batch, way) for plan in plans.values()}
    predicted: dict[str, list[list[float]]] = {source: [] for source in SOURCES}
    for number in range(PASSES):
        if number > 0:
            _forget_blocks()
            plans = {s: _planned(model, batch, way, s, plan) for s, plan in plans.items()}
        for source, plan in plans.items():
            predicted[source].append([_stage_s(stage, plan) for stage in plan.stages])
        for run in runs.values():
            run.take(steps)
    for source, plan in plans.items():
        measured = runs[_split(plan)].finish()
        for index, (p, m) in enumerate(zip(_medians(predicted[source]), measured, strict=True)):
            yield {
                "way": way.name,
                "num_stages": way.num_stages,
                "costs": source,
                "stage": index,
                "predicted_s": p,
                "measured_s": m,
                "error_percent": 100 * (p / m - 1),
            }


def _split(plan: Plan) -> tuple[tuple[str, ...], ...]:
    return tuple(stage.blocks for stage in plan.stages)


def _stage_s(stage: PlannedStage, plan: Plan) -> float:
    return (stage.forward_s + stage.backward_s) * plan.num_microbatches


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    return [median(column) for column in zip(*rows, strict=True)]


def _planned(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    way: Way,
    source: str,
    like: Plan | None = None,
) -> Plan:
    """Plan for devices that are this machine as ``way`` shares it; with the split of ``like``."""
    measured = local_machine(way.at_once)
    devices = tuple(
        replace(measured.devices[0], name=f"cpu{index}") for index in range(way.num_stages)
    )
    machine: Machine = replace(measured, devices=devices)
    pins = {} if like is None else {b: i for i, blocks in enumerate(_split(like)) for b in blocks}

    def measured(captured: Any, inputs: Any, described: Machine, costs: str) -> Any:
        running = replace(described, devices=described.devices[: way.at_once])
        return measured_seconds(captured, inputs, running, costs)

    with mock.patch("ipu_pipeline.compiler.measured_seconds", measured):
        return ipp.plan(
            model,
            batch,
            machine=machine,
            num_stages=way.num_stages,
            microbatches=MICROBATCHES,
            costs=source,
            constraints=Constraints(pinned_stages=pins),
        )


class _Run:
    """Steps of one split, some in every pass."""

    def __init__(self, model: nn.Module, plan: Plan, batch: Mapping[str, Tensor], way: Way) -> None:
        self._batch = {name: torch.cat([value] * MICROBATCHES) for name, value in batch.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sequential = way.at_once < way.num_stages
        self._executable = ipp.compile(model, plan, optimizer=optimizer, sequential=sequential)
        self._found: list[Sequence[float]] = []

    def take(self, steps: int) -> None:
        """Warm up with one step and time some."""
        self._executable.train_step(self._batch)
        self._found += [self._executable.train_step(self._batch).stage_s for _ in range(steps)]

    def finish(self) -> list[float]:
        """Return the median seconds of every stage; there are no more steps."""
        self._executable.close()
        return _medians(self._found)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    """Keep measurements in a folder of this run."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        os.environ[CACHE_VARIABLE] = folder
        yield


def _forget_blocks() -> None:
    """Have the blocks measured again; the machine stays as it was calibrated."""
    for file in cache_folder().glob("blocks-*"):
        file.unlink()


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line per model, way and source of costs, and the means over all stages."""
    lines = [f"{'model':10s} {'way':12s} stages costs     mean error  largest", *_lines(rows)]
    for source in dict.fromkeys(r["costs"] for r in rows):
        errors = [abs(r["error_percent"]) for r in rows if r["costs"] == source]
        lines.append(
            f"all {len(errors)} stages, {source}: mean error {mean(errors):.1f} % "
            f"(limit {LIMITS[source]:.0f} %), largest {max(errors):.1f} %"
        )
    return lines


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    groups = dict.fromkeys((r["model"], r["way"], r["num_stages"], r["costs"]) for r in rows)
    for group in groups:
        errors = [
            r["error_percent"]
            for r in rows
            if (r["model"], r["way"], r["num_stages"], r["costs"]) == group
        ]
        model, way, num_stages, source = group
        yield (
            f"{model:10s} {way:12s} {num_stages:6d} {source:9s} "
            f"{mean(map(abs, errors)):8.1f} %  {max(errors, key=abs):+7.1f} %"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = measure(
        options.models,
        steps=options.steps,
        clock=options.clock,
        progress=partial(print, file=sys.stderr, flush=True),
    )
    print(json.dumps(rows, indent=1) if options.json else "\n".join(summary(rows)))


if __name__ == "__main__":
    main()
