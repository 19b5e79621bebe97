"""Prices of serialized blocks, found again in what a plan predicts for its stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.ir.plan import Plan, PlannedStage
from ipu_pipeline.planner.report.as_run import as_run
from tests.ir.plan_example import example_plan

ENTERING = 2 * 4 * 8 * 4  # e and h0


def sliced(*, recompute: tuple[str, ...] = (), **stage: object) -> Plan:
    """Stage 1 (layer.1 and head: 1 ms, 2 ms and 4096 bytes each) with the head in slices."""
    plan = example_plan()
    fields = {"forward_s": 0.0025, "backward_s": 0.007, "stash_bytes": ENTERING + 4200, **stage}
    second = PlannedStage(1, ("layer.1", "head"), recompute, {"head": 4}, **fields)  # type: ignore[arg-type]
    made = replace(plan, stages=(plan.stages[0], second))
    return replace(made, decision_digest=made.digest())


def test_what_a_stage_differs_by_is_its_serialized_blocks() -> None:
    head = as_run(sliced()).blocks[3]
    assert head.forward_s == pytest.approx(0.0015)
    assert head.backward_s == pytest.approx(0.005)
    assert head.stash_bytes == 4096 - (2 * 4096 - 4200)
    assert as_run(sliced()).blocks[:3] == example_plan().blocks[:3]


def test_recomputed_blocks_are_accounted_for() -> None:
    plan = sliced(recompute=("layer.1",), stash_bytes=ENTERING + 4 * 8 * 4 + 100)
    head = as_run(plan).blocks[3]
    assert head.backward_s == pytest.approx(0.007 - 0.002 - 0.001)
    assert head.stash_bytes == 100


def test_several_serialized_blocks_share_in_proportion() -> None:
    plan = sliced()
    both = replace(plan.stages[1], serialize={"layer.1": 2, "head": 4})
    plan = replace(plan, stages=(plan.stages[0], both))
    found = as_run(replace(plan, decision_digest=plan.digest())).blocks[2:]
    assert [block.stash_bytes for block in found] == [2100, 2100]
    assert [block.forward_s for block in found] == pytest.approx([0.00125, 0.00125])
    empty = tuple(replace(b, stash_bytes=0, forward_s=0, backward_s=0) for b in plan.blocks)
    plan = replace(plan, blocks=empty)
    found = as_run(replace(plan, decision_digest=plan.digest())).blocks[2:]
    assert [block.forward_s for block in found] == pytest.approx([0.00125, 0.00125])


def test_without_a_predicted_stash_prices_stay_plain() -> None:
    assert as_run(sliced(stash_bytes=None)).blocks == example_plan().blocks
    edited = replace(sliced(), num_microbatches=9)
    assert as_run(edited).blocks == example_plan().blocks
    assert as_run(example_plan()) == example_plan()
