from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.planner.report import text_report
from ipu_pipeline.planner.report.text import drawn, simulation_text
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.planner.schedules.plans import make_plan


def test_report_is_pinned(golden) -> None:
    plan = make_plan([0.001, 0.002], [0.002, 0.003], 6, "popart", copies=True, outer_s=0.004)
    text = text_report(replace(plan, versions={}))
    golden("text_report.txt", f"{text}\n")


def test_balanced_1f1b_is_drawn_as_in_the_paper() -> None:
    plan = make_plan([1.0] * 3, [2.0] * 3, 4)
    lines = drawn(plan, simulate(plan), width=18).splitlines()
    assert lines[1:] == [
        "d0 |FFF    BBFBB BB BB|",
        "d1 | FF  BBFBBFBB BB  |",
        "d2 |  FBBFBBFBBFBB    |",
    ]
    assert lines[0].startswith("the whole step, 18000.00 ms: F forward, B backward")


def test_a_plan_without_times_is_not_drawn() -> None:
    plan = make_plan([0.0], [0.0], 2)
    assert drawn(plan, simulate(plan)) == ""


def test_what_does_not_fit_is_said() -> None:
    plan = make_plan([1.0], [2.0], 2)
    small = replace(plan.machine.devices[0], memory_bytes=1000)
    for shared, where in ((False, "d0"), (True, "the shared memory")):
        machine = replace(plan.machine, devices=(small,), shared_memory=shared)
        over = replace(plan, machine=machine)
        assert f"DOES NOT FIT: {where} is 0.1 MB over" in simulation_text(over, simulate(over))
