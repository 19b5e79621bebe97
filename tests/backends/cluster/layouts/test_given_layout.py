"""Somebody's layout: its price, ours for the same sizes, and multi-token prediction."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from ipu_pipeline.backends.cluster.layouts.given_layout import (
    GivenLayout,
    GivenModel,
    own_plan,
)
from ipu_pipeline.backends.cluster.layouts.given_text import layout_text
from ipu_pipeline.backends.cluster.layouts.megatron_layout import blocks_of, parse_layout
from ipu_pipeline.backends.cluster.prices.rank_plan import rank_step_of
from ipu_pipeline.errors import PartitionError, PlanError
from ipu_pipeline.ir.graph import Block
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import ModelIdentity, Plan
from ipu_pipeline.planner.price import price
from tests.backends.cluster.prices.test_rank_plan import captured

H100 = machine_by_name("h100-x16")


@cache
def model() -> GivenModel:
    return GivenModel(captured(), ModelIdentity("LlamaForCausalLM", {}))


def planned(text: str, **sizes: int) -> Plan:
    layout = parse_layout(text)
    given = GivenLayout(
        lambda graph: blocks_of(layout, graph), sizes, {"engine": "megatron"},
        extra_layers=layout.num_extra_layers,
    )  # fmt: skip
    return given.plan(model(), H100)


def in_stages(number: int, sizes: dict[str, int], schedule: str | None = None) -> GivenLayout:
    """Everything in the first one of some stages."""
    return GivenLayout(
        lambda graph: (tuple(graph.block_index), *[()] * (number - 1)), sizes, schedule=schedule
    )


def test_a_layout_is_priced_as_the_plan_that_it_is(tmp_path: Path) -> None:
    plan = planned("E|t*2|t*2|(t|)*2,L", pp=3, tp=2, dp=2, microbatches=6)
    assert [stage.device for stage in plan.stages] == [0, 1, 2, 0, 1, 2]
    assert (plan.schedule, plan.replicas, plan.lower_bound_s) == ("interleaved", 2, 0)
    assert plan.settings["zero_stage"] == 1
    file = tmp_path / "plan.json"
    plan.save(file)
    assert Plan.load(file, any_version=True) == plan
    assert price(plan).step_s == plan.objective_s


def test_an_empty_stage_has_a_price() -> None:
    plan = planned("E||t*3|t*3L", pp=2, microbatches=4)
    assert plan.stages[1].forward_s == 0
    assert plan.objective_s > 0
    assert "1: |t*3L" in layout_text(plan, None, "no search")


def test_ours_is_at_least_as_fast_and_says_why() -> None:
    given = planned("Et*5|tL", dp=8)
    ours = own_plan(given)
    assert ours.objective_s < given.objective_s
    assert 0 < ours.lower_bound_s <= ours.objective_s
    text = layout_text(given, ours)
    assert "ours for the same sizes: E" in text
    assert "tokens/s, MFU" in text
    assert "why: ours trains" in text
    assert "its busiest device works" in text


def test_a_better_layout_than_the_search_finds_is_kept() -> None:
    given = planned("Et*3|t*3L", dp=8)
    best = own_plan(given)
    cheap = replace(given, objective_s=best.objective_s / 2)
    assert own_plan(cheap).stages == given.stages


def test_a_layout_that_fills_its_memory_keeps_a_bound() -> None:
    given = planned("Et*2|t|t|t*2L", pp=2, dp=8)
    full = replace(H100.devices[0], memory_bytes=H100.devices[0].reserved_bytes + 1)
    small = replace(given, machine=replace(H100, devices=(full,) * 16))
    kept = own_plan(small)
    assert kept.stages == given.stages
    assert 0 < kept.lower_bound_s <= kept.objective_s
    with pytest.raises(PartitionError):
        own_plan(replace(small, misfits=("it does not fit",)))


def test_multi_token_prediction_is_a_layer_a_head_and_a_loss_more() -> None:
    plain, more = planned("Et*3|t*3L", dp=8), planned("Et*3|t*3mL", dp=8)
    assert more.stages[1].blocks[3:] == (
        "mtp.0", "lm_head", "loss", "mtp.0.lm_head", "mtp.0.loss"
    )  # fmt: skip
    work = {b.name: b for b in more.blocks}
    assert work["mtp.0"].forward_ops == work["model.layers.4"].forward_ops
    steps = [rank_step_of(plan) for plan in (plain, more)]
    first_s, second_s = (step.loads[1].forward_s for step in steps)
    assert first_s * 4 / 3 < second_s < first_s * 2
    assert steps[1].parameters[1].dense > steps[0].parameters[1].dense
    assert "m (multi-token prediction) is priced as a layer more" in layout_text(more, None)
    assert "mtp.0.model.layers.4.mlp.down_proj.weight" in more.model.parameters
    apart = planned("E|t*3|t*3m|L", pp=4, dp=4)
    assert apart.stages[2].blocks[-1] == "mtp.0"


def test_a_model_without_a_head_has_no_multi_token_prediction() -> None:
    graph = replace(captured(), blocks=(Block("a", "embedding"), Block("b", "layer")))
    bare = GivenModel(graph, ModelIdentity("Bare", {}))
    with pytest.raises(PlanError, match="no layers and head for multi-token prediction; write the"):
        bare.with_extra_layers(1)


@pytest.mark.parametrize(
    ("stages", "sizes", "schedule", "message"),
    [
        (5, {"pp": 2}, None, "the layout has 5 stages, which pp 2 does not divide; give a pp"),
        (2, {"tp": 3}, None, "tp 3 x cp 1 x pp 2 x dp 2 are 12 GPUs, h100-x16 has 16; change one"),
        (2, {"dp": 16}, None, "dp 16 are 32 GPUs, h100-x16 has 16"),
        (2, {"global_batch": 7}, None, "7 does not divide into dp 8 x micro batch 1; change one"),
        (2, {"global_batch": 16, "microbatches": 3}, None, "16 is 2 microbatches on dp 8 .* got 3"),
        (4, {"pp": 2}, "1f1b", "1f1b runs one stage per device: 4 stages do not fit pp 2; change"),
        (6, {"pp": 3, "dp": 1, "microbatches": 7}, None, "schedule interleaved"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(
    stages: int, sizes: dict[str, int], schedule: str | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        in_stages(stages, sizes, schedule).plan(model(), H100)


def test_microbatches_that_nobody_said_can_be_run() -> None:
    for pp, stages in ((3, 12), (2, 2), (8, 40)):
        machine = machine_by_name(f"h100-x{pp}")
        plan = in_stages(stages, {"pp": pp}).plan(model(), machine)
        assert plan.num_microbatches >= max(8, stages)
        assert plan.num_microbatches % pp == 0
    plan = in_stages(4, {"pp": 2}, "zbv").plan(model(), H100)
    assert [stage.device for stage in plan.stages] == [0, 1, 1, 0]
