"""Two plans side by side, and the sentence that says why one is faster."""

from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.planner.report.compare import compare_text, pace_of, reason
from tests.backends.cluster.layouts.test_given_layout import planned


def test_the_busiest_device_is_the_reason() -> None:
    first, second = planned("Et*5|tL", dp=8), planned("Et*4|t*2L", dp=8)
    text = compare_text(first, second, ("hand", "ours"))
    assert second.objective_s < first.objective_s
    for row in ("tokens/s", "MFU", "bubble", "fullest device GB", "busiest device ms a microbatch"):
        assert row in text
    assert "stages 0, 1 hold other blocks" in text
    busiest = pace_of(first)
    assert (busiest.device, len(busiest.blocks)) == (0, 6)
    assert "ours trains 1." in text
    assert "(device 0: 5 layers, model.embed_tokens)" in text


def test_equal_plans_and_other_batches() -> None:
    plan = planned("Et*3|t*3L", dp=8)
    assert reason(plan, plan, ("a", "b")).startswith("a and b take the same time; the busiest")
    more = planned("Et*3|t*3L", dp=8, microbatches=64)
    assert reason(plan, more, ("a", "b")).endswith("it has 64 microbatches a step, not 8")
    assert reason(plan, replace(plan, objective_s=0.0), ("a", "b")).startswith("a step of one")


def test_more_devices_are_named_first() -> None:
    first, second = planned("Et*3|t*3L", dp=8), planned("Et*3|t*3L", dp=4, microbatches=1)
    said = reason(first, second, ("a", "b"))
    assert said.endswith("it runs on 8 devices, not 16, and has 1 microbatch a step, not 8")


def test_fill_and_update_are_the_reason_where_the_paces_are_equal() -> None:
    plan = planned("Et*3|t*3L", dp=8)
    slower = replace(plan, objective_s=2 * plan.objective_s)
    said = reason(plan, slower, ("a", "b"))
    assert "work about equally long, and filling and emptying the pipeline" in said
    assert said.endswith("ms more")


def test_settings_and_models_that_differ_are_named() -> None:
    first, second = planned("Et*3|t*3L", dp=8), planned("Et*3|t*3L", dp=4, tp=2)
    assert "tp: not set against 2" in compare_text(first, second, ("a", "b"))
    own = replace(first, settings={"recompute": ["mlp", "layernorm"]})
    said = compare_text(first, own, ("a", "b"))
    assert "engine: megatron against torch\n" in said
    assert "recompute: not set against mlp, layernorm\n" in said
    other = replace(second, model=replace(second.model, model_class="Other"))
    assert "plans of different models" in compare_text(first, other, ("a", "b"))
