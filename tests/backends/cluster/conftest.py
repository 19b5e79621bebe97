"""Processes for the tests of a file: gloo, one thread each, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backends.cluster.processes import Processes


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.close()
