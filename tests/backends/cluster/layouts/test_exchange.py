"""Plans as settings of other frameworks: loaded by their own code, and read back."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ipu_pipeline.backends.cluster.layouts.exchange import FORMATS, export_plan, read_plan
from ipu_pipeline.backends.cluster.layouts.given_layout import GivenLayout, GivenModel
from ipu_pipeline.backends.cluster.layouts.megatron_layout import blocks_of, parse_layout
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import ModelIdentity, Plan, VocabularyRows
from tests.backends.cluster.prices.test_rank_plan import captured

ABSENT = "pip install --no-deps -r tests/backends/cluster/exchange.txt"
UNEVEN = "E|t*2|t*2|(t|)*2,L"
H100 = machine_by_name("h100-x16")


@cache
def planned(
    text: str = UNEVEN, machine: Machine = H100, schedule: str | None = None, **sizes: int
) -> Plan:
    layout = parse_layout(text)
    model = GivenModel(captured(), ModelIdentity("LlamaForCausalLM", {}))
    given = {"pp": 3, "tp": 2, "dp": 2, "microbatches": 6, **sizes}
    settings = {"zero_stage": given.pop("zero_stage", 1), "engine": "megatron"}
    said = GivenLayout(
        lambda graph: blocks_of(layout, graph), given, settings, schedule, layout.num_extra_layers
    )
    return said.plan(model, machine)


def six_layers(plan: Plan) -> tuple[tuple[str, ...], ...]:
    return tuple(stage.blocks for stage in plan.stages)


@pytest.mark.parametrize("name", ["megatron", "torchtitan", "automodel"])
def test_what_is_exported_is_imported_as_the_same_stages(name: str, tmp_path: Path) -> None:
    plan = planned()
    file = tmp_path / "settings"
    file.write_text(export_plan(plan, name)[0])
    found = read_plan(file, name)
    assert found.stages(plan.graph) == six_layers(plan)
    assert found.schedule == plan.schedule == "interleaved"
    sizes = {"pp": 3, "tp": 2, "cp": 1, "ep": 1, "micro_batch": 1}
    assert found.sizes.items() >= sizes.items()
    model = GivenModel(plan.graph, plan.model)
    again = replace(found, sizes={"dp": 2, **found.sizes}).plan(model, H100)
    assert (again.num_stages, again.replicas, again.num_microbatches) == (6, 2, 6)


def test_megatron_loads_its_layout() -> None:
    real = pytest.importorskip(
        "megatron.core.transformer.pipeline_parallel_layer_layout", reason=ABSENT
    )
    plan = planned("Et*2|t*2|t*2|mL", pp=2)
    words = shlex.split(export_plan(plan, "megatron")[0], comments=True)
    flags = {word: words[at] for at, word in enumerate(words[:-1], 1)}
    assert "--sequence-parallel" in words
    layout = real.PipelineParallelLayerLayout.from_str(
        flags["--pipeline-model-parallel-layout"], int(flags["--pipeline-model-parallel-size"])
    )
    layout.validate_layer_layout(num_layers=6, mtp_num_layers=int(flags["--mtp-num-layers"]))
    counts = [[[one.name for one in part].count("decoder") for part in row]
              for row in layout.layout]  # fmt: skip
    assert counts == [[2, 2], [2, 0]]


def test_torchtitan_loads_its_stages() -> None:
    configs = pytest.importorskip("torchtitan.config.configs", reason=ABSENT)
    pipeline = pytest.importorskip("torchtitan.distributed.pipeline_parallel", reason=ABSENT)
    raw = json.loads(export_plan(planned(), "torchtitan")[0])
    settings = configs.ParallelismConfig(**raw["parallelism"])
    model = torch.nn.Module()
    model.tok_embeddings, model.norm, model.lm_head = (torch.nn.Identity() for _ in range(3))
    model.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(6))
    kept = []
    for names in settings.module_fqns_per_model_part:
        part = pipeline._split_module(model, names)
        ends = [n for n in ("tok_embeddings", "norm", "lm_head") if getattr(part, n) is not None]
        kept.append((ends, len(part.layers)))
    assert kept == [
        (["tok_embeddings"], 0), ([], 2), ([], 2), ([], 1), (["norm"], 1), (["lm_head"], 0)
    ]  # fmt: skip
    order = [
        pipeline._get_pp_rank_to_stage_indices_mapping(
            rank, settings.pipeline_parallel_degree, settings.pipeline_parallel_schedule, 6
        )
        for rank in range(3)
    ]
    assert order == [(0, 3), (1, 4), (2, 5)]


def test_automodel_loads_its_pipeline() -> None:
    real = pytest.importorskip("nemo_automodel.recipes._dist_utils", reason=ABSENT)
    raw = json.loads(export_plan(planned(), "automodel")[0])
    found = real.parse_distributed_section(raw["distributed"])
    pipeline = found["pipeline_config"]
    assert (found["pp_size"], found["tp_size"], found["dp_size"]) == (3, 2, 2)
    assert pipeline.pp_batch_size // pipeline.pp_microbatch_size == 6
    layers = [[n for n in part if ".layers." in n] for part in pipeline.module_fqns_per_model_part]
    assert list(map(len, layers)) == [0, 2, 2, 1, 1, 0]
    assert pipeline.module_fqns_per_model_part[4][1:] == ["model.norm", "model.rotary_emb"]


def test_transformers_splits_as_its_settings_say(tmp_path: Path) -> None:
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.pipeline_parallel import PipelineStage

    text, notes = export_plan(planned("Et|t|t|t*3L", pp=4, dp=1), "transformers")
    real = DistributedConfig.from_dict(json.loads(text))
    assert (real.tp_size, real.pp_size) == (2, 4)
    stage = PipelineStage.__new__(PipelineStage)
    stage.pp_size = real.pp_size
    ranges = [stage.layer_range_for_rank(rank, 6) for rank in range(4)]
    assert [end - begin for begin, end in ranges] == [1, 1, 1, 3]
    assert notes == ("transformers runs a batch through the stages as one microbatch",)
    file = tmp_path / "distributed.json"
    file.write_text(text)
    plan = planned("Et|t|t|t*3L", pp=4, dp=1)
    assert read_plan(file, "transformers").stages(plan.graph) == six_layers(plan)


def edited(**changes: Any) -> Plan:
    return replace(planned(), **changes)


def with_first(**changes: Any) -> Plan:
    first, *rest = planned().stages
    return edited(stages=(replace(first, **changes), *rest))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("megatron", lambda: edited(granularity="op"), "of granularity op; other frameworks cut"),
        ("megatron", lambda: edited(vocabulary=VocabularyRows(((0, 0, 9),))), "spreads its voc"),
        ("megatron", lambda: with_first(serialize={"e": 2}), "block 'e' runs in slices, which no"),
        ("automodel", lambda: with_first(table_slices={"e": (0, 1)}), "'e' is spread over stages"),
        ("megatron", lambda: with_first(device=2), r"stages on ranks .* has them on \[0, 1, 2"),
        ("megatron", lambda: edited(schedule="looped_bfs"), "runs 1f1b, interleaved: plan with"),
        ("megatron", lambda: planned(zero_stage=2), "Megatron-LM pipelines shard the optimizer's"),
        ("transformers", lambda: planned(), "the plan has dp 2; pipelines of transformers"),
        ("transformers", lambda: planned("E|t*3|t*3L", dp=1), r"evenly, Et\*2\|t\*2\|t\*2L: plan"),
        ("torchtitan", lambda: planned("Et*2|t*2|t*2mL"), "names no multi-token prediction"),
        ("megatron", lambda: edited(machine=machine_by_name("pod16")), "run on GPUs: plan for"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_say_is_refused(name: str, make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        export_plan(make(), name)


def test_some_recomputed_layers_are_refused_and_all_are_said() -> None:
    plan = planned()
    again = [replace(s, recompute=tuple(n for n in s.blocks if "layers" in n)) for s in plan.stages]
    text, _ = export_plan(replace(plan, stages=tuple(again)), "megatron")
    assert "--recompute-granularity full --recompute-method uniform" in text
    assert FORMATS["megatron"].read(text).recompute
    text, _ = export_plan(replace(plan, stages=tuple(again)), "automodel")
    assert FORMATS["automodel"].read(text).recompute
    _, notes = export_plan(replace(plan, stages=tuple(again)), "torchtitan")
    assert notes[0] == "the plan recomputes: set activation checkpointing of torchtitan"
    with pytest.raises(PlanError, match=r"recomputes 4 of 6 layers; .* all or none"):
        export_plan(replace(plan, stages=(*again[:3], *plan.stages[3:])), "automodel")


def test_parts_and_narrow_precisions_are_written() -> None:
    plan = planned()
    settings = {**plan.settings, "recompute": ["core_attn", "mlp"], "precision": "float8"}
    text, _ = export_plan(replace(plan, settings=settings), "megatron")
    assert "--recompute-granularity selective --recompute-modules core_attn mlp\n" in text
    assert "--bf16\n--fp8-format hybrid\n" in text
    found = FORMATS["megatron"].read(text)
    assert found.settings["recompute"] == ["core_attn", "mlp"]
    assert found.settings["precision"] == "float8"
    _, notes = export_plan(replace(plan, settings=settings), "torchtitan")
    assert "the plan's precision is float8: set it in torchtitan" in notes


def test_other_models_have_no_names_there() -> None:
    graph = captured()
    more = BlockGraph(
        "Gpt", (Block("wpe", "embedding", "wpe"), *graph.blocks), parameters=graph.parameters
    )
    first = planned().stages[0]
    plan = edited(graph=more, stages=(replace(first, blocks=("wpe", *first.blocks)),
                                      *planned().stages[1:]))  # fmt: skip
    with pytest.raises(
        PlanError, match=r"Gpt has 6 layers and wpe, model.embed_tokens, .* one each"
    ):
        export_plan(plan, "torchtitan")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("megatron", "--micro-batch-size 2", "has no --pipeline-model-parallel-layout; add it"),
        ("megatron", "--pipeline-model-parallel-layout 'Et", "its quotes do not match"),
        ("megatron", "E|x", "'x' at position 3"),
        ("megatron", "--tensor-model-parallel-size a --pipeline-model-parallel-layout=EL",
         "--tensor-model-parallel-size must be a whole number, got 'a'"),
        ("torchtitan", "{", "it is no YAML of plain values: .*; correct it"),
        ("torchtitan", "[" * 100_000, "it is no YAML of plain values: maximum recursion"),
        ("torchtitan", "a: &a\n b", "it is no YAML|parallelism must be an object"),
        ("torchtitan", '{"parallelism": {}, "parallelism": {}}', "the key 'parallelism' twice"),
        ("torchtitan", "[1]", r"the file must be an object with fields, got \[1\]"),
        ("torchtitan", '{"parallelism": {}}', "must hold a list of names for every stage"),
        ("torchtitan", '{"parallelism": {"module_fqns_per_model_part": [],'
         '"pipeline_parallel_schedule": "dfs"}}', "its schedule is 'dfs'; known are 1F1B"),
        ("automodel", "distributed: {pipeline: {pp_batch_size: 3, pp_microbatch_size: 2}}",
         "a local batch of 3 does not divide into micro batches of 2"),
        ("automodel", "distributed: {tp_size: 0, pipeline: {}}", "tp_size must be at least 1"),
        ("transformers", '{"pp_size": 1000000000}', "pp_size may be 4096 at most, got 1000000000"),
        ("transformers", '{"tp_size": 99999, "pp_size": 2}', "tp_size may be 65536 at most"),
        ("transformers", "{}", "it has no pp_size; give the number of stages"),
    ],
)  # fmt: skip
def test_files_that_say_no_pipeline_are_refused(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings"
    file.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_plan(file, name)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([["tok_embeddings", "layers.9"]], "names 'layers.9', which LlamaForCausalLM has not"),
        ([["layers.0"], ["layers.0"]], "has layers.0 in stages 0 and 1; keep one"),
        ([["tok_embeddings"]], "lacks layers.0; put it into a stage"),
    ],
)
def test_module_lists_that_are_not_the_model_are_refused(parts: Any, message: str) -> None:
    text = json.dumps({"parallelism": {"module_fqns_per_model_part": parts}})
    with pytest.raises(PlanError, match=message):
        FORMATS["torchtitan"].read(text).stages(captured())


def test_a_bare_layout_is_read() -> None:
    found = FORMATS["megatron"].read("Et*3|\n t*3L # by hand\n")
    assert found.sizes == {}
    assert [len(stage) for stage in found.stages(captured())] == [4, 5]
