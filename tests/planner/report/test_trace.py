from __future__ import annotations

import json
from itertools import pairwise

import pytest

from ipu_pipeline.planner.report import write_trace
from ipu_pipeline.planner.report.trace import trace
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.planner.schedules.plans import make_plan


def test_the_trace_holds_every_event_in_microseconds(tmp_path) -> None:
    plan = make_plan([0.001, 0.002], [0.002, 0.003], 6, "popart", copies=True, outer_s=0.004)
    timeline = simulate(plan)
    write_trace(plan, tmp_path / "trace.json")
    raw = json.loads((tmp_path / "trace.json").read_text())
    assert raw == json.loads(json.dumps(trace(plan, timeline)))
    spans = [event for event in raw["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == len(timeline.events)
    assert max(span["ts"] + span["dur"] for span in spans) == pytest.approx(timeline.step_s * 1e6)
    first = next(span for span in spans if span["name"] == "1B3")
    assert first["dur"] == pytest.approx(3000)
    assert (first["tid"], first["cat"], first["args"]) == (
        1,
        "backward",
        {"stage": 1, "microbatch": 3},
    )
    assert {span["cat"] for span in spans} == {"forward", "backward", "copy", "sync", "update"}
    names = {e["tid"]: e["args"]["name"] for e in raw["traceEvents"] if e["name"] == "thread_name"}
    assert names == {0: "d0 · stage 0", 1: "d1 · stage 1"}


def test_spans_of_a_thread_do_not_overlap() -> None:
    plan = make_plan([1.0] * 3, [2.0] * 3, 4, devices=[0, 1, 0])
    spans = [e for e in trace(plan, simulate(plan))["traceEvents"] if e["ph"] == "X"]
    for device in (0, 1):
        own = [span for span in spans if span["tid"] == device]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(own))


def test_memory_is_a_counter() -> None:
    plan = make_plan([1.0, 1.0], [2.0, 2.0], 4)
    timeline = simulate(plan)
    events = trace(plan, timeline)["traceEvents"]
    highest = max(e["args"]["MB"] for e in events if e["name"] == "memory of d0 (MB)")
    assert highest == timeline.memory[0].peak_bytes / 1e6
