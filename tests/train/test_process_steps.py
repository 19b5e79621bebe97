"""PipelineTrainer in several processes: what one process gives, on every one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backends.cluster import trainer_jobs
from tests.backends.cluster.processes import Processes
from tests.later import every_second


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Compare plain data; numbers to 1e-6 of their size."""
    if isinstance(expected, float) and isinstance(found, float | int):
        same = math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)
        assert same or (math.isnan(found) and math.isnan(expected)), (where, found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_equal(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for n, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_equal(mine, theirs, f"{where}[{n}]")
    else:
        assert found == expected, where


def compare(processes: Processes, job: str, folder: Path, **options: Any) -> None:
    """Run a job in several processes, and in this one as the reference."""
    (folder / "one").mkdir()
    found = processes.run(f"trainer_jobs.{job}", folder=str(folder / "many"), **options)
    expected = getattr(trainer_jobs, job)(folder=str(folder / "one"), **options)
    for mine in found:
        assert_equal(mine, expected)
