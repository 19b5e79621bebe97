"""Seconds of the solver on chains of growing length and depth."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.solver_scaling import AMPLE_BYTES, tight_bytes, timed
from benchmarks.suite.replay import CLOCK, record, seconds_of
from benchmarks.suite.workloads import Solving, load

pytestmark = pytest.mark.benchmark(group="solver", timer=CLOCK.now)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one benchmark per entry."""
    quick = metafunc.config.getoption("--suite-quick")
    entries = [entry for entry in load().solver if entry.quick or not quick]
    ids = [entry.name.replace(" ", "_") for entry in entries]
    metafunc.parametrize("entry", entries, ids=ids)


def bench_solver(benchmark: Any, entry: Solving) -> None:
    """One solution of a fixed depth."""
    memory = tight_bytes(sum(entry.lengths), entry.devices) if entry.tight else AMPLE_BYTES
    seconds = [timed(entry.lengths, entry.devices, memory)[0]]
    record(benchmark, entry.name, "solver", seconds, [seconds_of(seconds)])
