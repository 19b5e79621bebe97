"""Annotations and settings: what a plan says in poptorch's words, both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.annotations import annotate, module_of
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.settings import (
    OptimizerSettings,
    ipu_config_of_plan,
    settings_for,
)
from ipu_pipeline.errors import ConfigError, LoweringError
from ipu_pipeline.ir.plan import Plan, PlannedStage
from ipu_pipeline.planner.layers_per_ipu import counted_layers
from tests.tiny_models import TINY


def _plan(name: str = "bert-qa", **config: Any) -> Plan:
    model, batch = TINY[name].build(device="meta")
    said = {"layers_per_ipu": (2, 2), "gradient_accumulation_steps": 16, **config}
    settings = IPUConfig(**said)
    return ipp.plan(model, batch, machine="pod16", config=settings, replicas=settings.replicas())


def test_one_annotation_per_block_in_order() -> None:
    plan = _plan()
    found = annotate(plan)
    assert [a.block for a in found] == [block.name for block in plan.blocks]
    assert [(a.stage, a.ipu) for a in found] == [(0, 0)] * 3 + [(1, 1)] * 4
    assert not found[-1].begins
    assert found[0].to_json()["module"] == "bert.embeddings"
    assert found[1].forward_ms > found[-1].forward_ms > 0


def test_what_is_recomputed_from_is_what_the_price_says() -> None:
    every = {"recompute_checkpoint_every_layer": True}

    def kept(**said: Any) -> list[str]:
        return [a.block for a in annotate(_plan(**said)) if a.checkpoint]

    # PopART would recompute the last stage up to a checkpoint in it; the price recomputes none.
    assert kept(**every) == ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(2))]
    assert kept() == kept(recompute=False, **every) == []


def test_a_stage_that_begins_with_the_loss() -> None:
    plan = _plan()
    first, last = plan.stages
    moved = (
        first,
        replace(last, blocks=last.blocks[:-1]),
        PlannedStage(device=0, blocks=("loss",)),
    )
    with pytest.raises(
        LoweringError, match=r"stage 2 begins with 'loss', which is no module's call"
    ):
        annotate(replace(plan, stages=moved))


def test_calls_of_one_module() -> None:
    plan = _plan()
    again = replace(plan.blocks[-2], name="bert.embeddings#2")
    graph = replace(
        plan.graph,
        blocks=(*plan.blocks[:-2], again, plan.blocks[-1]),
        tensors=tuple(
            replace(t, producer=again.name) if t.producer == "qa_outputs" else t
            for t in plan.tensors
        ),
    )
    first, last = plan.stages
    names = tuple("bert.embeddings#2" if n == "qa_outputs" else n for n in last.blocks)
    with pytest.raises(
        LoweringError, match=r"module 'bert.embeddings' is called on IPUs 0 and 1, but its weigh"
    ):
        annotate(replace(plan, graph=graph, stages=(first, replace(last, blocks=names))))
    assert module_of(again) == "bert.embeddings"
    together = replace(first, blocks=(*first.blocks, "bert.embeddings#2"))
    rest = replace(last, blocks=tuple(n for n in last.blocks if n != "qa_outputs"))
    one = annotate(replace(plan, graph=graph, stages=(together, rest)))
    assert [a.again for a in one if a.module == "bert.embeddings"] == [False, True]
    # in several stages on one IPU, every call begins a block
    back = PlannedStage(device=0, blocks=("bert.embeddings#2", "loss"))
    before = replace(last, blocks=tuple(n for n in last.blocks if n not in ("qa_outputs", "loss")))
    turns = annotate(replace(plan, graph=graph, stages=(first, before, back)))
    begun = [(a.block, a.stage) for a in turns if a.module == "bert.embeddings" and a.begins]
    assert begun == [("bert.embeddings", 0), ("bert.embeddings#2", 2)]


# ---- settings -------------------------------------------------------------------------------


def test_a_plan_and_its_configuration_go_both_ways() -> None:
    config = IPUConfig(
        layers_per_ipu=(1, 3),
        gradient_accumulation_steps=8,
        ipus_per_replica=2,
        replication_factor=4,
        matmul_proportion=(0.1, 0.2),
        device_iterations=2,
    )
    plan = _plan(**config.to_dict())
    assert ipu_config_of_plan(plan, config) == replace(config, recompute=True)
    alone = ipu_config_of_plan(plan)
    assert alone.layers_per_ipu == (1, 3)
    assert (alone.replication_factor, alone.gradient_accumulation_steps) == (4, 8)
    model, batch = TINY["bert-qa"].build(device="meta")
    again = ipp.plan(model, batch, machine="pod16", config=alone, replicas=alone.replicas())
    assert [s.blocks for s in again.stages] == [s.blocks for s in plan.stages]
    assert again.objective_s == plan.objective_s


def test_what_a_configuration_leaves_open_is_the_plans() -> None:
    plan = _plan(optimizer_state_offchip=True, matmul_proportion=(0.1, 0.3))
    found = ipu_config_of_plan(plan, IPUConfig(gradient_accumulation_steps=16, seed=3))
    assert (found.matmul_proportion, found.optimizer_state_offchip) == ((0.1, 0.3), True)
    assert found.seed == 3


def test_wildcards_become_numbers() -> None:
    plan = _plan(layers_per_ipu=(1, -1))
    found = ipu_config_of_plan(
        plan, IPUConfig(layers_per_ipu=(1, -1), gradient_accumulation_steps=16)
    )
    assert found.layers_per_ipu == (1, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_per_ipu": (3, 1)}, r"layers_per_ipu: plan \(2, 2\), configuration \(3, 1\)"),
        ({"gradient_accumulation_steps": 8}, r"gradient_accumulation_steps: plan 16, .* 8"),
        ({"replication_factor": 2}, r"replication_factor: plan 1, configuration 2"),
        # all that the price reads: what was priced is what is emitted
        ({"recompute": False}, r"recompute: plan True, configuration False"),
        ({"recompute_checkpoint_every_layer": True}, r"every_layer: plan False, configuration Tr"),
        ({"matmul_proportion": 0.3}, r"matmul_proportion: plan \(0.2, 0.2\), conf.* \(0.3, 0.3\)"),
        ({"device_iterations": 2}, r"device_iterations: plan 1, configuration 2"),
    ],
)
def test_a_configuration_that_contradicts_the_plan(config: dict[str, Any], message: str) -> None:
    said = {"layers_per_ipu": (2, 2), "gradient_accumulation_steps": 16, **config}
    with pytest.raises(LoweringError, match=message):
        settings_for(_plan(), IPUConfig(**said))


def test_numbers_given_beside_a_configuration_that_leaves_them() -> None:
    found = settings_for(replace(_plan(), replicas=2), IPUConfig(layers_per_ipu=(2, 2))).to_json()
    assert (found["gradient_accumulation_steps"], found["replication_factor"]) == (16, 2)


def test_slices_come_from_the_plan() -> None:
    plan = _plan("bert-mlm")
    first, *rest, head = plan.stages
    sliced = replace(
        plan,
        stages=(
            replace(first, serialize={"bert.embeddings": 3}),
            *rest,
            replace(head, serialize={"cls": 9}),
        ),
    )
    found = ipu_config_of_plan(sliced)
    assert found.embedding_serialization_factor == 3
    assert found.projection_serialization_factor == 9


def test_an_optimizer_that_poptorch_has_not() -> None:
    with pytest.raises(LoweringError, match=r"optimizer 'Lion' does not exist in poptorch; use on"):
        OptimizerSettings(optimizer="Lion")


def test_the_seed_of_the_configuration() -> None:
    config = IPUConfig(layers_per_ipu=(2, 2), gradient_accumulation_steps=16, seed=7)
    assert settings_for(_plan(), config).to_json()["seed"] == 7
    assert settings_for(_plan(), config, seed=0).to_json()["seed"] == 0


def test_speech_convolutions_are_counted_only_when_the_numbers_say_so() -> None:
    layers = {"conv.0": True, "conv.1": True, "layer.0": False, "layer.1": False}
    assert counted_layers(layers, (0, 2), 2) == ("layer.0", "layer.1")
    for written in ((2, 2), (-1, 2), (-1,)):
        assert counted_layers(layers, written, 2) == tuple(layers)
    assert counted_layers(layers, (2,), 1) == tuple(layers)
    # a convolution between layers is one of them
    mixed = {"layer.0": False, "conv.0": True}
    assert counted_layers(mixed, (1, 0), 2) == tuple(mixed)
    with pytest.raises(ConfigError, match=r"places 3 layers, the model has 4"):
        ipu_config_of_plan(_plan(), IPUConfig(layers_per_ipu=(1, 2)))
