"""Hands seconds that were measured in a contest to pytest-benchmark.

pytest-benchmark times one function after another, so a change of the machine's load falls on one
contestant only. Contests therefore take their own times, interleaved, and each benchmark replays
those of one contestant: its timer is a clock that runs through the recorded seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.processes import ratio, spread


class ReplayError(RuntimeError):
    """The clock was read when it had nothing to tell."""


class ReplayClock:
    """A timer for pytest-benchmark: every second reading is later by a recorded duration."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._running = False

    def load(self, seconds: Sequence[float]) -> None:
        """Tell these durations, in order."""
        self._ends = list(reversed(seconds))
        self._running = False

    def now(self) -> float:
        """Return 0 at the beginning of a round, its duration at the end.

        Raises:
            ReplayError: There are no more rounds. A calibration would otherwise never end.
        """
        if not self._ends:
            raise ReplayError(
                "the clock has no more rounds to replay; use record(), which asks for as many "
                "rounds as were measured, without calibration"
            )
        self._running = not self._running
        return 0.0 if self._running else self._ends.pop()


CLOCK = ReplayClock()


def record(
    benchmark: Any,
    workload: str,
    contestant: str,
    seconds: Sequence[float],
    metrics: Sequence[dict[str, Any]],
) -> None:
    """File what was measured under the benchmark of a test.

    Args:
        benchmark: pytest-benchmark's fixture, of a test whose timer is ``CLOCK.now``.
        workload: What was done.
        contestant: By what.
        seconds: One entry per round.
        metrics: Numbers to report, from :func:`metric`.
    """
    CLOCK.load(seconds)
    benchmark.extra_info.update(workload=workload, contestant=contestant, metrics=list(metrics))
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1, warmup_rounds=0)


def metric(name: str, unit: str, values: Sequence[float], kind: str = "measured") -> dict[str, Any]:
    """Return a number to report: median and quartiles of its values by round."""
    return {"metric": name, "unit": unit, **spread(values), "rounds": len(values), "kind": kind}


def seconds_of(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the seconds themselves as a number to report."""
    return metric("seconds", "s", seconds)


def ratio_to(name: str, first: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """Return how many times as fast as the first contestant one is, round by round."""
    return {
        "metric": f"ratio_to_{name}",
        "unit": "x",
        **ratio(first, own),
        "rounds": len(own),
        "kind": "measured",
    }
