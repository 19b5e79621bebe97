"""Steps of very many microbatches: figures without every event, equal to those with every event."""

from __future__ import annotations

import random
from math import isclose
from typing import Any

import pytest

from ipu_pipeline.ir.limits import LIMITS
from ipu_pipeline.planner.report.figures import left_out, windows
from ipu_pipeline.planner.report.sensitivity import sensitivity
from ipu_pipeline.planner.report.trace import trace
from ipu_pipeline.planner.schedules import PipelineShape, replay, schedule_kind, simulate
from ipu_pipeline.planner.schedules.timeline import Timeline
from tests.planner.schedules.plans import make_plan

KINDS = ("1f1b", "zbv", "interleaved", "interleaved_zero_bubble", "dualpipev", "popart")


def figures(timeline: Timeline) -> dict[str, Any]:
    return timeline.to_json() | {"activations": timeline.peak_activation_bytes}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return all(same(*pair) for pair in zip(one, other, strict=True))
    close = isinstance(one, float)
    return isclose(one, other, rel_tol=1e-9, abs_tol=1e-9) if close else bool(one == other)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schedule", KINDS)
def test_a_shortened_step_has_the_figures_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, schedule: str, seed: int
) -> None:
    draw, kind = random.Random(f"{schedule}{seed}"), schedule_kind(schedule)
    devices = draw.choice((2, 3))
    depth = devices * kind.stages_per_device[0]
    times = [[draw.choice((0.1, 0.5, 1.0, draw.random())) for _ in range(depth)] for _ in "fb"]
    plan = make_plan(
        *times, draw.choice((204, 240, 306)), schedule,
        devices=kind.place(depth, devices), copies=bool(seed % 2),
    )  # fmt: skip
    whole = simulate.simulate(plan)
    assert whole.steady is None
    monkeypatch.setattr(replay, "_MOST_ACTIONS", 60)
    monkeypatch.setattr(simulate, "_LISTED", 0)
    found = simulate.simulate(plan)
    assert found.steady is not None
    assert len(found.events) + found.steady.num_events == len(whole.events)
    assert same(figures(found), figures(whole))
    listed = {(e.device, e.kind, e.stage, e.microbatch, round(e.start_s, 6)) for e in whole.events}
    assert all(
        (e.device, e.kind, e.stage, e.microbatch, round(e.start_s, 6)) in listed
        for e in found.events
    )


@pytest.mark.parametrize("schedule", ["1f1b", "popart"])
def test_a_million_microbatches_are_simulated(schedule: str) -> None:
    plan = make_plan([1, 2], [2, 3], 10**6, schedule, copies=True)
    found = simulate.simulate(plan)
    assert found.step_s == pytest.approx(plan.objective_s, rel=1e-5)
    assert len(found.events) < 200_000 < 10**6 < found.num_events
    assert trace(plan, found)["otherData"]["microbatches_left_out"] > 900_000
    assert "so are" in left_out(found, windows(found))


def test_more_passes_than_can_be_listed_are_refused() -> None:
    kind = schedule_kind("gpipe")
    with pytest.raises(ValueError, match="1000000 microbatches x 2 stages are too many for sched"):
        kind.rows(PipelineShape.of(2, 10**6))


def test_a_variant_above_a_limit_is_no_variant() -> None:
    plan = make_plan([1, 2], [2, 3], LIMITS["num_microbatches"], "1f1b")
    twice = next(v for v in sensitivity(plan) if v.name.startswith("twice"))
    assert "num_microbatches may be 1000000000 at most" in twice.problem
