"""The first row is the plan; the others are split and priced as plans of their own."""

from __future__ import annotations

import pytest

import ipu_pipeline as ipp
from ipu_pipeline.planner.report.sensitivity import sensitivity, variants
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.planner.schedules.plans import make_plan
from tests.tiny_models import TINY


def planned(machine: str = "a100-80g-x8", **options):
    model, batch = TINY["bert-qa"].build(device="meta")
    return ipp.plan(model, batch, machine=machine, replicas=1, **options)


def by_name(plan):
    return {variant.name: variant for variant in sensitivity(plan)}


@pytest.mark.parametrize(
    ("machine", "schedule"), [("a100-80g-x8", "1f1b"), ("a100-80g-x8", "gpipe"), ("pod4", "popart")]
)
def test_variants_are_what_planning_gives(machine: str, schedule: str) -> None:
    plan = planned(machine, num_stages=3, microbatches=8, schedule=schedule)
    found = by_name(plan)
    assert found["as planned"].step_s == plan.objective_s == simulate(plan).step_s
    fresh = planned(machine, num_stages=2, microbatches=8, schedule=schedule)
    assert found["one device fewer"].step_s == fresh.objective_s
    more = planned(machine, num_stages=3, microbatches=16, schedule=schedule)
    assert found["twice as many microbatches"].step_s == more.objective_s
    rate = 16 * plan.micro_batch_size / more.objective_s
    assert found["twice as many microbatches"].samples_per_s == rate


def test_a_machine_that_grew_is_said() -> None:
    variants = by_name(planned("pod4", num_stages=4, microbatches=8))
    assert variants["one device fewer"].derivation == "split again"
    assert "one more device like the last" in variants["one more device"].derivation


def test_the_update_is_kept() -> None:
    plan = make_plan([0.001, 0.002], [0.002, 0.003], 6, outer_s=0.004)
    assert by_name(plan)["as planned"].step_s == simulate(plan).step_s


def test_what_cannot_run_says_why() -> None:
    plan = make_plan([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 5, "popart")
    found = by_name(plan)["half as many microbatches"]
    assert (found.step_s, found.samples_per_s, found.peak_bytes) == (None, None, None)
    assert "needs at least 5 microbatches" in found.problem


def test_only_settings_that_make_sense_are_asked() -> None:
    one = make_plan([1.0], [2.0], 1)
    assert [one.name for one in variants(one, 1)] == ["twice as many microbatches"]
