"""What the benchmarks share: the workloads, and what is written about the machine."""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.suite.workloads import Suite, load


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what ``benchmarks.run`` passes."""
    parser.addoption("--suite-quick", action="store_true", help="small workloads, few rounds")


@pytest.fixture(scope="session")
def suite() -> Suite:
    """Everything that is measured."""
    return load()


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether small workloads and few rounds are wanted."""
    return bool(pytestconfig.getoption("--suite-quick"))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add versions and threads; leave out what would make the file long."""
    import torch
    import transformers

    machine_info["cpu"] = {
        name: machine_info["cpu"].get(name)
        for name in ("brand_raw", "arch", "count", "hz_actual_friendly")
    }
    machine_info["torch"] = torch.__version__
    machine_info["transformers"] = transformers.__version__
    machine_info["available_cores"] = len(os.sched_getaffinity(0))
    machine_info["threads"] = load().cores


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leave out what the options of every benchmark repeat."""
    for benchmark in output_json["benchmarks"]:
        benchmark.pop("options", None)
