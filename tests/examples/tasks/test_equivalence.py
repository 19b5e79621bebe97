"""Every task, split over stages: loss and EVERY gradient equal those of the unsplit model."""

from collections.abc import Iterator

import pytest
import torch
import transformers

import ipu_pipeline as ipp
from ipu_pipeline.ops.linear import torchs_products
from tasks.table import TASKS
from tests.examples.tasks.tiny import BERT, build

MICROBATCHES, SIZE = 2, 4
OTHERS = [
    ("sequence-classification", transformers.RobertaConfig, {"max_position_embeddings": 66}),
    ("token-classification", transformers.ElectraConfig, {"embedding_size": 16}),
    ("multiple-choice", transformers.DistilBertConfig, {"n_layers": 4, "dim": 32, "n_heads": 4}),
    ("masked-lm", transformers.DistilBertConfig, {"n_layers": 4, "dim": 32, "n_heads": 4}),
    ("pretraining", transformers.AlbertConfig, {"embedding_size": 16, "num_hidden_groups": 1}),
]
CASES = [(name, BERT, {}, stages) for name in TASKS for stages in (2, 4)]
CASES += [(name, config, changes, 2) for name, config, changes in OTHERS]
DISTILBERT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}


def eager_gradients(model, batch):
    total = 0.0
    for index in range(MICROBATCHES):
        part = {key: value[SIZE * index : SIZE * (index + 1)] for key, value in batch.items()}
        loss = model(**part).loss
        (loss / MICROBATCHES).backward()
        total += loss.item() / MICROBATCHES
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, found


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
    expected_loss, expected = eager_gradients(tiny.model, batch)
    example = {key: value[:SIZE] for key, value in batch.items()}
    plan = ipp.plan(tiny.model, example, num_stages=num_stages, microbatches=MICROBATCHES)
    with ipp.compile(tiny.model, plan, self_check=False) as executable:
        loss = executable.forward_backward(batch)
    found = {n: p.grad for n, p in tiny.model.named_parameters() if p.grad is not None}
    assert plan.num_stages == num_stages
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert set(found) == set(expected)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for fqn, gradient in expected.items():
        torch.testing.assert_close(found[fqn], gradient, rtol=0, atol=1e-6 * scale, msg=fqn)
