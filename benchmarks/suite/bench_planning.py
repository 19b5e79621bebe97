"""Seconds to capture and to plan, by size of the model."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest
from transformers import AutoConfig

import ipu_pipeline as ipp
from benchmarks.suite.replay import CLOCK, record, seconds_of
from benchmarks.suite.workloads import Planning, Suite, load
from ipu_pipeline.backends.local.measure import local_machine
from ipu_pipeline.capture import capture
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.ir.machine import Machine

pytestmark = pytest.mark.benchmark(group="planning", timer=CLOCK.now)
PARTS = ("capture", "capture and plan")
DEVICE_BYTES = 256 * 10**9


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one benchmark per model and part."""
    quick = metafunc.config.getoption("--suite-quick")
    cases = [
        pytest.param(name, part, id=f"{name}-{part}".replace(" ", "_"))
        for name, entry in load().planning.items()
        if entry.quick or not quick
        for part in PARTS
    ]
    metafunc.parametrize(("name", "part"), cases)


def bench_planning(benchmark: Any, suite: Suite, name: str, part: str) -> None:
    """A fresh capture, alone or with a plan of it."""
    entry = suite.planning[name]
    seconds = [planning_seconds(entry, part) for _ in range(entry.rounds)]
    record(benchmark, name, part, seconds, [seconds_of(seconds)])


def planning_seconds(entry: Planning, part: str) -> float:
    """Return the seconds of one capture, or of a whole plan with its capture."""
    model, example = from_config(
        AutoConfig.for_model(entry.model, **entry.config),
        entry.task,
        batch_size=entry.micro_batch,
        seq_length=entry.sequence,
    )
    machine = roomy_machine(entry.stages)
    begin = perf_counter()
    if part == PARTS[0]:
        capture(model, example)
    else:
        ipp.plan(
            model,
            example,
            machine=machine,
            num_stages=entry.stages,
            microbatches=entry.microbatches,
        )
    return perf_counter() - begin


def roomy_machine(num_devices: int) -> Machine:
    """Return devices as fast as those of this machine, on which any model of the suite fits."""
    measured = local_machine(num_devices)
    devices = tuple(replace(each, memory_bytes=DEVICE_BYTES) for each in measured.devices)
    return replace(measured, devices=devices)
