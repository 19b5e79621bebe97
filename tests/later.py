"""Long tables of tests: ``make test`` tries some of the rows, acceptance tests the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def every_second(rows: Iterable[Any]) -> list[Any]:
    """Return the rows, every second one marked as an acceptance test."""
    return one_in(2, rows)


def one_in(number: int, rows: Iterable[Any]) -> list[Any]:
    """Return the rows, all but one in so many marked as acceptance tests."""
    return [_later(row) if index % number else row for index, row in enumerate(rows)]


def now(chosen: Iterable[Any], rows: Iterable[Any]) -> list[Any]:
    """Return the rows, all but the chosen ones marked as acceptance tests."""
    kept = [*chosen]
    return [row if row in kept else _later(row) for row in rows]


def in_turn(rows: Iterable[Any], *values: Iterable[Any]) -> list[Any]:
    """Return every row with every one of the other values; the rows come once, the values in turn.

    The other combinations are acceptance tests.
    """
    others = list(itertools.product(*values))
    return [
        found if number == turn % len(others) else _later(found)
        for turn, row in enumerate(rows)
        for number, other in enumerate(others)
        for found in [(*(row if isinstance(row, tuple) else (row,)), *other)]
    ]


def _later(row: Any) -> Any:
    values = row if isinstance(row, tuple) else (row,)
    return pytest.param(*values, marks=pytest.mark.acceptance)


def pairs_first(*values: Iterable[Any]) -> list[Any]:
    """Return every combination; those that no pair of two values needs are acceptance tests.

    ``make test`` tries every pair of values of two parameters at least once.
    """
    rows = list(itertools.product(*values))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    now = set()
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        now.add(best)
        missing -= pairs[best]
    return [row if row in now else _later(row) for row in rows]
