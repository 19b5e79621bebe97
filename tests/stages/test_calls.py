"""Calls of the model's own methods: what they refuse, and what one process computes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import set_seed

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError
from tests.backends.local.helpers import planned
from tests.tiny_models import TINY
from tests.train.eager_executable import EagerExecutable, tiny_bert

LENGTHS = {"max_new_tokens": 5, "do_sample": True}


def test_one_process_generates_what_the_model_generates() -> None:
    """Also between training steps, whose mode stays; every batch of several as if it were alone."""
    model, batch = TINY["gpt2-lm"].build(batch_size=4, dropout=True)
    ids = batch["input_ids"]
    plan = planned("gpt2-lm", dropout=True, num_stages=2, microbatches=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ipp.compile(model, plan, optimizer=optimizer, loss_weights="samples") as made:
        made.train_step(batch)
        alone = copy.deepcopy(model).eval()
        set_seed(3)
        found = made.generate_parts([{"input_ids": ids[:1]}, {"input_ids": ids[1:]}], **LENGTHS)
        for tokens, part in zip(found, (ids[:1], ids[1:]), strict=True):
            set_seed(3)
            assert torch.equal(tokens, alone.generate(input_ids=part, **LENGTHS))
        assert torch.equal(made.forward(ids[:, :7]).logits, alone(ids[:, :7]).logits)
        assert model.training
        assert sum(made.kv_cache_bytes(1, 8)) == 4 * (2 * 8 * 32 * 4)  # layers, keys and values
        made.train_step(batch)
    with pytest.raises(LoweringError, match="cannot run: it was closed; compile the model again"):
        made.generate(ids)


def test_a_model_that_does_not_generate_is_refused() -> None:
    model, _ = TINY["bert-qa"].build(dropout=True)
    with (
        ipp.compile(model, planned("bert-qa", dropout=True, num_stages=2)) as made,
        pytest.raises(LoweringError, match=r"BertForQuestionAnswering does not generate: .* use a"),
    ):
        made.generate(torch.ones(1, 4, dtype=torch.long))


def test_a_target_of_fixed_shapes_says_what_to_do() -> None:
    made = EagerExecutable(tiny_bert(), None)
    with pytest.raises(LoweringError, match=r"those of forward change .* target='local', or use"):
        made.forward(input_ids=torch.ones(1, 4, dtype=torch.long))
