"""One price of a plan on GPUs: of the search, of a saved plan, and of every command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig
from typer.testing import CliRunner

import ipu_pipeline as ipp
from ipu_pipeline.backends.cluster.backend import BACKEND
from ipu_pipeline.backends.cluster.layout import make_layout
from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings, sizes_of
from ipu_pipeline.backends.cluster.prices.rank_plan import rank_step_of
from ipu_pipeline.capture import capture
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.cli import app
from ipu_pipeline.errors import LoweringError, PlanError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import ModelIdentity, Plan
from ipu_pipeline.ir.text import milliseconds
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.price import make_plan, price, priced, step_s
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.search import Constraints, solve

H100 = machine_by_name("h100-x16")


@cache
def captured(model_type: str = "llama", layers: int = 6) -> BlockGraph:
    sizes = {"num_local_experts": 4} if model_type == "mixtral" else {}
    config = AutoConfig.for_model(
        model_type, hidden_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=512, vocab_size=4096, **sizes,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tokens = torch.zeros(1, 128, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens}
    return capture(model.train(), batch, self_check=False).graph


def planned(
    graph: BlockGraph,
    machine: Machine = H100,
    *,
    depth: int = 2,
    replicas: int = 2,
    schedule: str = "1f1b",
    layers: str = "auto",
    **settings: object,
) -> Plan:
    work = Workload(graph, machine, schedule, 8, replicas, {"engine": "megatron", **settings})
    limits = Constraints(
        num_stages=depth, num_microbatches=8, replicas=replicas, schedule=schedule,
        recompute=layers,  # type: ignore[arg-type]
    )  # fmt: skip
    found = solve(graph, BACKEND.costs(work), machine, limits, step=partial(step_s, work))
    return make_plan(ModelIdentity(graph.model_class, {}), work, found)


SETTINGS = [
    ("llama", "1f1b", 4, {}),
    ("llama", "1f1b", 2, {"tp": 2, "zero_stage": 1, "recompute": ["core_attn"]}),
    ("llama", "interleaved", 4, {"tp": 2, "cp": 2, "zero_stage": 3}),
    ("llama", "zbv", 4, {"engine": "torch"}),
    ("llama", "gpipe", 2, {"precision": "float8", "optimizer": "sgd", "gradient_bytes": 2}),
    ("mixtral", "1f1b", 2, {"ep": 2, "zero_stage": 2, "fused_loss": True}),
]


@pytest.mark.parametrize(("model", "schedule", "depth", "settings"), SETTINGS)
def test_every_door_says_the_same(
    model: str, schedule: str, depth: int, settings: dict[str, object], tmp_path: Path
) -> None:
    plan = planned(captured(model), depth=depth, schedule=schedule, **settings)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    step, found, timeline = rank_step_of(loaded), price(loaded), simulate(loaded)
    doors = {step.step_s(), found.step_s, priced(loaded).objective_s, timeline.step_s}
    assert doors == {plan.objective_s}
    assert 0 < plan.lower_bound_s <= plan.objective_s
    assert f"predicted step {milliseconds(plan.objective_s)} ms" in loaded.explain()
    assert not found.misfits
    for rank, needed in enumerate(step.rank_bytes):
        own = [found.stages[number] for number in step.of_ranks[rank]]
        held = sum(load.weight_bytes for load in own) + step.kept_bytes()[rank]
        held += max(load.workspace_bytes for load in own)
        assert held == pytest.approx(needed.total, rel=1e-6)


def test_sharing_a_stage_makes_it_smaller() -> None:
    graph = captured()
    alone = planned(graph)
    halves = planned(graph, tp=2)
    assert halves.stages[0].stash_bytes < alone.stages[0].stash_bytes
    assert halves.stages[0].weight_bytes < alone.stages[0].weight_bytes
    sharded = planned(graph, zero_stage=1)
    assert sharded.stages[0].weight_bytes == pytest.approx(alone.stages[0].weight_bytes * 12 / 18)
    assert sharded.stages[0].stash_bytes == alone.stages[0].stash_bytes


def test_recomputed_layers_are_slower_and_keep_less() -> None:
    graph = captured()
    plain, again = (planned(graph, layers=how) for how in ("never", "always"))
    assert again.objective_s > plain.objective_s
    assert again.stages[0].stash_bytes < plain.stages[0].stash_bytes
    assert len(again.stages[0].recompute) == sum("layers" in n for n in again.stages[0].blocks)


def test_memory_decides_what_is_recomputed() -> None:
    graph, roomy = captured(), planned(captured())
    need = max(stage.memory_bytes for stage in roomy.stages)
    devices = tuple(replace(d, memory_bytes=need - 1, reserved_bytes=0) for d in H100.devices)
    tight = planned(graph, replace(H100, devices=devices))
    assert any(stage.recompute for stage in tight.stages)
    assert not tight.misfits
    assert max(stage.memory_bytes for stage in tight.stages) < need
    reserved = tuple(replace(d, memory_bytes=need + 9, reserved_bytes=10) for d in H100.devices)
    assert planned(graph, replace(H100, devices=reserved)).stages == tight.stages
    edited = replace(roomy, machine=replace(H100, devices=devices), decision_digest="")
    assert "a GPU of rank" in priced(edited).misfits[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pp": 2}, "unknown field 'pp'"),
        ({"tp": 0}, "tp must be at least 1"),
        ({"ep": 3}, "ep 3 does not divide the 4 ranks of a stage"),
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3"),
        ({"recompute": ["full"]}, "recompute 'full'; use core_attn, .* recompute for whole layers"),
        ({"precision": "float32"}, "captured in bfloat16; make the plan again with --precision"),
        ({"precision": "int8"}, "precision"),
        ({"gradient_bytes": 3}, "gradient_bytes must be 2 or 4"),
        ({"tp": 8}, "2 replicas x 2 ranks of a pipeline x tp 8 x cp 1 need 32 devices, h100-x16"),
    ],
)
def test_wrong_settings_are_refused_on_reading(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    planned(captured(), tp=2).save(path)
    raw = json.loads(path.read_text())
    raw["settings"] |= settings
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_settings_without_a_meaning_are_refused() -> None:
    machine = machine_by_name("a100-80g-x4")
    devices = tuple(replace(device, kernels=None) for device in machine.devices)
    work = Workload(captured(), replace(machine, devices=devices), "1f1b", 8, 1, {"tp": 2})
    with pytest.raises(PlanError, match=r"tp 2: parallel sizes .* leave them out"):
        BACKEND.costs(work)
    sliced = Workload(captured(), H100, "1f1b", 8, 1, {"engine": "megatron"}, {}, {"lm_head": 2})
    with pytest.raises(PlanError, match=r"serializes 'lm_head'; take it out of serialize"):
        BACKEND.costs(sliced)


def test_sizes_come_from_the_plan() -> None:
    plan = planned(captured(), depth=4, schedule="interleaved", tp=2, cp=2, ep=2)
    sizes = sizes_of(plan)
    assert (sizes.dp, sizes.pp, sizes.vpp, sizes.tp, sizes.cp, sizes.ep) == (2, 2, 2, 2, 2, 2)
    assert sizes.num_devices == 16
    assert GpuSettings.read(plan.settings).engine == "megatron"


def test_our_processes_refuse_what_they_cannot_run() -> None:
    plan = planned(captured(), tp=2, zero_stage=1)
    with pytest.raises(LoweringError, match=r"has zero_stage 1, .* export.*--tp only"):
        make_layout(plan, plan.schedule, 0, 4)
    with pytest.raises(LoweringError, match="core_attn"):
        make_layout(planned(captured(), recompute=["core_attn"]), "1f1b", 0, 4)


SMALL = BertConfig(
    num_hidden_layers=3, hidden_size=128, num_attention_heads=2, intermediate_size=256,
    architectures=["BertForQuestionAnswering"],
)  # fmt: skip


def test_replicas_are_searched_for_the_same_batch() -> None:
    model, batch = from_config(SMALL, seq_length=64)
    found = ipp.plan(model, batch, machine="h100-x4", microbatches=8)
    given = [
        ipp.plan(model, batch, machine="h100-x4", microbatches=8 // n, replicas=n)
        for n in (1, 2, 4)
    ]
    assert found.objective_s == min(plan.objective_s for plan in given)
    assert found.lower_bound_s <= min(plan.lower_bound_s for plan in given) * (1 + 1e-9)
    assert found.total_batch_size == 8
    assert f"no split with {found.replicas} replica" in found.explain()


def test_sixteen_bits_unless_the_config_or_the_user_says_otherwise() -> None:
    model, batch = from_config(SMALL, seq_length=64)

    def dtypes(**options: object) -> tuple[set[str], set[str]]:
        made = ipp.plan(model, batch, machine="h100-x4", replicas=1, num_stages=1, **options)  # type: ignore[arg-type]
        master = {text.split()[-1] for text in made.model.parameters.values()}
        return {spec.dtype for spec in made.graph.parameters}, master

    assert dtypes() == ({"bfloat16"}, {"float32"})
    assert next(model.parameters()).dtype == torch.float32
    assert dtypes(settings={"precision": "float32"}) == ({"float32"}, {"float32"})
    assert dtypes(settings={"precision": "float16"}) == ({"float16"}, {"float32"})
    assert dtypes(settings={"precision": "float8", "engine": "megatron"})[0] == {"bfloat16"}
    model.config.dtype = torch.float32
    assert dtypes() == ({"float32"}, {"float32"})
    half, batch = from_config(replace_dtype("float16"), seq_length=64)
    assert {s.dtype for s in ipp.plan(half, batch, machine="h100-x2").graph.parameters} == {
        "float16"
    }


def replace_dtype(name: str) -> BertConfig:
    return BertConfig(**{**SMALL.to_diff_dict(), "dtype": name})


def test_options_of_plan(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--seq-length", "64", "--num-stages", "1"]
    made = tmp_path / "plan.json"
    gpus = ["--machine", "h100-x4", "--replicas", "2", "--tp", "2", "--precision", "float16"]
    result = CliRunner().invoke(app, [*command, *gpus, "--optimizer", "sgd", "-o", str(made)])
    assert result.exit_code == 0, result.output
    plan = Plan.load(made)
    assert plan.settings == {
        "tp": 2, "precision": "float16", "optimizer": "sgd"
    }  # fmt: skip
    assert plan.replicas == 2
    result = CliRunner().invoke(app, [*command, "--machine", "pod4", "--tp", "2"])
    assert result.exit_code == 1
    assert (
        "--tp is for GPUs with known kernels, such as h100-x64, and pod4 has none" in result.output
    )
