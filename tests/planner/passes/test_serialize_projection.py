from __future__ import annotations

import pytest

from ipu_pipeline.errors import PlanError
from ipu_pipeline.planner.passes.annotations import SerializeProjection
from ipu_pipeline.planner.passes.manager import pass_text
from tests.planner.passes.plans import before_and_after, table_plan


def test_plan_text(golden) -> None:
    one, plan = SerializeProjection(16), table_plan()
    golden("pass_serialize_projection.txt", before_and_after(plan, pass_text(one), one.run(plan)))


def test_large_heads_are_cut_but_no_layers() -> None:
    plan = SerializeProjection(16).run(table_plan())
    assert [stage.serialize for stage in plan.stages] == [{}, {}, {"head": 16}]
    assert SerializeProjection(1).run(plan) == table_plan()


def test_a_named_block_may_be_small_or_a_layer() -> None:
    plan = SerializeProjection(2, ("dec.layer.0", "enc.layer.1")).run(table_plan())
    assert [s.serialize for s in plan.stages] == [{"enc.layer.1": 2}, {"dec.layer.0": 2}, {}]


def test_other_slices_stay() -> None:
    plan = SerializeProjection(2, ("dec.layer.0",)).run(SerializeProjection(16).run(table_plan()))
    assert [s.serialize for s in plan.stages] == [{}, {"dec.layer.0": 2}, {"head": 16}]


def test_what_is_no_projection_is_refused() -> None:
    with pytest.raises(
        PlanError, match=r"enc\.embed without a table for a projection; blocks with"
    ):
        SerializeProjection(2, ("enc.embed",)).run(table_plan())


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="serialize_projection: factor must be at least 1, got -1"):
        SerializeProjection(-1)
    with pytest.raises(ValueError, match=r"serialize_projection: blocks is \(1,\); give a list"):
        SerializeProjection(2, (1,))  # type: ignore[arg-type]
