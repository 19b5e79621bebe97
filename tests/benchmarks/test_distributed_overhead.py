"""What the benchmarks of the distributed target compare is the same."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from benchmarks.distributed_overhead import make_batch
from benchmarks.processes import ratio, rotations
from benchmarks.raw_pipeline import RawStage, qa_loss

CONFIG = BertConfig(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def test_stages_written_by_hand_compute_what_the_model_computes() -> None:
    model = BertForQuestionAnswering(CONFIG)
    batch = make_batch(CONFIG, 4, 16)
    blocks = [["bert.embeddings", "bert.encoder.layer.0"], ["bert.encoder.layer.1", "qa_outputs"]]
    x = batch["input_ids"]
    for names in blocks:
        x = RawStage(model, names)(x, batch["attention_mask"], batch["token_type_ids"])
    target = torch.stack([batch["start_positions"], batch["end_positions"]], 1)
    with torch.no_grad():
        expected = model(**batch).loss.item() / 4
        assert qa_loss(x, target, 0.25).item() == pytest.approx(expected)


def test_stages_under_autocast_hand_on_what_they_compute_in() -> None:
    model = BertForQuestionAnswering(CONFIG)
    batch = make_batch(CONFIG, 2, 16)
    stage = RawStage(model, ["bert.embeddings", "bert.encoder.layer.0"], torch.bfloat16)
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    assert stage(*inputs).dtype == torch.bfloat16


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == {"low": 2.0, "median": 2.0, "high": 2.5}
    assert ratio([3.0], [2.0]) == {"low": 1.5, "median": 1.5, "high": 1.5}


def test_every_round_begins_with_another_contestant() -> None:
    assert list(rotations("abc", 4)) == [["b", "c", "a"], ["c", "a", "b"], list("abc"), list("bca")]
