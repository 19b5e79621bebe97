"""Peak resident memory of training steps, every contestant in fresh processes."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.suite.contest import memory
from benchmarks.suite.replay import CLOCK, metric, record
from benchmarks.suite.workloads import Memory, Suite, load

pytestmark = pytest.mark.benchmark(group="memory", timer=CLOCK.now)
MB = 1e6


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one benchmark per entry and contestant."""
    quick = metafunc.config.getoption("--suite-quick")
    cases = [
        pytest.param(entry, contestant, id=f"{entry.workload}-{contestant}".replace(" ", "_"))
        for entry in load().memory
        if entry.quick or not quick
        for contestant in entry.contestants
    ]
    metafunc.parametrize(("entry", "contestant"), cases)


def bench_memory(benchmark: Any, suite: Suite, entry: Memory, contestant: str) -> None:
    """The whole resident memory of the largest process, and of all together."""
    workload = suite.workloads[entry.workload]
    found = memory(
        suite, workload, entry.precision, contestant,
        microbatches=entry.microbatches, steps=entry.steps,
    )  # fmt: skip
    if isinstance(found, str):
        pytest.skip(found)
    peaks = [each / MB for each in found["bytes"]]
    metrics = [
        metric("peak_mb", "MB in the largest process", [max(peaks)]),
        metric("total_mb", "MB in all processes", [sum(peaks)]),
    ]
    name = f"{entry.workload}, {entry.precision}"
    record(benchmark, name, contestant, found["seconds"], metrics)
