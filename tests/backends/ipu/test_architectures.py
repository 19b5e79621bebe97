"""Acceptance: every architecture, without code of its own, lands where its plan says."""

from __future__ import annotations

import pytest

from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.errors import CaptureError
from tests.backends.ipu.emulated import ALL, adamw, assert_same_weights, case, sessions_of
from tests.later import now

pytestmark = pytest.mark.usefixtures("poptorch")
LAYERS = {"lxmert-qa": (-1, -1), "convnext": (2, 3)}


# An encoder, a decoder with its encoder, and CTC; two streams, experts and convolutions later.
KINDS = ("bert-qa", "t5", "wav2vec2-ctc")


@pytest.mark.parametrize("name", now(KINDS, ALL))
def test_trains_where_the_plan_says(name: str) -> None:
    made = case(name, layers=LAYERS.get(name, (2, 2)), gradient_accumulation_steps=9)
    with made.local(adamw) as local:
        device = made.compile(adamw)
        batches = [made.batch(seed) for seed in range(2)]
        losses = [device.train_step(batch).loss for batch in batches]
        expected = [local.train_step(batch).loss for batch in batches]
        program = sessions_of(device).training.program
        device.close()
        assert losses == pytest.approx(expected, rel=1e-6)
        assert_same_weights(made.model, local.model)
    names = {id(parameter): name for name, parameter in made.model.named_parameters()}
    planned = {
        names[id(parameter)]: [annotation.ipu]
        for annotation in annotate(made.plan)
        if annotation.begins
        for parameter in made.model.get_submodule(annotation.module).parameters()
    }
    placed = program.ipus_of_variables()
    assert {n: ipus for n, ipus in placed.items() if n in planned} == {
        n: ipus for n, ipus in planned.items() if n in placed
    }
    assert len(planned.keys() & placed.keys()) > len(names) / 2
    devices = [block.ipu for block in program.blocks if block.id]
    assert [d for d, before in zip(devices, [None, *devices], strict=False) if d != before] == [
        stage.device for stage in made.plan.stages
    ]


def test_spec_augment_draws_on_the_host_and_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"SpecAugment draws its masks so: set mask_time_prob=0"):
        case("hubert", changes={"apply_spec_augment": True}, gradient_accumulation_steps=16)


def test_the_convolutions_of_a_speech_model_are_not_counted() -> None:
    plan = case("hubert", layers=(0, 4), gradient_accumulation_steps=4).plan
    on_first = plan.stages[0].blocks
    assert "hubert.feature_extractor.conv_layers.1" in on_first
    assert not any(name.startswith("hubert.encoder.layers.") for name in on_first)
