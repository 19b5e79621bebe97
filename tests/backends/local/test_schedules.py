"""Every schedule that the backend lists is planned, simulated and run; one from outside, too."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.backends.local.backend import BACKEND
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.planner.price import price
from ipu_pipeline.planner.schedules import schedule_kind, schedule_names
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.planner.schedules.outside import one_by_one
from tests.tiny_models import TINY

MICROBATCHES = 8


@cache
def gradients(schedule: str, num_stages: int) -> tuple[ipp.Plan, float, dict[str, torch.Tensor]]:
    model, example = TINY["bert-qa"].build()
    batch = TINY["bert-qa"].batch(batch_size=2 * MICROBATCHES, seed=3)
    plan = ipp.plan(
        model, example, num_stages=num_stages, microbatches=MICROBATCHES, schedule=schedule
    )
    with ipp.compile(model, plan, self_check=False, loss_weights="samples") as executable:
        loss = executable.forward_backward(batch)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return plan, loss, found


def check(schedule: str) -> None:
    """Its own time through every door, its own memory, and the gradients of one stage."""
    kind = schedule_kind(schedule)
    plan, loss, found = gradients(schedule, 4)
    _, expected_loss, expected = gradients("1f1b", 1)
    timeline = simulate(plan)
    assert plan.schedule == schedule
    assert plan.objective_s == price(plan).step_s == timeline.step_s
    assert plan.lower_bound_s <= plan.objective_s
    devices = tuple(stage.device for stage in plan.stages)
    assert kind.any_devices or devices == kind.place(4, len(set(devices)))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert set(found) == set(expected)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("schedule", schedule_names())
def test_every_schedule(schedule: str) -> None:
    assert schedule in BACKEND.schedules
    check(schedule)


def test_a_schedule_from_outside(tmp_path) -> None:
    with one_by_one(tmp_path) as name:
        assert name in BACKEND.schedules
        check(name)
    with pytest.raises(ValueError, match="runs no schedule 'one_by_one'; use one of 1f1b"):
        gradients("one_by_one", 2)


def test_another_schedule_than_planned_places_the_stages_itself() -> None:
    model, example = TINY["bert-qa"].build()
    plan = ipp.plan(model, example, num_stages=4, microbatches=4)
    batch = TINY["bert-qa"].batch(batch_size=8, seed=3)
    with ipp.compile(model, plan, schedule="zbv") as executable:
        assert executable.forward_backward(batch) > 0
    with pytest.raises(LoweringError, match="zbv runs exactly 2 stages per device"):
        ipp.compile(model, ipp.plan(model, example, num_stages=3, microbatches=4), schedule="zbv")
