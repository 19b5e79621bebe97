"""Every task, split over stages: loss and EVERY gradient equal those of the unsplit model."""

from collections.abc import Iterator

import pytest
import transformers

import ipu_pipeline as ipp
from ipu_pipeline.ops.linear import torchs_products
from tasks.table import TASKS
from tests.backends.local.helpers import assert_equals_eager
from tests.examples.tasks.tiny import BERT, build
from tests.later import every_second

MICROBATCHES, SIZE = 2, 4
OTHERS = [
    ("sequence-classification", transformers.RobertaConfig, {"max_position_embeddings": 66}),
    ("token-classification", transformers.ElectraConfig, {"embedding_size": 16}),
    ("multiple-choice", transformers.DistilBertConfig, {"n_layers": 4, "dim": 32, "n_heads": 4}),
    ("masked-lm", transformers.DistilBertConfig, {"n_layers": 4, "dim": 32, "n_heads": 4}),
    ("pretraining", transformers.AlbertConfig, {"embedding_size": 16, "num_hidden_groups": 1}),
]
CASES = every_second((name, BERT, {}, stages) for stages in (2, 4) for name in TASKS)  # odd
CASES += [(name, config, changes, 2) for name, config, changes in OTHERS]
DISTILBERT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}


@pytest.fixture(autouse=True)
def same_products() -> Iterator[None]:
    """Two libraries round float32 products differently."""
    with torchs_products():
        yield


@pytest.mark.parametrize(("name", "config", "changes", "num_stages"), CASES)
def test_loss_and_every_gradient_equal_the_unsplit_model(name, config, changes, num_stages):
    if config is transformers.DistilBertConfig:
        changes = changes | DISTILBERT
    tiny = build(name, config, **changes)
    batch = tiny.batch(MICROBATCHES * SIZE)
    example = {key: value[:SIZE] for key, value in batch.items()}
    plan = ipp.plan(tiny.model, example, num_stages=num_stages, microbatches=MICROBATCHES)
    assert plan.num_stages == num_stages
    assert_equals_eager(tiny.model, plan, batch)
