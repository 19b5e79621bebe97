"""Samples per second of training steps, all contestants of a workload interleaved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from benchmarks.suite.contest import Contest, contest
from benchmarks.suite.replay import CLOCK, metric, ratio_to, record, seconds_of
from benchmarks.suite.workloads import Suite, load

pytestmark = pytest.mark.benchmark(group="throughput", timer=CLOCK.now)
Contests = Callable[[str, str], Contest]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one benchmark per workload, precision and contestant."""
    quick = metafunc.config.getoption("--suite-quick")
    suite, cases = load(), []
    for name, workload in suite.workloads.items():
        if quick and not workload.quick:
            continue
        for precision in workload.precisions[: 1 if quick else None]:
            wanted = suite.wanted(workload.contestants, quick=quick)
            cases += [(name, precision, contestant) for contestant in wanted]
    ids = ["-".join(case).replace(" ", "_") for case in cases]
    metafunc.parametrize(("name", "precision", "contestant"), cases, ids=ids)


@pytest.fixture(scope="module")
def contests(suite: Suite, quick: bool) -> Contests:  # noqa: FBT001 - a fixture
    """Run every contest once, when its first contestant asks."""

    @cache
    def run(name: str, precision: str) -> Contest:
        workload = suite.workloads[name]
        rounds = suite.quick_rounds if quick else workload.rounds
        names = suite.wanted(workload.contestants, quick=quick)
        return contest(suite, replace(workload, contestants=names), precision, rounds)

    return run


def bench_step(
    benchmark: Any, suite: Suite, contests: Contests, name: str, precision: str, contestant: str
) -> None:
    """Training steps."""
    found = contests(name, precision)
    if contestant in found.unavailable:
        pytest.skip(found.unavailable[contestant])
    workload = suite.workloads[name]
    first = workload.contestants[0]
    seconds = found.seconds[contestant]
    samples = workload.micro_batch * workload.microbatches
    metrics = [
        seconds_of(seconds),
        metric("samples_per_s", "samples/s", [samples / each for each in seconds]),
    ]
    if contestant != first:
        metrics.append(ratio_to(first, found.seconds[first], seconds))
    record(benchmark, f"{name}, {precision}", contestant, seconds, metrics)
