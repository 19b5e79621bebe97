"""The table of bubbles and memory with a spread vocabulary, as the decision's document shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.vocabulary_schedules import SCHEDULES, bubble, most_in_flight, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "decisions" / "0033-spread-vocabulary.md"


def test_the_document_shows_this_table() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_spread_head_leaves_less_bubble_and_one_microbatch_more(name: str) -> None:
    for factor in (1.0, 3.0):
        assert bubble(name, factor, spread=True) < 0.5 * bubble(name, factor, spread=False)
    more = most_in_flight(name, spread=True) - most_in_flight(name, spread=False)
    assert 0 <= more <= 1
