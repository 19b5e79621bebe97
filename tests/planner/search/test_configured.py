"""Splits that an IPU configuration spells out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.errors import ConfigError, PartitionError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.verify import verify_plan
from tests.tiny_models import TINY


@cache
def _model(name: str) -> Any:
    return TINY[name].build(device="meta")


def _plan(name: str, layers: tuple[int, ...], **config: Any) -> Plan:
    said = {"gradient_accumulation_steps": 16, **config}
    model, batch = _model(name)
    return ipp.plan(model, batch, machine="pod16", config=IPUConfig(layers_per_ipu=layers, **said))


def _layers(plan: Plan) -> list[int]:
    kinds = {block.name: block.kind for block in plan.blocks}
    return [sum(kinds[n] == "layer" for n in stage.blocks) for stage in plan.stages]


def test_every_layer_is_where_the_configuration_says() -> None:
    plan = _plan("bert-qa", (1, 3))
    assert [stage.device for stage in plan.stages] == [0, 1]
    assert _layers(plan) == [1, 3]
    assert plan.stages[0].blocks[0] == "bert.embeddings"
    assert plan.stages[1].blocks[-2:] == ("qa_outputs", "loss")
    verify_plan(plan)


def test_a_tied_head_is_a_last_stage_on_the_embeddings_ipu() -> None:
    plan = _plan("bert-mlm", (0, 2, 2))
    assert [stage.device for stage in plan.stages] == [0, 1, 2, 0]
    assert plan.stages[-1].blocks[0] == "cls"
    # what an IPU holds is shown once, in its first stage
    assert plan.stages[-1].memory_bytes == 0
    assert all(stage.memory_bytes > 0 for stage in plan.stages[:-1])


def test_a_decoders_embedding_comes_back_to_its_ipu() -> None:
    plan = _plan("bart", (0, 2, 2))
    assert [stage.device for stage in plan.stages] == [0, 1, 0, 2, 0]
    assert any("decoder.embed" in name for name in plan.stages[2].blocks)


def test_it_is_its_own_bound() -> None:
    plan = _plan("bert-qa", (2, 2))
    assert plan.gap == 0.0
    assert plan.schedule == "popart"
    assert plan.objective_s > 0
    assert "IPU 0 paces the pipeline" in plan.binding


def test_slices_and_recomputation_are_those_of_the_configuration() -> None:
    config = TINY["bert-mlm"].config(vocab_size=4098)
    from ipu_pipeline.capture.from_config import from_config

    model, batch = from_config(config, "masked-lm", batch_size=2, seq_length=16)
    said = IPUConfig(
        layers_per_ipu=(2, 2), gradient_accumulation_steps=8, embedding_serialization_factor=3
    )
    plan = ipp.plan(model, batch, machine="pod16", config=said)
    assert plan.stages[0].serialize == {"bert.embeddings": 3}
    assert plan.stages[-1].serialize == {"cls": 3}
    # PopART recomputes every forward stage but the last.
    assert plan.stages[0].recompute == plan.stages[0].blocks
    assert plan.stages[-1].recompute == ()


def test_microbatches_replace_the_configurations() -> None:
    model, batch = _model("bert-qa")
    config = IPUConfig(layers_per_ipu=(2, 2), gradient_accumulation_steps=16)
    plan = ipp.plan(model, batch, machine="pod16", config=config, microbatches=8)
    assert plan.num_microbatches == 8


def test_without_numbers_the_solver_chooses() -> None:
    model, batch = _model("bert-qa")
    config = IPUConfig(ipus_per_replica=2, gradient_accumulation_steps=16)
    plan = ipp.plan(model, batch, machine="pod16", config=config)
    assert sum(_layers(plan)) == 4


def test_what_does_not_fit_is_refused_with_remedies() -> None:
    from ipu_pipeline.capture.from_config import from_config

    config = TINY["bert-qa"].config(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_hidden_layers=8
    )
    model, batch = from_config(config, "question-answering", batch_size=8, seq_length=64)
    said = IPUConfig(layers_per_ipu=(7, 1), gradient_accumulation_steps=16)
    with pytest.raises(
        PartitionError,
        match=r"configuration does not fit: the fullest tile of IPU 0 needs \d+ of 624 KiB; "
        r"move layers to other IPUs in layers_per_ipu",
    ):
        ipp.plan(model, batch, machine="pod16", config=said)


def test_numbers_that_do_not_add_up() -> None:
    with pytest.raises(ConfigError, match=r"places 3 layers, the model has 4"):
        _plan("bert-qa", (1, 2))
