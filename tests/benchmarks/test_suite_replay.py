"""Recorded seconds reach pytest-benchmark unchanged, and its calibration cannot hang on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suite.replay import (
    CLOCK,
    ReplayClock,
    ReplayError,
    metric,
    ratio_to,
    record,
    seconds_of,
)

BENCH = """
import pytest
from benchmarks.suite.replay import CLOCK, record, seconds_of
pytestmark = pytest.mark.benchmark(group="g", timer=CLOCK.now)

def bench_replayed(benchmark):
    seconds = [0.5, 0.125, 0.25]
    record(benchmark, "w", "c", seconds, [seconds_of(seconds)])

def bench_calibrated(benchmark):
    CLOCK.load([0.5, 0.125])
    with pytest.raises(RuntimeError, match="no more rounds"):
        benchmark(lambda: None)
"""


class Fixture:
    """Reads its timer as pytest-benchmark does."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}
        self.data: list[float] = []

    def pedantic(self, target, rounds, iterations, warmup_rounds) -> None:
        assert (iterations, warmup_rounds) == (1, 0)
        for _ in range(rounds):
            start = CLOCK.now()
            target()
            self.data.append(CLOCK.now() - start)


def test_every_round_takes_what_was_recorded() -> None:
    fixture, seconds = Fixture(), [0.1, 3.7, 0.2]
    record(fixture, "bert", "eager", seconds, [seconds_of(seconds)])
    assert fixture.data == seconds
    assert fixture.extra_info["contestant"] == "eager"
    (found,) = fixture.extra_info["metrics"]
    assert found == {
        "metric": "seconds", "unit": "s", "median": 0.2, "low": pytest.approx(0.15),
        "high": pytest.approx(1.95), "rounds": 3, "kind": "measured",
    }  # fmt: skip


def test_a_clock_without_rounds_refuses() -> None:
    clock = ReplayClock()
    clock.load([1.0])
    assert [clock.now(), clock.now()] == [0.0, 1.0]
    with pytest.raises(ReplayError, match="the clock has no more rounds to replay; use record"):
        clock.now()


def test_ratios_say_how_many_times_as_fast() -> None:
    found = ratio_to("eager", [2.0, 4.0], [1.0, 1.0])
    assert (found["metric"], found["low"], found["median"], found["high"]) == (
        "ratio_to_eager", 2.5, 3.0, 3.5,
    )  # fmt: skip
    assert metric("error_percent", "%", [4.0], "predicted")["kind"] == "predicted"


@pytest.mark.acceptance
def test_pytest_benchmark_writes_the_recorded_seconds(tmp_path: Path, root: Path) -> None:
    (tmp_path / "bench_x.py").write_text(BENCH, encoding="utf-8")
    command = [
        sys.executable, "-m", "pytest", str(tmp_path / "bench_x.py"), "-q",
        "-p", "no:cacheprovider", "-p", "no:xdist",
        "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*",
        "-c", str(root / "pyproject.toml"), f"--rootdir={root}", "--benchmark-json", "out.json",
    ]  # fmt: skip
    # Below xdist pytest-benchmark would be off.
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["benchmarks"]
    (replayed,) = [each for each in found if each["name"] == "bench_replayed"]
    assert replayed["stats"]["data"] == [0.5, 0.125, 0.25]
    assert replayed["extra_info"]["workload"] == "w"
