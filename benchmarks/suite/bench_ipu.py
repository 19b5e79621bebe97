"""Predictions of the IPU model against published figures. Nothing here was run on an IPU."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import pytest

from benchmarks.ipu_accuracy import accuracy
from benchmarks.ipu_fit import SHARED
from benchmarks.suite.replay import CLOCK, metric, record

pytestmark = pytest.mark.benchmark(group="ipu", timer=CLOCK.now)
FILES = ("known_good_configs.json", "throughput.json", "does_not_fit.json")


def bench_published_throughput(
    benchmark: Any,
    quick: bool,  # noqa: FBT001 - a fixture
) -> None:
    """Every published speed that can be judged, and whether configurations fit."""
    if quick:
        pytest.skip("captures every published model: half a minute, and the same every time")
    missing = [name for name in FILES if not (SHARED / name).is_file()]
    if missing:
        pytest.skip(f"{', '.join(missing)} of the published figures not found in {SHARED}")
    begin = perf_counter()
    configs, throughput, does_not_fit = (SHARED / name for name in FILES)
    report = accuracy(configs, throughput, does_not_fit, leave_out=False)
    seconds = [perf_counter() - begin]
    runs = len(report["throughput"])
    metrics = [
        metric("mean_error_percent", f"% over {runs} runs",
               [100 * report["mean_abs_error"]], "predicted"),
        metric("worst_error_percent", f"% over {runs} runs",
               [100 * report["worst_abs_error"]], "predicted"),
        metric("wrong_fits_percent", "%",
               [100 * (1 - report["fits_share"])], "predicted"),
    ]  # fmt: skip
    record(benchmark, "published throughput", "IPU model", seconds, metrics)
