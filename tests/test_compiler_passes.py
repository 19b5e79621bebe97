"""Serialization and passes through plan() and the command line, on captured models."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.cli import app
from ipu_pipeline.errors import PartitionError, PlanError
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.options.tables import table_of
from ipu_pipeline.planner.search import Constraints
from tests.quick_calibration import make_quick
from tests.tiny_models import TINY

VOCAB = 8192


def built(name: str = "gpt2-lm", **changes):
    tiny = TINY[name]
    from ipu_pipeline.capture.from_config import from_config

    config = tiny.config(vocab_size=VOCAB, **changes)
    return from_config(config, tiny.task, batch_size=8, seq_length=32, device="meta")


def devices(memory_bytes: int = 10**9, count: int = 2) -> Machine:
    found = tuple(Device(f"d{i}", memory_bytes, {"float32": 1e11}, 1e10) for i in range(count))
    return Machine("pair", found, Link(bytes_per_s=1e9))


def test_memory_makes_the_solver_serialize_head_and_loss() -> None:
    model, batch = built()
    ample = ipp.plan(model, batch, machine=devices(), num_stages=2, microbatches=4)
    assert not any(stage.serialize for stage in ample.stages)
    assert ample.stage_of["lm_head"] == ample.stage_of["loss"]
    found = {block.name: table_of(ample.graph, block) for block in ample.blocks}
    tables = {name: table.use for name, table in found.items() if table and table.is_large}
    assert tables == {"transformer.wte": "lookup", "lm_head": "projection"}
    least = max(stage.memory_bytes for stage in ample.stages)
    tight = ipp.plan(model, batch, machine=devices(least - 10**7), num_stages=2, microbatches=4)
    assert {name for stage in tight.stages for name in stage.serialize} >= {"lm_head"}
    assert tight.objective_s >= ample.objective_s
    assert "serialized: " in tight.explain()


def test_constraints_force_slices_and_recomputation() -> None:
    model, batch = built()
    limits = Constraints(serialize={"lm_head": 3, "*.wte": 0}, recompute=("transformer.h.[01]",))
    plan = ipp.plan(model, batch, machine=devices(), num_stages=2, constraints=limits)
    assert {k: v for stage in plan.stages for k, v in stage.serialize.items()} == {"lm_head": 3}
    recomputed = [name for stage in plan.stages for name in stage.recompute]
    assert recomputed == ["transformer.h.0", "transformer.h.1"]


def test_predictions_after_passes_are_those_of_the_annotated_plan() -> None:
    model, batch = built()
    passes = "recompute{blocks=all},serialize_projection{factor=8}"
    plain = ipp.plan(model, batch, machine=devices(), num_stages=2)
    plan = ipp.plan(model, batch, machine=devices(), num_stages=2, passes=passes)
    assert [s.blocks for s in plan.stages] == [s.blocks for s in plain.stages]
    assert plan.stages[-1].serialize == {"lm_head": 8}
    assert sum(len(stage.recompute) for stage in plan.stages) >= 4
    assert not plan.edited
    assert plan.objective_s > plain.objective_s
    assert plan.lower_bound_s == plain.lower_bound_s
    assert plan.gap == pytest.approx(1 - plain.lower_bound_s / plan.objective_s)
    assert plan.stages[-1].memory_bytes < plain.stages[-1].memory_bytes
    names = [b.name for b in plan.blocks]
    limits = Constraints(
        stage_devices=(0, 1), recompute="always", serialize={"lm_head": 8, "transformer.wte": 1},
        pinned_stages={n: plain.stage_of[n] for n in names},
    )  # fmt: skip
    pinned = ipp.plan(model, batch, machine=devices(), num_stages=2, constraints=limits)
    assert pinned.stages == plan.stages
    assert pinned.objective_s == plan.objective_s


def test_passes_that_ask_for_what_is_there_change_nothing() -> None:
    model, batch = built()
    plain = ipp.plan(model, batch, machine=devices(), num_stages=2)
    again = ipp.plan(
        model, batch, machine=devices(), num_stages=2,
        passes="serialize_projection{factor=1},serialize_embedding{factor=1},recompute{blocks=none}",
    )  # fmt: skip
    assert again.objective_s == plain.objective_s
    assert again.stages == plain.stages


def test_a_small_table_is_fused_only_where_head_and_loss_share_a_stage() -> None:
    model, batch = TINY["gpt2-lm"].build()
    passes = "serialize_projection{factor=4,blocks=[lm_head]}"
    blocks = [b.name for b in ipp.plan(model, batch, num_stages=1).blocks]
    for home in (0, 1):
        pins = Constraints(pinned_stages={**dict.fromkeys(blocks[:-1], 0), blocks[-1]: 1})
        if home:
            pins = Constraints(pinned_stages={**dict.fromkeys(blocks[:-2], 0), blocks[-2]: 1})
        plain = ipp.plan(model, batch, machine=devices(), num_stages=2, constraints=pins)
        plan = ipp.plan(
            model, batch, machine=devices(), num_stages=2, constraints=pins, passes=passes
        )
        assert plan.stages[home].serialize == {"lm_head": 4}
        assert (plan.stages[home].memory_bytes < plain.stages[home].memory_bytes) == bool(home)


def test_a_pass_that_overflows_a_memory_is_refused_with_the_stage() -> None:
    model, batch = built()
    limits = Constraints(serialize={"lm_head": 16})
    sliced = ipp.plan(model, batch, machine=devices(), num_stages=2, constraints=limits)
    least = max(stage.memory_bytes for stage in sliced.stages)
    passes = "serialize_projection{factor=1},serialize_embedding{factor=1},recompute{blocks=none}"
    with pytest.raises(PartitionError, match="the plan after the passes serialize_embedding"):
        ipp.plan(model, batch, machine=devices(least), num_stages=2, passes=passes)


def test_a_pass_without_a_table_to_cut_is_refused() -> None:
    model, batch = TINY["bert-qa"].build()
    with pytest.raises(PlanError, match="serialize_embedding found no block with a large table"):
        ipp.plan(model, batch, num_stages=2, passes="serialize_embedding{factor=2}")
    with pytest.raises(ValueError, match="unknown pass 'inline'"):
        ipp.plan(model, batch, num_stages=2, passes="inline")


def test_split_tables_reach_the_plan() -> None:
    model, batch = built("t5")
    names = [b.name for b in ipp.plan(model, batch, machine=devices(), num_stages=1).blocks]
    decoder = names.index("decoder.embed_tokens")
    pins = {name: int(i >= decoder) for i, name in enumerate(names)}
    plan = ipp.plan(
        model, batch, machine=devices(), num_stages=2,
        constraints=Constraints(pinned_stages=pins),
        passes="serialize_embedding{factor=4,splits=[2,2],blocks=[decoder.embed_tokens]}",
    )  # fmt: skip
    assert [s.table_slices for s in plan.stages] == [
        {"decoder.embed_tokens": (0, 2)}, {"decoder.embed_tokens": (2, 4)},
    ]  # fmt: skip
    assert not plan.edited
    assert "table split: slices 0-1 of decoder.embed_tokens (stage 0)" in plan.explain()


def test_ipu_plans_are_annotated_and_priced_by_the_ipu_model() -> None:
    model, batch = built(tie_word_embeddings=False)
    config = IPUConfig(layers_per_ipu=(2, 2), gradient_accumulation_steps=8)
    plain = ipp.plan(model, batch, machine="pod4", config=config)
    passes = "serialize_projection{factor=16},serialize_embedding{factor=4}"
    plan = ipp.plan(model, batch, machine="pod4", config=config, passes=passes)
    found = {k: v for stage in plan.stages for k, v in stage.serialize.items()}
    assert found == {"transformer.wte": 4, "lm_head": 16}
    assert plan.cost_source == "ipu"
    assert plan.objective_s > plain.objective_s
    small, inputs = TINY["bert-qa"].build(device="meta")
    with pytest.raises(
        PartitionError, match="'qa_outputs' is to run in 3 slices, but its table has 2 rows"
    ):
        ipp.plan(
            small, inputs, machine="pod4", num_stages=2,
            passes="serialize_projection{factor=3,blocks=[qa_outputs]}",
        )  # fmt: skip


def test_profiled_plans_are_annotated_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPU_PIPELINE_CACHE", str(tmp_path / "cache"))
    make_quick(monkeypatch)
    model, batch = TINY["gpt2-lm"].build()
    plan = ipp.plan(
        model, batch, machine=devices(), num_stages=1, costs="profiled",
        passes="serialize_projection{factor=2,blocks=[lm_head]}",
    )  # fmt: skip
    assert plan.cost_source == "profiled"
    assert plan.stages[0].serialize == {"lm_head": 2}


def test_command_line(tmp_path: Path) -> None:
    config = TINY["gpt2-lm"].config(vocab_size=VOCAB)
    config.save_pretrained(tmp_path)
    runner = CliRunner()
    output = tmp_path / "plan.json"
    command = ["plan", str(tmp_path), "--task", "causal-lm", "--machine", "pod4"]
    command += ["--num-stages", "2", "--seq-length", "32", "-o", str(output), "--passes"]
    result = runner.invoke(app, [*command, "serialize_projection{factor=2}"])
    assert result.exit_code == 0, result.output
    assert "serialized: lm_head in 2 slices" in result.output
    plan = Plan.load(output)
    assert plan.stages[plan.stage_of["lm_head"]].serialize == {"lm_head": 2}
    wrong = runner.invoke(app, [*command, "serialize_projection{factor", "--force"])
    assert wrong.exit_code == 1
    assert "expected =, found 'the end'" in wrong.output


def test_a_serialized_plan_is_simulated_and_varied_as_it_runs() -> None:
    from ipu_pipeline.planner.report.sensitivity import sensitivity
    from ipu_pipeline.planner.schedules.simulate import simulate

    model, batch = built()
    plan = ipp.plan(
        model, batch, machine=devices(), num_stages=2, microbatches=4,
        constraints=Constraints(serialize={"lm_head": 4}),
    )  # fmt: skip
    timeline = simulate(plan)
    assert timeline.loads[1].stash_bytes < 4 * 8 * 32 * VOCAB
    assert sensitivity(plan)[0].step_s == timeline.step_s == plan.objective_s
