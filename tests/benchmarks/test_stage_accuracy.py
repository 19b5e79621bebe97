from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import stage_accuracy
from benchmarks.stage_accuracy import LIMITS, Way, measure, summary
from ipu_pipeline.backends.local.measure.cache import CACHE_VARIABLE
from tests.quick_calibration import make_quick
from tests.tiny_models import TINY


def row(model: str, source: str, error: float) -> dict:
    return {"model": model, "way": "alone", "num_stages": 1, "costs": source,
            "error_percent": error}  # fmt: skip


def test_summary_means_absolute_errors_and_keeps_the_sign_of_the_largest() -> None:
    lines = summary([row("a", "analytic", -30), row("a", "analytic", 10), row("b", "analytic", 2),
                     row("a", "profiled", 4)])  # fmt: skip
    assert len(lines) == 1 + 3 + 2
    assert "20.0 %    -30.0 %" in lines[1]
    assert lines[4] == "all 3 stages, analytic: mean error 14.0 % (limit 25 %), largest 30.0 %"
    assert LIMITS["profiled"] == 10


@pytest.mark.acceptance
@pytest.mark.parametrize("clock", ["wall", "processor"])
def test_every_stage_of_every_way_is_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: str
) -> None:
    make_quick(monkeypatch)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(stage_accuracy, "PASSES", 2)
    monkeypatch.setattr(stage_accuracy, "MODELS", {"vit": TINY["vit"]})
    ways = (Way("alone", 1, 1), Way("concurrent", 2, 2), Way("in turns", 2, 1))
    rows = measure(["vit"], steps=1, ways=ways, clock=clock)
    assert [(r["way"], r["costs"], r["stage"]) for r in rows] == [
        ("alone", "analytic", 0), ("alone", "profiled", 0),
        ("concurrent", "analytic", 0), ("concurrent", "analytic", 1),
        ("concurrent", "profiled", 0), ("concurrent", "profiled", 1),
        ("in turns", "analytic", 0), ("in turns", "analytic", 1),
        ("in turns", "profiled", 0), ("in turns", "profiled", 1),
    ]  # fmt: skip
    assert all(r["predicted_s"] > 0 and r["measured_s"] > 0 for r in rows)
    assert os.environ[CACHE_VARIABLE] == str(tmp_path)
    assert not list(tmp_path.iterdir())  # what was measured is not kept
