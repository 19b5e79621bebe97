"""The published placement of LXMERT: embeddings | language | vision | cross-modality."""

import pytest
import torch
import transformers

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig, find_config
from ipu_pipeline.capture.from_config import from_config

ENCODER = "lxmert.encoder"


def expected(language, vision, cross):
    return [
        ["lxmert.embeddings", f"{ENCODER}.visn_fc"],
        [f"{ENCODER}.layer.{i}" for i in range(language)],
        [f"{ENCODER}.r_layers.{i}" for i in range(vision)],
        [
            *(f"{ENCODER}.x_layers.{i}" for i in range(cross)),
            "lxmert.pooler",
            "answer_head",
            "loss",
        ],
    ]


@pytest.fixture
def placement(example):
    return example("vqa_placement")


@pytest.mark.parametrize("machine", ["local", "pod16"])
def test_the_base_model_is_placed_as_published(placement, machine):
    config = transformers.LxmertConfig()
    model, batch = from_config(
        config, "visual-question-answering", batch_size=1, seq_length=20, device="meta"
    )
    published = find_config("Graphcore/lxmert-base-ipu").for_pod("pod16")
    placed = placement.with_published_placement(published, config)
    assert placed.layers_per_ipu == (0, 9, 5, 5)
    replicas = placed.replicas() if machine == "pod16" else 1
    plan = ipp.plan(
        model,
        batch,
        machine=machine,
        replicas=replicas,
        config=placed,
        constraints=placement.in_execution_order(placed, machine),
    )
    assert [list(stage.blocks) for stage in plan.stages] == expected(9, 5, 5)
    assert plan.replicas == (4 if machine == "pod16" else 1)
    assert plan.num_microbatches == 8  # the configuration names none


def test_equal_counts_are_not_swapped(placement):
    config = transformers.LxmertConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=2, num_qa_labels=3,
        l_layers=2, r_layers=2, x_layers=1, visual_feat_dim=4, vocab_size=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model, batch = from_config(
            config, "visual-question-answering", batch_size=1, seq_length=4, device="meta"
        )
    placed = placement.with_published_placement(IPUConfig(ipus_per_replica=4), config)
    limits = placement.in_execution_order(placed, "local")
    plan = ipp.plan(model, batch, microbatches=2, config=placed, constraints=limits)
    assert [list(stage.blocks) for stage in plan.stages] == expected(2, 2, 1)


@pytest.mark.parametrize(
    "given",
    [None, IPUConfig(), IPUConfig(ipus_per_replica=2), IPUConfig(layers_per_ipu=(5, 5, 5, 4))],
)
def test_other_configurations_stay_as_they_are(placement, given):
    assert placement.with_published_placement(given, transformers.LxmertConfig()) is given


def test_only_counts_on_a_machine_that_may_reorder_need_the_order(placement):
    counted = IPUConfig(layers_per_ipu=(0, 9, 5, 5))
    assert placement.in_execution_order(counted, "local").execution_order
    assert placement.in_execution_order(counted, "pod16") is None
    assert placement.in_execution_order(IPUConfig(), "local") is None
    assert placement.in_execution_order(None, "local") is None
