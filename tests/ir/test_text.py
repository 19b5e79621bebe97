from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.ir.plan import PlannedStage
from ipu_pipeline.ir.text import describe_blocks
from tests.ir.plan_example import example_plan


def test_explain(golden) -> None:
    golden("plan_explain.txt", example_plan().explain() + "\n")


def test_explain_says_what_is_unusual(golden) -> None:
    plan = example_plan()
    one = replace(plan.stages[0], blocks=("embed", "layer.0", "layer.1", "head"), recompute=())
    text = replace(plan, stages=(one,), replicas=2, binding="", tied_groups=()).explain()
    golden("plan_explain_edited.txt", text + "\n")


def test_block_table(golden) -> None:
    golden("block_table.txt", example_plan().block_table() + "\n")


def test_describe_blocks() -> None:
    assert describe_blocks(PlannedStage(0, ("bert.encoder.layer.3",))) == "layer.3"
    both = PlannedStage(0, ("a.b.layer.0", "a.b.layer.1"), recompute=("a.b.layer.0",))
    assert describe_blocks(both) == "layer.0 .. layer.1 (1 recomputed)"
