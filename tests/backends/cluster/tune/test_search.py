"""The search over every parallel size of GPUs, against brute force and by what it promises."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from math import inf
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from ipu_pipeline.backends.cluster.backend import BACKEND
from ipu_pipeline.backends.cluster.layouts.exchange import export_plan
from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings
from ipu_pipeline.backends.cluster.tune.quick import Profiles, even_ends
from ipu_pipeline.backends.cluster.tune.search import GpuTuneResult, tune
from ipu_pipeline.backends.cluster.tune.space import GpuRequest, configurations
from ipu_pipeline.backends.cluster.tune.text import front_table, result_text, shares
from ipu_pipeline.capture import capture
from ipu_pipeline.cli import app
from ipu_pipeline.errors import PartitionError, PlanError
from ipu_pipeline.ir.graph import BlockGraph, OpRecord
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.micro_batches import extrapolated
from ipu_pipeline.ir.plan import ModelIdentity, Plan
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.price import price, step_s
from ipu_pipeline.planner.search import Constraints, solve

LENGTH = 256


@cache
def captured(micro_batch: int = 1, model_type: str = "llama") -> BlockGraph:
    sizes = {"num_local_experts": 4} if model_type == "mixtral" else {}
    config = AutoConfig.for_model(
        model_type, hidden_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=1024, vocab_size=8192, **sizes,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tokens = torch.zeros(micro_batch, LENGTH, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens}
    return capture(model.train(), batch, self_check=False).graph


def small(name: str = "h100-x4", num_bytes: float = inf) -> Machine:
    machine = machine_by_name(name)
    if num_bytes == inf:
        return machine
    devices = tuple(
        replace(d, memory_bytes=int(num_bytes), reserved_bytes=0) for d in machine.devices
    )
    return replace(machine, devices=devices)


def tuned(
    machine: Machine | None = None, model_type: str = "llama", **fixed: object
) -> GpuTuneResult:
    request = GpuRequest(**{"global_batch": 16, **fixed})  # type: ignore[arg-type]
    graph = captured(1, model_type)
    return tune(
        lambda size: captured(size, model_type), machine or small(), request,
        ModelIdentity(graph.model_class, {}), time_limit_s=20.0,
    )  # fmt: skip


def solved_s(machine: Machine, request: GpuRequest, model_type: str) -> float:
    """Return the best step of all configurations, each searched on its own."""
    found = [inf]
    for config in configurations(request, captured(1, model_type), machine):
        graph, sizes = captured(config.sizes.micro_batch, model_type), config.sizes
        work = Workload(
            graph, machine, config.schedule, config.num_microbatches, sizes.dp,
            config.settings(request.settings),
        )  # fmt: skip
        limits = Constraints(
            num_stages=config.shape.num_stages, num_microbatches=config.num_microbatches,
            replicas=sizes.dp, schedule=config.schedule, stage_devices=config.shape.devices,
        )  # fmt: skip
        try:
            split = solve(graph, BACKEND.costs(work), machine, limits, step=partial(step_s, work))
        except PartitionError:
            continue
        found.append(split.objective)
    return min(found)


@pytest.mark.parametrize(
    ("model_type", "num_bytes", "fixed"),
    [
        ("llama", inf, {"schedule": "1f1b", "micro_batch": 1, "tp": 2}),
        ("llama", 0.55e9, {"schedule": "1f1b", "tp": 1, "micro_batch": 2}),
        ("mixtral", 0.6e9, {"schedule": "1f1b", "micro_batch": 1, "recompute": "none"}),
    ],
)
def test_tune_finds_what_brute_force_finds(
    model_type: str, num_bytes: float, fixed: dict[str, object]
) -> None:
    machine = small(num_bytes=num_bytes)
    found = tuned(machine, model_type, **fixed)
    best_s = solved_s(machine, found.request, model_type)
    assert found.best.plan.objective_s == pytest.approx(best_s, rel=1e-9)
    assert found.bound_s <= best_s * (1 + 1e-12)
    assert found.best.plan.lower_bound_s == found.bound_s


def test_plans_for_megatron_have_zero_stages_that_it_exports() -> None:
    found = tuned(model_type="mixtral", micro_batch=2)
    assert {point.config.sizes.zero_stage for point in found.points} == {1}
    for point in found.points:
        assert "--use-distributed-optimizer" in export_plan(point.plan, "megatron")[0]
    sharded = tuned(model_type="mixtral", micro_batch=2, zero_stage=3)
    assert sharded.best.config.sizes.zero_stage == 3


def test_bounds_are_below_every_plan() -> None:
    machine, request = small(), GpuRequest(global_batch=16)
    profiles = Profiles({2: captured(2)}, machine, request.settings)
    for point in tuned(micro_batch=2).points:
        bound_s = profiles.of(point.config).bound_s()
        assert 0 < bound_s <= point.plan.objective_s * (1 + 1e-12)


def test_no_point_of_the_front_is_dominated_and_each_keeps_its_price(tmp_path: Path) -> None:
    found = tuned(model_type="mixtral", micro_batch=1)
    assert len(found.points) > 1
    for first, second in zip(found.points, found.points[1:], strict=False):
        assert first.plan.objective_s <= second.plan.objective_s
        assert first.memory_bytes > second.memory_bytes
    for number, point in enumerate(found.points):
        path = tmp_path / f"{number}.json"
        point.plan.save(path)
        loaded = Plan.load(path)
        assert loaded == point.plan
        assert price(loaded).step_s == point.plan.objective_s
        assert loaded.total_batch_size == 16
        assert point.config.sizes.num_devices == 4
        assert sum(shares(point).values()) == pytest.approx(loaded.objective_s, rel=0.05)


def test_the_text_says_what_limits() -> None:
    found = tuned(micro_batch=2, tp=2)
    text = result_text(found)
    assert f"{found.best.tokens_per_s:,.0f} tokens/s" in text
    assert f"{found.best.plan.objective_s:.4g} s" in text
    assert "limited by compute" in text
    assert "the fullest GPU holds" in text


def test_what_is_fixed_is_kept() -> None:
    found = tuned(tp=2, pp=2, vpp=2, schedule="interleaved", zero_stage=0, recompute="full")
    for point in found.points:
        sizes = point.config.sizes
        assert (sizes.tp, sizes.pp, sizes.vpp, sizes.dp, sizes.zero_stage) == (2, 2, 2, 1, 0)
        assert sum(len(stage.recompute) for stage in point.plan.stages) == 4
    assert front_table(found).splitlines()[-1].split()[-1] == "full"
    assert tuned(settings=GpuSettings(engine="torch"), micro_batch=2).best.config.sizes.tp == 1


def test_a_large_vocabulary_is_spread_where_that_is_faster() -> None:
    graph = captured()
    wide = replace_vocabulary(graph, 32)
    own = {"settings": GpuSettings(engine="torch"), "micro_batch": 1, "pp": 4, "global_batch": 32}

    def best(of: BlockGraph, **fixed: object) -> GpuTuneResult:
        request = GpuRequest(**{**own, **fixed})
        return tune(lambda _: of, small(), request, ModelIdentity("LlamaForCausalLM", {}))

    whole, spread = best(wide), best(wide, vocabulary="auto")
    assert spread.best.plan.vocabulary is not None
    assert spread.best.plan.objective_s < 0.8 * whole.best.plan.objective_s
    assert spread.bound_s <= spread.best.plan.objective_s
    assert price(spread.best.plan).step_s == spread.best.plan.objective_s
    assert "+ vocabulary" in result_text(spread)
    assert sum(shares(spread.best).values()) == pytest.approx(spread.best.plan.objective_s)


def replace_vocabulary(graph: BlockGraph, factor: int) -> BlockGraph:
    """Return the graph as if its vocabulary were larger: rows, and what is done with them."""

    def grown(op: OpRecord) -> OpRecord:
        if not any(8192 in shape for shape in op.shapes):
            return op
        shapes = tuple(tuple(n * factor if n == 8192 else n for n in s) for s in op.shapes)
        return replace(op, shapes=shapes, flops=op.flops * factor,
                       bytes_moved=op.bytes_moved * factor)  # fmt: skip

    blocks = tuple(
        replace(b, forward_ops=tuple(map(grown, b.forward_ops)),
                backward_ops=tuple(map(grown, b.backward_ops)))
        for b in graph.blocks
    )  # fmt: skip
    parameters = tuple(
        replace(p, shape=(p.shape[0] * factor, *p.shape[1:])) if p.shape[0] == 8192 else p
        for p in graph.parameters
    )
    tensors = tuple(
        replace(t, shape=(*t.shape[:-1], 8192 * factor)) if t.shape[-1:] == (8192,) else t
        for t in graph.tensors
    )
    return replace(graph, blocks=blocks, parameters=parameters, tensors=tensors)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"replicas": 3}, "no configuration uses all 4 GPUs of h100-x4 .* with replicas 3: the"),
        ({"global_batch": 7, "replicas": 4}, "the batch must divide by replicas x micro batch"),
        ({"recompute": "everything"}, "recompute 'everything'; use core_attn"),
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3, got 4"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"schedule": "nix"}, "nix"),
        ({"schedule": "popart"}, "h100-x4 runs no schedule 'popart'; use one of 1f1b, "),
        (
            {"settings": GpuSettings(), "tp": 2},
            "tp: of this project's own processes .* tune searches",
        ),
        ({"settings": GpuSettings(), "recompute": "mlp"}, "recompute: of this project's own"),
        ({"vocabulary": "auto"}, "engine megatron does not spread the vocabulary over stages"),
        (
            {"settings": GpuSettings(), "vocabulary": "even"},
            "vocabulary is 'even'; tune knows auto",
        ),
    ],
)
def test_what_cannot_be_is_refused(fixed: dict[str, object], message: str) -> None:
    with pytest.raises((PartitionError, PlanError, ValueError), match=message):
        tuned(**fixed)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"none of \d+ configurations fits 4 GPUs"):
        tuned(small(num_bytes=0.402e9))
    devices = tuple(replace(device, kernels=None) for device in small().devices)
    with pytest.raises(PlanError, match="gives no kernels for its devices"):
        tuned(replace(small(), devices=devices))


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_graph_of_another_micro_batch_follows_from_two(model_type: str) -> None:
    first, second, third = (captured(size, model_type) for size in (3, 5, 2))
    found = extrapolated(first, second, 2)
    assert found is not None
    assert found.micro_batch_size == 2
    for one, other in zip(found.blocks, third.blocks, strict=True):
        assert (one.name, one.saved_bytes, one.kept_bytes) == (
            other.name, other.saved_bytes, other.kept_bytes
        )  # fmt: skip
        assert one.workspace_bytes == pytest.approx(other.workspace_bytes, rel=0.01)
        for name in ("forward_ops", "backward_ops"):
            assert work_of(getattr(one, name)) == work_of(getattr(other, name))
    assert extrapolated(first, first, 4) is None
    assert extrapolated(first, replace(second, blocks=second.blocks[1:]), 4) is None


def work_of(operations: tuple[OpRecord, ...]) -> Counter[tuple[object, ...]]:
    found: Counter[tuple[object, ...]] = Counter()
    for op in operations:
        found[op.name, op.dtype, op.shapes, op.flops, op.bytes_moved] += op.count
    return found


def test_stages_of_even_time() -> None:
    assert even_ends([1.0] * 6, 3) == (2, 4, 6)
    assert even_ends([4.0, 1.0, 1.0, 1.0, 1.0], 2) == (1, 5)
    assert even_ends([1.0], 2) is None


def test_the_command(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=512, vocab_size=1024,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    made = tmp_path / "plan.json"
    command = ["tune", str(tmp_path), "--global-batch", "8", "--seq-length", "128"]
    gpus = ["--machine", "h100-x2", "--micro-batch", "2", "--json", "-o", str(made)]
    result = CliRunner().invoke(app, [*command, *gpus])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    plan = Plan.load(made)
    assert printed["front"][0]["step_s"] == plan.objective_s == price(plan).step_s
    assert {spec.dtype for spec in plan.graph.parameters} == {"bfloat16"}
    assert set(plan.model.parameters.values()) & {"256x256 float32"}  # the master weights
    for machine, option, message in (
        ("h100-x2", ("--device-iterations", "2"), "--device-iterations is for IPUs, and h100-x2"),
        ("pod4", ("--tp", "2"), "--tp is for GPUs, and pod4 has IPUs; leave it out"),
    ):
        result = CliRunner().invoke(app, [*command, "--machine", machine, *option])
        assert result.exit_code == 1
        assert message in result.output
