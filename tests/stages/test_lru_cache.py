"""What was used least recently is forgotten first."""

from __future__ import annotations

import pytest

from ipu_pipeline.stages.variants import LRUCache


def test_the_least_recently_used_is_forgotten() -> None:
    dropped: list[str] = []
    recent = LRUCache[int, str](2, dropped.append)
    made = [recent.get(key, lambda key=key: f"value {key}") for key in (1, 2, 1, 3)]  # type: ignore[misc]
    assert made == ["value 1", "value 2", "value 1", "value 3"]
    assert dropped == ["value 2"]
    assert recent.get(1, lambda: "made again") == "value 1"
    assert recent.get(2, lambda: "made again") == "made again"
    assert dropped == ["value 2", "value 3"]
    assert len(recent) == 2


def test_values_are_dropped_by_their_keys() -> None:
    dropped: list[int] = []
    recent = LRUCache[int, int](5, dropped.append)
    for key in range(5):
        recent.get(key, lambda key=key: key)  # type: ignore[misc]
    recent.drop_where(lambda key: key % 2 == 1)
    assert (dropped, len(recent)) == ([1, 3], 3)


def test_what_cannot_be_made_is_not_kept() -> None:
    recent = LRUCache[int, int](1)
    with pytest.raises(ZeroDivisionError):
        recent.get(1, lambda: 1 // 0)
    assert len(recent) == 0
