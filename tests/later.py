"""Long tables of tests: ``make test`` tries every second row, acceptance tests the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every_second(rows: Iterable[Any]) -> list[Any]:
    """Return the rows, every second one marked as an acceptance test."""
    return [
        pytest.param(row, marks=pytest.mark.acceptance) if index % 2 else row
        for index, row in enumerate(rows)
    ]
