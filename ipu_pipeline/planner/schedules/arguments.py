"""The check that every schedule shares."""

from __future__ import annotations


def check_counts(num_stages: int, num_microbatches: int) -> None:
    """Refuse counts below 1.

    Raises:
        ValueError: Either count is below 1.
    """
    for name, value in (("num_stages", num_stages), ("num_microbatches", num_microbatches)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
