"""What a model keeps from batch to batch is what plain training keeps, in every schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest

import ipu_pipeline as ipp
from ipu_pipeline.errors import PlanError
from ipu_pipeline.planner.schedules import schedule_names
from ipu_pipeline.planner.search.infeasible import InfeasibleError
from tests.later import in_turn
from tests.stateful import PROGRAMS, assert_alike, planned, trained, trained_plainly


@pytest.mark.parametrize(
    ("name", "num_stages"),
    in_turn(PROGRAMS, [2, 1]),
)
def test_programs(name: str, num_stages: int) -> None:
    expected = trained_plainly(PROGRAMS[name]())
    model = PROGRAMS[name]()
    plan = planned(model, num_stages)
    assert_alike(trained(model, plan, recompute="none"), expected)
    assert_alike(trained(PROGRAMS[name](), plan, recompute="all"), expected)


@pytest.mark.parametrize(
    ("schedule", "name"), in_turn(schedule_names(), ["Scaled", "MomentumHead"])
)
def test_schedules(schedule: str, name: str) -> None:
    expected = trained_plainly(PROGRAMS[name]())
    model = PROGRAMS[name]()
    plan = planned(model, 2, schedule=schedule)
    assert_alike(trained(model, plan, recompute=["layers.1", "head"]), expected)


def test_blocks_that_share_a_buffer_are_not_parted() -> None:
    model = PROGRAMS["ReadsAnothersBuffer"]()
    plan = planned(model, 3)
    assert plan.stage_of["layers.0"] == plan.stage_of["layers.2"]
    assert [item.fqn for item in plan.graph.state] == ["layers.0.kept"]


def test_a_depth_that_parts_them_is_refused() -> None:
    with pytest.raises(
        InfeasibleError,
        match=r"block 'layers.0' uses 'kept' and block 'head' changes it; use fewer stages",
    ):
        planned(PROGRAMS["FirstReadsLastWrites"](), 3)


def test_a_plan_made_by_hand_that_parts_them_is_refused() -> None:
    model = PROGRAMS["FirstReadsLastWrites"]()
    plan = planned(model, 2)
    names = list(plan.graph.block_index)
    cut = (names[:2], names[2:])
    stages = tuple(
        replace(stage, blocks=tuple(blocks), recompute=())
        for stage, blocks in zip(plan.stages, cut, strict=True)
    )
    with pytest.raises(
        PlanError,
        match=r"block 'layers.0' uses 'kept' and block 'head' changes it, but blocks 'layers.0' "
        r"and 'head' are in stages 0 and 1, which run different microbatches",
    ):
        ipp.compile(model, replace(plan, stages=stages))
