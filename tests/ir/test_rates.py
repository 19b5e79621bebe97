"""Samples, tokens and MFU of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.ir.rates import rates_of, tokens_per_sample
from ipu_pipeline.planner.report.text import simulation_text
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.backends.cluster.layouts.test_given_layout import planned
from tests.ir.plan_example import example_plan


def test_rates_of_a_plan_on_gpus() -> None:
    plan = planned("Et*3|t*3L", dp=4, tp=2, microbatches=8)
    rates = rates_of(plan)
    assert rates is not None
    assert rates.num_devices == 16
    assert rates.samples_per_s == pytest.approx(32 / plan.objective_s)
    assert rates.tokens_per_s == pytest.approx(128 * rates.samples_per_s)
    flops = sum(block.forward_flops + block.backward_flops for block in plan.blocks) * 32
    peak = plan.machine.devices[0].flops_per_s["bfloat16"]
    assert rates.mfu == pytest.approx(flops / plan.objective_s / (16 * peak))
    assert rates.text().endswith("of 16 GPUs' bfloat16 peak")
    assert rates.text() in plan.explain()
    assert "memory GB" in plan.explain()
    timeline = simulate(plan)
    assert "tokens/s" in simulation_text(plan, timeline)
    assert "peak GB" in simulation_text(plan, timeline)


def test_other_machines_have_no_mfu() -> None:
    plan = example_plan()
    assert rates_of(replace(plan, objective_s=0.0)) is None
    rates = rates_of(replace(plan, objective_s=1.0))
    assert rates is not None
    assert rates.mfu is None
    assert "MFU" not in rates.text()


def test_tokens_are_those_of_the_decoder() -> None:
    graph = planned("Et*3|t*3L", dp=8).graph
    tokens = graph.inputs[0]
    assert tokens_per_sample(graph) == 128
    decoder = replace(tokens, name="decoder_input_ids", shape=(1, 32))
    assert tokens_per_sample(replace(graph, inputs=(tokens, decoder))) == 32
    assert tokens_per_sample(replace(graph, inputs=())) is None
