"""What is read from a plan and what is derived from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.ir.graph import TensorSpec
from ipu_pipeline.planner.schedules.load import (
    Copies,
    boundary_copies,
    closed_form_s,
    is_training,
    once_per_step_s,
    stage_loads,
)
from tests.planner.schedules.plans import ELEMENTS, LINK, STASH, WEIGHTS, WORKSPACE, make_plan

ONE_WAY = LINK.transfer_s(4 * ELEMENTS)


def redigested(plan):
    return replace(plan, decision_digest=plan.digest())


def test_predictions_are_used_and_bytes_divided() -> None:
    plan = make_plan([1.0, 2.0], [3.0, 4.0], 5, copies=True)
    first, second = stage_loads(plan)
    assert (first.forward_s, first.backward_s, second.device) == (1.0, 3.0, 1)
    assert first.copies == Copies(0.0, ONE_WAY, ONE_WAY, 0.0)
    assert second.copies == Copies(ONE_WAY, 0.0, 0.0, ONE_WAY)
    assert (first.weight_bytes, first.stash_bytes, first.workspace_bytes) == (
        WEIGHTS, STASH, WORKSPACE,
    )  # fmt: skip
    assert second.stash_bytes == STASH + 4 * ELEMENTS


def test_a_tensor_that_skips_a_stage_is_relayed() -> None:
    plan = make_plan([1.0] * 3, [1.0] * 3, 5, copies=True)
    skipping = TensorSpec("skip", (ELEMENTS,), "float32", False, "b0", ("b2",))
    plan = redigested(replace(plan, tensors=(*plan.tensors, skipping)))
    middle = boundary_copies(plan)[1]
    assert middle == Copies(2 * ONE_WAY, 2 * ONE_WAY, ONE_WAY, ONE_WAY)


def test_other_transfer_totals_are_shared_out_in_proportion() -> None:
    plan = make_plan([1.0, 1.0], [1.0, 1.0], 5, copies=True)
    stage = replace(plan.stages[0], transfer_s=8 * ONE_WAY)
    plan = redigested(replace(plan, stages=(stage, plan.stages[1])))
    copies = stage_loads(plan)[0].copies
    assert copies.activation_out_s == copies.gradient_in_s == pytest.approx(4 * ONE_WAY)
    silent = redigested(replace(plan, tensors=()))
    assert stage_loads(silent)[0].copies == Copies(0.0, 4 * ONE_WAY, 4 * ONE_WAY, 0.0)


def test_more_stash_than_memory_keeps_the_predicted_peak() -> None:
    plan = make_plan([1.0], [1.0], 3)
    stage = replace(plan.stages[0], memory_bytes=STASH // 2)
    load = stage_loads(redigested(replace(plan, stages=(stage,))))[0]
    held = load.weight_bytes + stage.in_flight * load.stash_bytes + load.workspace_bytes
    assert held == stage.memory_bytes


def test_an_edited_plan_adds_up_its_blocks_again() -> None:
    plan = make_plan([1.0, 2.0, 4.0], [2.0, 3.0, 5.0], 4, copies=True)
    first = replace(plan.stages[0], blocks=("b0", "b1"), recompute=("b1",))
    edited = replace(plan, stages=(first, replace(plan.stages[2], device=1)))
    load = stage_loads(edited)[0]
    assert edited.edited
    assert (load.forward_s, load.backward_s) == (3.0, 7.0)
    assert load.stash_bytes == STASH + 4 * ELEMENTS  # b0 keeps its own, b1 what enters it
    assert load.workspace_bytes == STASH
    assert once_per_step_s(edited, closed_form_s(edited, stage_loads(edited))) == 0.0


def test_what_the_objective_adds_is_once_per_step() -> None:
    plan = make_plan([1.0, 2.0], [3.0, 4.0], 5, outer_s=0.25)
    assert once_per_step_s(plan, closed_form_s(plan, stage_loads(plan))) == pytest.approx(0.25)


def test_no_closed_form() -> None:
    unknown = make_plan([1.0], [1.0], 2, "interleaved")
    assert closed_form_s(unknown, stage_loads(unknown)) is None
    few = replace(make_plan([1.0, 1.0], [1.0, 1.0], 3, "popart"), num_microbatches=2)
    assert closed_form_s(few, stage_loads(few)) is None


def test_inference_has_no_gradient_copies() -> None:
    plan = make_plan([1.0, 2.0], [0.0, 0.0], 4, copies=True)
    assert not is_training(plan)
    assert stage_loads(plan)[0].copies == Copies(0.0, ONE_WAY, 0.0, 0.0)
