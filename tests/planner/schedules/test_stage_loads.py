"""What the price of a plan says about its stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.ir.graph import TensorSpec
from ipu_pipeline.planner.price import price
from ipu_pipeline.planner.schedules.stage_loads import Copies
from tests.planner.schedules.plans import ELEMENTS, LINK, STASH, WEIGHTS, WORKSPACE, make_plan

ONE_WAY = LINK.transfer_s(4 * ELEMENTS)


def test_seconds_bytes_and_copies_of_the_stages() -> None:
    first, second = price(make_plan([1.0, 2.0], [3.0, 4.0], 5, copies=True)).stages
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
    graph = replace(plan.graph, tensors=(*plan.graph.tensors, skipping))
    middle = price(replace(plan, graph=graph)).stages[1].copies
    assert middle == Copies(2 * ONE_WAY, 2 * ONE_WAY, ONE_WAY, ONE_WAY)


def test_an_edited_plan_adds_up_its_blocks_again() -> None:
    plan = make_plan([1.0, 2.0, 4.0], [2.0, 3.0, 5.0], 4, copies=True)
    first = replace(plan.stages[0], blocks=("b0", "b1"), recompute=("b1",))
    edited = replace(plan, stages=(first, replace(plan.stages[2], device=1)))
    assert edited.edited
    load = price(edited).stages[0]
    assert (load.forward_s, load.backward_s) == (3.0, 5.0)  # b1 would keep as much as it saves


def test_once_per_step() -> None:
    found = price(make_plan([1.0, 2.0], [3.0, 4.0], 5, outer_s=0.25))
    assert sum(found.once_s.values()) == pytest.approx(0.25)
    assert not price(make_plan([1.0, 2.0], [3.0, 4.0], 5)).once_s


def test_inference_has_no_gradient_copies() -> None:
    plan = make_plan([1.0, 2.0], [0.0, 0.0], 4, copies=True)
    assert not plan.graph.training
    assert price(plan).stages[0].copies == Copies(0.0, ONE_WAY, 0.0, 0.0)
