"""The flow: plan() and compile() from the outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.machine import Device, Link, Machine
from tests.quick_calibration import make_quick
from tests.tiny_models import TINY


@pytest.fixture(scope="module", autouse=True)
def _own_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("IPU_PIPELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        make_quick(patched)
        yield


def two_devices(memory_bytes: int = 10**9) -> Machine:
    devices = tuple(Device(f"d{i}", memory_bytes, {"float32": 1e9}, 1e9) for i in range(2))
    return Machine("pair", devices, Link(bytes_per_s=1e9))


def test_a_plan_carries_every_decision_and_prediction() -> None:
    model, batch = TINY["bert-qa"].build()
    plan = ipp.plan(model, batch, machine=two_devices(), num_stages=2, microbatches=4)
    assert plan.num_stages == 2
    assert [name for stage in plan.stages for name in stage.blocks] == [b.name for b in plan.blocks]
    assert plan.total_batch_size == 8
    assert plan.gap < 1e-12
    assert 0 < plan.lower_bound_s == pytest.approx(plan.objective_s, rel=1e-12)
    assert not plan.edited
    assert plan.cost_source == "analytic"
    assert all(s.forward_s > 0 and s.backward_s > 0 and s.memory_bytes > 0 for s in plan.stages)
    assert plan.stages[0].in_flight == 2
    assert plan.stages[1].transfer_s > 0


def test_plans_do_not_need_weights() -> None:
    model, batch = TINY["bert-qa"].build(device="meta")
    real_model, real_batch = TINY["bert-qa"].build()
    planned = ipp.plan(model, batch, machine="pod4", num_stages=4)
    real = ipp.plan(real_model, real_batch, machine="pod4", num_stages=4)
    assert [s.blocks for s in planned.stages] == [s.blocks for s in real.stages]
    with ipp.compile(real_model, planned, self_check=False) as executable:
        assert executable.forward_backward(real_batch) > 0


def test_published_layers_per_ipu_are_respected_to_the_letter() -> None:
    model, batch = TINY["bert-qa"].build()
    config = IPUConfig(layers_per_ipu=(0, 1, -1, 1), gradient_accumulation_steps=7)
    plan = ipp.plan(model, batch, machine="pod4", config=config)
    layers = [sum(name.startswith("bert.encoder") for name in s.blocks) for s in plan.stages]
    assert layers == [0, 1, 2, 1]
    assert plan.stages[0].blocks == ("bert.embeddings",)
    assert plan.stages[3].blocks[-2:] == ("qa_outputs", "loss")
    assert plan.num_microbatches == 7


def test_layers_per_device_in_constraints_are_respected() -> None:
    model, batch = TINY["bert-qa"].build(device="meta")
    given = ipp.Constraints(layers_per_ipu=(1, 3))
    plan = ipp.plan(model, batch, machine="a100-80g-x4", num_stages=2, constraints=given)
    layers = [sum(name.startswith("bert.encoder") for name in s.blocks) for s in plan.stages]
    assert layers == [1, 3]


def test_what_constraints_say_is_kept_where_no_argument_says_otherwise() -> None:
    model, batch = TINY["gpt2-lm"].build(device="meta")
    limits = ipp.Constraints(
        num_stages=2, num_microbatches=3, replicas=2, schedule="gpipe", vocabulary="even"
    )
    plan = ipp.plan(model, batch, machine="a100-80g-x4", constraints=limits)
    assert (plan.num_stages, plan.num_microbatches, plan.replicas) == (2, 3, 2)
    assert plan.schedule == "gpipe"
    assert plan.vocabulary is not None
    given = ipp.plan(
        model, batch, machine="a100-80g-x4", constraints=limits, num_stages=1, replicas=1,
        microbatches=5, schedule="1f1b",
    )  # fmt: skip
    assert (given.num_stages, given.num_microbatches, given.replicas) == (1, 5, 1)
    assert given.schedule == "1f1b"


def test_stages_that_contradict_the_configuration_are_refused() -> None:
    model, batch = TINY["bert-qa"].build()
    for layers in ((2, 2), (4,)):
        message = f"num_stages is 3, but the IPU configuration has {len(layers)} IPU"
        with pytest.raises(ValueError, match=message):
            ipp.plan(
                model, batch, machine="pod4", num_stages=3, config=IPUConfig(layers_per_ipu=layers)
            )


def test_profiled_costs_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ipu_pipeline.backends.local.measure import blocks

    runs = []
    measure = blocks._measure

    def counted(program: object, *rest: object) -> list[blocks.Runs]:
        runs.append(program)
        return measure(program, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks, "_measure", counted)
    model, batch = TINY["bert-qa"].build()
    plan = ipp.plan(model, batch, num_stages=2, costs="profiled")
    assert plan.cost_source == "profiled"
    # Embeddings, one layer for all four, head, loss.
    assert len(runs) == 4 * blocks.VISITS
    layers = [plan.measured_s[b.name] for b in plan.blocks if b.kind == "layer"]
    assert len(set(layers)) == 1
    ipp.plan(model, batch, num_stages=2, costs="profiled")
    assert len(runs) == 4 * blocks.VISITS


def test_tied_blocks_may_be_apart_on_the_local_target() -> None:
    model, batch = TINY["gpt2-lm"].build()
    plan = ipp.plan(model, batch, num_stages=4)
    assert plan.tied_groups == (("transformer.wte", "lm_head"),)
    assert plan.stage_of["transformer.wte"] != plan.stage_of["lm_head"]
    weight = model.lm_head.weight
    with ipp.compile(model, plan, self_check=False) as executable:
        executable.forward_backward(batch)
        assert model.lm_head.weight is weight is model.transformer.wte.weight


def test_a_plan_for_another_model_is_refused_with_the_difference() -> None:
    model, batch = TINY["bert-qa"].build()
    plan = ipp.plan(model, batch, num_stages=2)
    config = TINY["bert-qa"].config()
    config.intermediate_size *= 2
    other = type(model)(config)
    with pytest.raises(
        PlanError, match=r"intermediate.dense.weight: plan 64x32 float32, model 128"
    ):
        ipp.compile(other, plan)
    with pytest.raises(ValueError, match=r"the plan is a str; give one of .*Plan\.load\(path\)"):
        ipp.compile(model, "plan.json")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs": "guessed"}, "costs 'guessed' is unknown"),
        ({"granularity": "atom"}, "granularity 'atom' is unknown"),
        ({"schedule": "zigzag"}, "local runs no schedule 'zigzag'"),
        ({"microbatches": 0}, "num_microbatches must be at least 1, got 0"),
        ({"machine": "abacus"}, "machine 'abacus' is neither known"),
        ({"settings": {"tp": 2}}, r"settings \(tp\) are for GPUs .* local.* has none; leave them"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    model, batch = TINY["bert-qa"].build()
    with pytest.raises((ValueError, PlanError), match=message):
        ipp.plan(model, batch, **{"num_stages": 2, **arguments})


def test_finer_granularities_train_the_same_model() -> None:
    losses = []
    for granularity in ("layer", "sublayer", "op"):
        model, batch = TINY["bert-qa"].build()
        plan = ipp.plan(model, batch, num_stages=3, microbatches=1, granularity=granularity)
        with ipp.compile(model, plan) as executable:
            losses.append(executable.forward_backward(batch))
        assert len(plan.blocks) >= {"layer": 7, "sublayer": 15, "op": 30}[granularity]
        gradient = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        losses.append(gradient.norm().item())
    assert losses[0::2] == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert losses[1::2] == pytest.approx([losses[1]] * 3, rel=1e-5)
