from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.verify import verify_plan
from ipu_pipeline.planner.passes.annotations import SerializeEmbedding
from ipu_pipeline.planner.passes.manager import pass_text
from tests.planner.passes.plans import before_and_after, table_plan


def test_plan_text(golden) -> None:
    one = SerializeEmbedding(4, splits=(1, 3), blocks=("dec.embed",))
    plan = table_plan()
    golden("pass_serialize_embedding.txt", before_and_after(plan, pass_text(one), one.run(plan)))


def test_every_large_lookup_is_cut() -> None:
    plan = SerializeEmbedding(4).run(table_plan())
    assert [stage.serialize for stage in plan.stages] == [{"enc.embed": 4}, {"dec.embed": 4}, {}]
    assert not any(stage.table_slices for stage in plan.stages)


def test_named_lookups_only_and_one_makes_them_whole() -> None:
    plan = SerializeEmbedding(4, blocks=("dec.embed",)).run(table_plan())
    assert [stage.serialize for stage in plan.stages] == [{}, {"dec.embed": 4}, {}]
    assert SerializeEmbedding(1).run(plan) == table_plan()


def test_splits_put_slices_into_the_stages_before() -> None:
    plan = SerializeEmbedding(4, (1, 3), ("dec.embed",)).run(table_plan())
    held = [stage.table_slices for stage in plan.stages]
    assert held == [{"dec.embed": (0, 1)}, {"dec.embed": (1, 4)}, {}]
    verify_plan(plan)
    assert plan.edited
    gone = SerializeEmbedding(2, blocks=("dec.embed",)).run(plan)
    assert not any(stage.table_slices for stage in gone.stages)
    single = SerializeEmbedding(4, (4,), ("dec.embed",)).run(plan)
    assert not any(stage.table_slices for stage in single.stages)


def test_splits_need_stages_before_the_block() -> None:
    one = SerializeEmbedding(4, (2, 2), ("enc.embed",))
    with pytest.raises(PlanError, match=r"'enc.embed' runs in stage 0, 2 splits need 1 stages bef"):
        one.run(table_plan())


def test_what_is_no_lookup_is_refused() -> None:
    with pytest.raises(PlanError, match="head, loss without a table for a lookup; blocks with one"):
        SerializeEmbedding(2, blocks=("head", "loss")).run(table_plan())
    with pytest.raises(PlanError, match="serialize_embedding names nope, which the plan does not"):
        SerializeEmbedding(2, blocks=("nope",)).run(table_plan())


def test_no_large_lookup_is_no_silent_success() -> None:
    plan = table_plan()
    blocks = tuple(replace(block, forward_ops=()) for block in plan.blocks)
    bare = replace(plan, graph=replace(plan.graph, blocks=blocks))
    with pytest.raises(PlanError, match="no block with a large table for a lookup; name the ones"):
        SerializeEmbedding(2).run(bare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, "factor must be at least 1, got 0"),
        ({"factor": "x"}, "factor must be a whole number, got 'x'"),
        ({"factor": 4, "splits": (2, 1)}, r"splits \[2, 1\] are 3 slices together, factor is 4"),
        ({"factor": 4, "splits": (4, 0)}, r"splits is \(4, 0\); give the slices of each stage"),
        ({"factor": 4, "splits": 4}, "splits is 4; give the slices of each stage"),
        ({"factor": 4, "blocks": "a"}, "blocks is 'a'; give a list of names"),
    ],
)
def test_wrong_options_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SerializeEmbedding(**options)
