"""Jobs of test_kept_state.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.stateful import PROGRAMS, planned, trained


def train(
    name: str,
    *,
    num_stages: int = 2,
    replicas: int = 1,
    schedule: str = "1f1b",
    **options: Any,
) -> Any:
    """Train a program of ``tests/stateful.py``; every rank returns the whole state."""
    model = PROGRAMS[name]()
    plan = planned(model, num_stages, schedule=schedule)
    if replicas > 1:
        plan = replace(plan, replicas=replicas, num_microbatches=plan.num_microbatches // replicas)
    return trained(model, plan, target="distributed", **options)
