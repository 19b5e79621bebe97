"""The simulation agrees with the solver's closed forms, and its timeline is consistent."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipu_pipeline.errors import VerifyError
from ipu_pipeline.ir.machine import Link
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.price import price
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.schedules.timeline import pace
from tests.planner.schedules.plans import LINK, WORKSPACE, make_plan


def one_f_one_b(stages, microbatches) -> Schedule:
    return schedule_kind("1f1b").rows(PipelineShape.of(stages, microbatches))


def grouped(stages, microbatches) -> Schedule:
    return schedule_kind("popart").rows(PipelineShape.of(stages, microbatches))


seconds = st.floats(0.001, 1.0)


@st.composite
def stage_times(draw, max_stages: int = 6):
    depth = draw(st.integers(1, max_stages))
    times = st.lists(seconds, min_size=depth, max_size=depth)
    return draw(times), draw(times)


def near(value: float):
    return pytest.approx(value, rel=1e-9)


# ---------------------------------------------------------------- closed forms


@given(stage_times(), st.integers(1, 20), st.booleans())
def test_gpipe_is_its_closed_form_for_any_times(times, count, copies) -> None:
    plan = make_plan(*times, count, "gpipe", copies=copies)
    timeline = simulate(plan)
    assert timeline.step_s == near(plan.objective_s)


@given(stage_times(), st.integers(0, 20), st.booleans())
def test_popart_is_its_closed_form_for_any_times(times, more, copies) -> None:
    plan = make_plan(*times, 2 * len(times[0]) - 1 + more, "popart", copies=copies)
    assert simulate(plan).step_s == near(plan.objective_s)


@given(seconds, seconds, st.floats(0.001, 1.0), st.integers(7, 12), st.booleans())
def test_popart_with_a_head_on_the_first_device(forward, backward, head, count, copies) -> None:
    times = [forward] * 3 + [head], [backward] * 3 + [2 * head]
    plan = make_plan(*times, count, "popart", devices=[0, 1, 2, 0], copies=copies)
    assert simulate(plan).step_s == near(plan.objective_s)


@given(st.integers(1, 8), seconds, seconds, st.integers(1, 20))
def test_1f1b_is_its_closed_form_for_balanced_stages(depth, forward, backward, count) -> None:
    plan = make_plan([forward] * depth, [backward] * depth, count)
    timeline = simulate(plan)
    assert timeline.step_s == near(plan.objective_s)
    assert timeline.bubble_fraction == pytest.approx((depth - 1) / (count + depth - 1), abs=1e-9)


@given(stage_times(), st.booleans())
def test_1f1b_settles_at_the_closed_form_s_pace(times, copies) -> None:
    """In the long run a microbatch costs the busiest device's load, as the closed form says.

    No step is shorter than the busiest device's work, and microbatches more never cost more than
    the pace each: together they leave only the pace. (How soon it settles depends on the times.)
    """
    depth = len(times[0])
    short, long = 40 * depth, 60 * depth
    plan = make_plan(*times, short, copies=copies)
    pace_s = pace(simulate(plan))
    longer = simulate(plan, one_f_one_b(depth, long))
    assert longer.step_s >= long * pace_s * (1 - 1e-9)
    assert longer.step_s - simulate(plan).step_s <= (long - short) * pace_s * (1 + 1e-9)


@given(stage_times(), st.integers(1, 20))
def test_1f1b_is_never_below_its_busiest_device(times, count) -> None:
    timeline = simulate(make_plan(*times, count))
    busiest = max(map(sum, zip(*times, strict=True)))
    assert timeline.step_s >= count * busiest * (1 - 1e-9)
    assert timeline.step_s <= (count * sum(map(sum, times))) * (1 + 1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "popart"])
@given(times=stage_times(), more=st.integers(0, 9))
def test_inference_is_its_closed_form(schedule, times, more) -> None:
    depth = len(times[0])
    plan = make_plan(times[0], [0.0] * depth, depth + more, schedule)
    timeline = simulate(plan)
    assert timeline.step_s == near(plan.objective_s)
    assert {event.kind for event in timeline.events} <= {"forward", "sync"}


@pytest.mark.parametrize("loops", [1, 2, 4])
def test_interleaving_divides_the_bubble(loops: int) -> None:
    """Narayanan et al., SC 2021, section 2.2.2: (P-1)/(v G) of the ideal time."""
    devices, count = 4, 16
    depth = devices * loops
    plan = make_plan(
        [1.0 / loops] * depth,
        [2.0 / loops] * depth,
        count,
        "interleaved",
        devices=[s % devices for s in range(depth)],
    )
    assert simulate(plan).step_s == near(3.0 * count + 3.0 * (devices - 1) / loops)


@given(stage_times(5), st.integers(0, 5), st.lists(st.booleans(), min_size=5, max_size=5))
def test_merging_consecutive_stages_is_in_the_closed_form(times, more, moves):
    depth = len(times[0])
    devices = [sum(moves[: stage + 1]) for stage in range(depth)]
    devices = [device - devices[0] for device in devices]
    plan = make_plan(*times, 2 * depth - 1 + more, "popart", devices=devices)
    assert simulate(plan).step_s == near(plan.objective_s)


def test_two_stages_on_one_device_are_one() -> None:
    plan = make_plan([1.0, 2.0, 3.0], [3.0, 2.0, 4.0], 5, "popart", devices=[0, 1, 1])
    merged = make_plan([1.0, 5.0], [3.0, 6.0], 5, "popart")
    assert simulate(plan).step_s == near(merged.objective_s) == near(59.0)
    assert plan.objective_s == near(59.0)


def test_the_update_ends_the_step() -> None:
    plan = make_plan([1.0, 1.0], [2.0, 2.0], 4, outer_s=0.5)
    timeline = simulate(plan)
    assert timeline.step_s == near(plan.objective_s)
    updates = [event for event in timeline.events if event.kind == "update"]
    assert [(e.device, e.end_s) for e in updates] == [(0, timeline.step_s), (1, timeline.step_s)]
    assert updates[0].duration_s == near(0.5) == near(timeline.update_s)


LOOPS = [("interleaved", 2), ("interleaved", 4), ("looped_bfs", 2), ("zbv", 2), ("dualpipev", 2),
         ("interleaved_zero_bubble", 2)]  # fmt: skip


@pytest.mark.parametrize(("schedule", "loops"), LOOPS)
def test_every_schedule_has_its_own_time_and_memory(schedule, loops) -> None:
    """Four devices, one process (backward passes whole) and a cluster (in halves)."""
    devices = schedule_kind(schedule).place(4 * loops, 4)
    local = make_plan([1.0] * 4 * loops, [2.0] * 4 * loops, 16, schedule, devices=devices)
    timeline = simulate(local)
    assert timeline.step_s == price(local).step_s
    assert {event.kind for event in timeline.events} == {"forward", "backward"}
    busy_s = 3.0 * loops * 16
    assert timeline.bubble_fraction == pytest.approx(1 - busy_s / timeline.step_s)
    kept = schedule_kind(schedule).in_flight(PipelineShape.of(4 * loops, 16, devices))
    for curve in timeline.memory:
        own = [s for s, device in enumerate(devices) if device == curve.device]
        assert max(kept[s] for s in own) <= curve.in_flight <= sum(kept[s] for s in own)
        assert curve.held_bytes[-1] == curve.weight_bytes
    cluster = replace(local.machine, shared_memory=False, link=Link(1e30, 0.0))
    split = replace(local, machine=cluster)
    assert price(split).step_s == simulate(split).step_s == near(local.objective_s)


# ---------------------------------------------------------------- copies


def test_a_copy_counts_on_the_sender_and_on_the_receiver() -> None:
    plan = make_plan([1.0, 1.0], [2.0, 2.0], 1, copies=True)
    one_way = LINK.transfer_s(1000)
    assert simulate(plan).step_s == near(6 + 4 * one_way)


# ---------------------------------------------------------------- the timeline


@settings(max_examples=60)
@given(
    stage_times(4),
    st.integers(7, 12),
    st.sampled_from(["1f1b", "gpipe", "popart"]),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_events_are_consistent(times, count, schedule, devices) -> None:
    depth = len(times[0])
    plan = make_plan(*times, count, schedule, devices=devices[:depth], copies=True)
    timeline = simulate(plan)
    by_device, passes = defaultdict(list), {}
    for event in timeline.events:
        by_device[event.device].append(event)
        if event.kind in ("forward", "backward"):
            passes[event.stage, event.kind, event.microbatch] = event
    assert set(by_device) == set(timeline.devices) == set(devices[:depth])
    for events in by_device.values():
        for first, second in pairwise(events):
            assert first.start_s <= first.end_s <= second.start_s + 1e-12
        assert events[-1].end_s <= timeline.step_s + 1e-12
    assert len(passes) == 2 * depth * count
    for (stage, kind, microbatch), event in passes.items():
        before = {"forward": (stage - 1, kind), "backward": (stage + 1, kind)}[kind]
        source = passes.get((*before, microbatch)) or passes[stage, "forward", microbatch]
        assert source is event or source.end_s <= event.start_s + 1e-12
    for device in timeline.devices:
        assert timeline.busy_share(device) + timeline.idle_share(device) <= 1 + 1e-9
        own = [s for s in range(depth) if devices[s] == device]
        busy = count * sum(times[0][s] + times[1][s] for s in own)
        assert timeline.busy_share(device) * timeline.step_s == near(busy)


@given(st.integers(1, 6), st.integers(0, 12), st.sampled_from(["1f1b", "gpipe", "popart"]))
def test_peak_memory_is_what_the_plan_predicts(depth, more, schedule) -> None:
    plan = make_plan([1.0] * depth, [2.0] * depth, 2 * depth - 1 + more, schedule)
    timeline = simulate(plan)
    assert [c.peak_bytes for c in timeline.memory] == [s.memory_bytes for s in plan.stages]
    assert [c.in_flight for c in timeline.memory] == [s.in_flight for s in plan.stages]
    for curve in timeline.memory:
        assert curve.held_bytes[-1] == curve.weight_bytes  # everything is given back
        assert list(curve.times_s) == sorted(curve.times_s)
        assert curve.workspace_bytes == WORKSPACE
    assert timeline.peak_memory_bytes == max(s.memory_bytes for s in plan.stages)


def test_overflow_of_one_device_and_of_a_shared_memory() -> None:
    plan = make_plan([1.0, 1.0], [1.0, 1.0], 40, "1f1b", copies=True)
    assert simulate(plan).overflow_bytes == {}
    small = replace(plan.machine.devices[0], memory_bytes=1000)
    crowded = replace(plan.machine, devices=(small, plan.machine.devices[1]))
    over = simulate(replace(plan, machine=crowded)).overflow_bytes
    assert over == {0: plan.stages[0].memory_bytes - 1000}
    pooled = replace(crowded, devices=(small, small), shared_memory=True)
    total = sum(stage.memory_bytes for stage in plan.stages)
    assert simulate(replace(plan, machine=pooled)).overflow_bytes == {0: total - 2000}


@given(st.integers(1, 4), st.integers(0, 6))
def test_activations_of_all_devices_peak_at_one_time(depth, more) -> None:
    timeline = simulate(make_plan([1.0] * depth, [2.0] * depth, 2 * depth - 1 + more, "1f1b"))
    moments = sorted({time for curve in timeline.memory for time in curve.times_s})

    def held(curve, moment):
        return [h for t, h in zip(curve.times_s, curve.held_bytes, strict=True) if t <= moment][-1]

    expected = max(sum(held(c, m) - c.weight_bytes for c in timeline.memory) for m in moments)
    assert timeline.peak_activation_bytes == expected
    peaks = [curve.peak_bytes - curve.weight_bytes for curve in timeline.memory]
    assert max(peaks) <= timeline.peak_activation_bytes <= sum(peaks)


def test_json_holds_the_figures() -> None:
    timeline = simulate(make_plan([1.0, 1.0], [2.0, 2.0], 4))
    raw = timeline.to_json()
    assert raw["step_s"] == timeline.step_s
    assert raw["num_events"] == len(timeline.events) == 16
    assert raw["devices"][1]["forward_s"] == near(4.0)
    assert raw["devices"][1]["peak_memory_bytes"] == timeline.memory[1].peak_bytes


def test_a_plan_without_times() -> None:
    timeline = simulate(make_plan([0.0, 0.0], [0.0, 0.0], 4))
    assert (timeline.step_s, timeline.busy_share(0), timeline.idle_share(1)) == (0.0, 0.0, 1.0)


# ---------------------------------------------------------------- speed, choice, refusals


@pytest.mark.parametrize("schedule", ["1f1b", "popart"])
def test_sixteen_devices_and_512_microbatches_are_quick(schedule) -> None:
    plan = make_plan([0.001] * 16, [0.002] * 16, 512, schedule, copies=True)
    used, counting = [], []
    gc.disable()  # it would walk everything that other tests have imported
    try:
        for _ in range(3):  # CPU time: other processes of this machine are none of our business
            counting.append(_seconds_of_counting())
            before = time.process_time()
            timeline = simulate(plan)
            assert timeline.peak_memory_bytes
            assert 0 < timeline.bubble_fraction < 1
            used.append(time.process_time() - before)
    finally:
        gc.enable()
    # A tenth of a second where counting to a million takes a fiftieth.
    assert min(used) < 5 * min(counting)


def _seconds_of_counting() -> float:
    """Return the CPU time of a million turns of a plain loop: how fast this machine is now."""
    before, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number
    return time.process_time() - before


def test_another_schedule_can_be_tried() -> None:
    plan = make_plan([1.0, 1.0], [2.0, 2.0], 8)
    assert simulate(plan, "gpipe").memory[0].in_flight == 8
    assert simulate(plan, grouped(2, 8)).schedule == "popart"


def test_refusals() -> None:
    plan = make_plan([1.0, 1.0], [2.0, 2.0], 2)
    with pytest.raises(ValueError, match="runs no schedule 'maxload'; use one of "):
        simulate(plan, "maxload")
    with pytest.raises(ValueError, match="the schedule is for 3 stages, the plan has 2"):
        simulate(plan, one_f_one_b(3, 4))
    with pytest.raises(ValueError, match="needs at least 3 microbatches per step, got 2"):
        simulate(plan, "popart")


def test_a_deadlock_names_the_devices() -> None:
    plan = make_plan([1.0, 1.0], [2.0, 2.0], 1)
    rows = ((Action(0, "B", 0), Action(0, "F", 0)), (Action(1, "F", 0), Action(1, "B", 0)))
    with pytest.raises(VerifyError, match="device 0 at 0B0; device 1 at 1F0"):
        simulate(plan, Schedule("mine", 2, 1, rows))
