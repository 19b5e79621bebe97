"""Every refusal before lowering, by its message; and the notes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.check import check, is_power_of_two, merged_stages, notes
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.settings import (
    OptimizerSettings,
    PopTorchSettings,
    settings_for,
)
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.errors import LoweringError, PartitionError
from ipu_pipeline.ir.plan import Plan, PlannedStage, VocabularyRows
from tests.tiny_models import TINY


@cache
def _plan(name: str = "bert-qa") -> Plan:
    model, batch = TINY[name].build(device="meta")
    config = IPUConfig(layers_per_ipu=(2, 2), gradient_accumulation_steps=8)
    return ipp.plan(model, batch, machine="pod16", config=config)


def _stages(plan: Plan, *stages: PlannedStage) -> Plan:
    return replace(plan, stages=stages)


def _refused(message: str, plan: Plan, settings: PopTorchSettings | None = None) -> None:
    with pytest.raises(LoweringError, match=message):
        check(plan, settings or settings_for(_plan()))


def _with(**config: Any) -> PopTorchSettings:
    return replace(settings_for(_plan()), config=replace(settings_for(_plan()).config, **config))


def test_a_plan_that_poptorch_takes() -> None:
    check(_plan(), settings_for(_plan()))


def test_a_plan_for_another_machine() -> None:
    model, batch = TINY["bert-qa"].build(device="meta")
    plan = replace(ipp.plan(model, batch, num_stages=2), schedule="popart")
    _refused(r"plan is for .*, whose devices are no IPUs; make it with machine='pod16'", plan)


def test_another_schedule() -> None:
    _refused(r"schedule is '1f1b', IPUs run 'popart'", replace(_plan(), schedule="1f1b"))


def test_too_few_microbatches() -> None:
    _refused(
        r"gradient accumulation 2 is below 3 = 2 x 2 forward stages - 1",
        replace(_plan(), num_microbatches=2),
    )


def test_neighbours_on_one_ipu_are_one_stage() -> None:
    first, second = _plan().stages
    assert merged_stages(_stages(_plan(), first, replace(second, device=0))) == 1
    one = replace(_stages(_plan(), first, replace(second, device=0)), num_microbatches=1)
    check(one, settings_for(one))


def test_too_many_ipus() -> None:
    _refused(
        r"33 replicas of 2 IPUs are 66, one process has at most 64", replace(_plan(), replicas=33)
    )


def test_an_ipu_without_a_stage() -> None:
    first, second = _plan().stages
    _refused(
        r"IPU 1 has no stage although IPU 2 has one; number the IPUs of a replica from 0",
        _stages(_plan(), first, replace(second, device=2)),
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"inference_layers_per_ipu": (1, 1, 2), "inference_replication_factor": 22},
            r"inference: 22 replicas of 3 IPUs are 66, .*; lower inference_replication_factor",
        ),
        (
            {"inference_layers_per_ipu": (2, 0, 2)},
            r"inference: IPU 1 has no block; lower inference_ipus_per_replica, or give",
        ),
        (
            {"inference_layers_per_ipu": (4,), "inference_embedding_serialization_factor": 5},
            r"inference: block 'bert.embeddings' is to run in 5 slices, but its table has 4098",
        ),
    ],
)
def test_another_placement_for_evaluation(config: dict[str, Any], message: str) -> None:
    tiny = TINY["bert-qa"]
    model, batch = from_config(tiny.config(vocab_size=4098), tiny.task, batch_size=2, seq_length=16)
    said = IPUConfig(layers_per_ipu=(2, 2), gradient_accumulation_steps=8, **config)
    with pytest.raises(PartitionError, match=message):
        ipp.plan(model, batch, machine="pod16", config=said)
    plan = ipp.plan(model, batch, machine="pod16", num_stages=2, microbatches=8)
    _refused(message, plan, settings_for(plan, replace(said, layers_per_ipu=(-1,))))


def test_a_placement_for_evaluation_that_does_not_fit() -> None:
    settings = settings_for(_plan(), IPUConfig(
        layers_per_ipu=(2, 2), gradient_accumulation_steps=8, inference_layers_per_ipu=(4,)
    ))  # fmt: skip
    assert settings.inference is not None
    small = replace(settings.inference.chip, tile_memory_bytes=1000)
    tight = replace(settings, inference=replace(settings.inference, chip=small))
    message = r"inference: the fullest tile of IPU 0 needs .*; move layers to other IPUs in inf"
    _refused(message, _plan(), tight)


def test_a_tied_weight_on_two_ipus() -> None:
    plan = _plan("bert-mlm")
    first, second, head = plan.stages
    moved = _stages(plan, first, replace(second, blocks=(*second.blocks, *head.blocks)))
    _refused(
        r"a weight may be used on one IPU only, but .* on IPU 0, cls on IPU 1 share one; put them",
        moved,
    )


def test_slices_that_do_not_divide() -> None:
    first, second = _plan().stages
    _refused(
        r"block 'bert.embeddings' is to run in 4 slices, but its table has 99 rows, which 4 does "
        r"not divide; divisors up to 64: 3, 9, 11, 33; choose one, or pad the table",
        _stages(_plan(), replace(first, serialize={"bert.embeddings": 4}), second),
    )


def test_slices_of_a_tied_head_are_those_of_its_table() -> None:
    plan = _plan("bert-mlm")
    *rest, head = plan.stages
    sliced = _stages(plan, *rest, replace(head, serialize={"cls": 2}))
    _refused(r"block 'cls' is to run in 2 slices, but its table has 99 rows", sliced)
    check(_stages(plan, *rest, replace(head, serialize={"cls": 3})), settings_for(plan))


def test_stages_against_the_order_of_execution() -> None:
    first, second = _plan().stages
    *kept, moved = first.blocks
    plan = _stages(
        _plan(),
        replace(first, blocks=(*kept, second.blocks[0])),
        replace(second, blocks=(moved, *second.blocks[1:])),
    )
    _refused(
        r"block 'bert.encoder.layer.1' of stage 1 runs before 'bert.encoder.layer.2' of an earlier "
        r"stage; poptorch's stages follow the order of execution",
        plan,
    )


@pytest.mark.parametrize("what", ["embedding", "projection"])
def test_a_configuration_that_splits_tables_and_a_plan_that_does_not(what: str) -> None:
    splits = {f"serialized_{what}_splits_per_ipu": (2, 1)}
    with pytest.raises(LoweringError, match=r"splits_per_ipu: plan None, configuration \(2, 1\)"):
        settings_for(_plan(), IPUConfig(layers_per_ipu=(2, 2), **splits))


def test_slices_of_a_table_in_a_stage() -> None:
    first, second = _plan().stages
    _refused(
        r"stage 0 holds the slices 0 to 1 of the table of 'bert.embeddings', but a variable is on",
        _stages(_plan(), replace(first, table_slices={"bert.embeddings": (0, 2)}), second),
    )


def test_device_iterations_with_the_default_output() -> None:
    _refused(
        r"device_iterations 2 with output_mode 'default' gives back the last iteration's loss only",
        _plan(),
        _with(device_iterations=2, output_mode="default"),
    )


def test_automatic_loss_scaling_of_float32() -> None:
    scaling = _with(auto_loss_scaling=True)
    _refused(r"auto_loss_scaling works on float16 gradients", _plan(), scaling)
    check(_plan(), replace(scaling, half=True))


def test_a_memory_proportion_of_nothing() -> None:
    settings = settings_for(_plan())
    config = replace(settings.config)
    object.__setattr__(config, "matmul_proportion", (0.2, 0.0))  # the configuration refuses it, too
    _refused(r"matmul_proportion 0.0 must be above 0", _plan(), replace(settings, config=config))


@pytest.mark.parametrize("name", ["LAMB", "RMSprop"])
def test_clipping_where_the_device_cannot(name: str) -> None:
    optimizer = OptimizerSettings(optimizer=name, max_grad_norm=1.0)
    _refused(
        rf"poptorch's {name} cannot clip gradients \(max_grad_norm 1.0\)",
        _plan(),
        settings_for(_plan(), optimizer=optimizer),
    )


def test_inputs_without_a_batch_axis() -> None:
    _refused(
        r"the plan's inputs have no batch axis",
        replace(_plan(), graph=replace(_plan().graph, inputs=())),
    )


def test_several_reasons_are_all_said() -> None:
    plan = replace(_plan(), num_microbatches=2, replicas=33)
    _refused(r"cannot run this plan, for 2 reasons:\n  - gradient acc.*\n  - 33 replicas", plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (replace(p, replicas=3), _with()), "6 IPUs (3 x 2) are no power of two"),
        (lambda p: (p, _with(output_mode="final")), "gives back the loss of the last of 8"),
    ],
)
def test_notes(change: Callable[[Plan], Any], message: str) -> None:
    plan, settings = change(_plan())
    assert any(message in note for note in notes(plan, settings))
    assert notes(_plan(), _with(output_mode="all")) == ()


def test_powers_of_two() -> None:
    assert [n for n in range(18) if is_power_of_two(n)] == [1, 2, 4, 8, 16]


def test_a_vocabulary_spread_over_stages() -> None:
    plan = replace(_plan(), vocabulary=VocabularyRows(((0, 0, 50), (1, 50, 99))))
    _refused("PopART runs all IPUs of a pipeline in lock step", plan)
    model, batch = TINY["gpt2-lm"].build(device="meta")
    for asked, said in (((1, 1), r"lock step.*plan with vocabulary 'auto'"), ("even", "no table")):
        with pytest.raises(PartitionError, match=said):
            ipp.plan(model, batch, machine="pod4", num_stages=2, vocabulary=asked)


def test_activations_that_wait_in_host_memory() -> None:
    first, *others = _plan().stages
    away = replace(first, offload=(first.blocks[-1],))
    _refused("offloads activations to host memory, which GPUs do", _stages(_plan(), away, *others))
    model, batch = TINY["bert-qa"].build(device="meta")
    with pytest.raises(PartitionError, match=r"which GPUs do; leave it out"):
        ipp.plan(model, batch, machine="pod4", num_stages=2, passes="offload{blocks=all}")
