"""Predicted against measured seconds of stages on this machine, by source of costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import mean
from time import perf_counter
from typing import Any

import pytest

from benchmarks.stage_accuracy import SOURCES, measure
from benchmarks.suite.replay import CLOCK, metric, record
from benchmarks.suite.workloads import Stages, Suite, load

pytestmark = pytest.mark.benchmark(group="stages", timer=CLOCK.now)
ALL = "all stages"
# Seconds that measuring a model took, and the rows that were found.
Found = tuple[float, list[dict[str, Any]]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one benchmark per model and source of costs, and one per source over all models."""
    models = _models(load().stages, quick=metafunc.config.getoption("--suite-quick"))
    cases = [(model, source) for model in [*models, ALL] for source in SOURCES]
    ids = ["-".join(case).replace(" ", "_") for case in cases]
    metafunc.parametrize(("model", "source"), cases, ids=ids)


def _models(stages: Stages, *, quick: bool) -> list[str]:
    return list(stages.quick_models if quick else stages.models)


@pytest.fixture(scope="module")
def rows_of(suite: Suite) -> Callable[[str], Found]:
    """Measure every model once, when its first source of costs asks."""

    @cache
    def run(model: str) -> Found:
        begin = perf_counter()
        rows = measure([model], steps=suite.stages.steps)
        return perf_counter() - begin, rows

    return run


def bench_stage_times(
    benchmark: Any,
    suite: Suite,
    quick: bool,  # noqa: FBT001 - a fixture
    rows_of: Callable[[str], Found],
    model: str,
    source: str,
) -> None:
    """Plans of one, two and four stages; how they are run says benchmarks.stage_accuracy."""
    found = [
        rows_of(each) for each in (_models(suite.stages, quick=quick) if model == ALL else [model])
    ]
    errors = [
        abs(row["error_percent"]) for _, rows in found for row in rows if row["costs"] == source
    ]
    unit = f"% over {len(errors)} stages"
    metrics = [
        metric("mean_error_percent", unit, [mean(errors)], "predicted"),
        metric("worst_error_percent", unit, [max(errors)], "predicted"),
    ]
    record(benchmark, model, source, [sum(seconds for seconds, _ in found)], metrics)
