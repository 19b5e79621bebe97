"""Variants are split again from what a plan stores; the plan's own setting must come out again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.capture import capture
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.plan_writer import make_plan as plan_of
from ipu_pipeline.planner.options.cost_models import AnalyticCostModel
from ipu_pipeline.planner.report.sensitivity import sensitivity, settings
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.search import Constraints, solve
from tests.planner.schedules.plans import make_plan
from tests.tiny_models import TINY


@pytest.fixture(scope="module")
def captured():
    model, batch = TINY["bert-qa"].build(device="meta")
    return capture(model, batch)


def solved(captured, **limits):
    machine = machine_by_name("pod4")
    costs = AnalyticCostModel().estimate(captured.graph, machine)
    found = solve(captured.graph, costs, machine, Constraints(**limits))
    return plan_of(captured, machine, costs, found)


def by_name(plan):
    return {variant.name: variant for variant in sensitivity(plan, simulate(plan))}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "popart"])
def test_a_solved_plan_comes_out_again(captured, schedule: str) -> None:
    plan = solved(captured, num_stages=3, num_microbatches=8, schedule=schedule)
    variants = by_name(plan)
    assert variants["as planned"].step_s == pytest.approx(plan.objective_s, rel=1e-9)
    fresh = solved(captured, num_stages=2, num_microbatches=8, schedule=schedule)
    assert variants["one device fewer"].step_s == pytest.approx(fresh.objective_s, rel=1e-9)
    more = solved(captured, num_stages=3, num_microbatches=16, schedule=schedule)
    found = variants["twice as many microbatches"]
    assert found.step_s == pytest.approx(more.objective_s, rel=1e-9)
    assert found.samples_per_s == pytest.approx(16 * plan.micro_batch_size / more.objective_s)


def test_what_was_scaled_is_said(captured) -> None:
    plan = solved(captured, num_stages=4, num_microbatches=8)
    variants = by_name(plan)
    assert variants["as planned"].derivation == "split again"
    assert variants["one device fewer"].derivation == "split again"
    assert "a device like the last one" in variants["one more device"].derivation
    half = variants["half the micro batch, same batch"]
    assert (half.micro_batch_size, half.num_microbatches) == (1, 16)
    assert half.derivation == "split again; times and activations x 0.5"
    local = replace(plan, machine=replace(plan.machine, shared_memory=True))
    assert "times x 0.75: the same cores" in by_name(local)["one device fewer"].derivation


def test_the_update_is_kept() -> None:
    plan = make_plan([0.001, 0.002], [0.002, 0.003], 6, outer_s=0.004)
    assert by_name(plan)["as planned"].step_s == pytest.approx(plan.objective_s)


def test_what_cannot_run_says_why() -> None:
    plan = make_plan([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 5, "popart")
    found = by_name(plan)["half as many microbatches"]
    assert (found.step_s, found.samples_per_s, found.peak_bytes) == (None, None, None)
    assert "PopART needs at least 5 microbatches" in found.problem


def test_only_settings_that_make_sense_are_asked() -> None:
    one = make_plan([1.0], [2.0], 1)
    assert [s.name for s in settings(one)] == ["as planned", "half the micro batch, same batch",
                                               "twice as many microbatches"]  # fmt: skip
    assert sensitivity(make_plan([1.0], [2.0], 2, "interleaved"), simulate(one)) == ()
