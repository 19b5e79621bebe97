"""Scores by hand, and baselines that are what they say."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from tasks import scores
from tasks.features import EncodedDataset, Setup
from tasks.table import TASKS
from tests.examples.tasks.tiny import build, make_tokenizer

NO = -100


def setup_for(name, labels=(), **more):
    return Setup(make_tokenizer(), TASKS[name].options(max_seq_length=16), labels, **more)


def test_classes():
    logits = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [9.0, 1.0, 2.0]])
    batch = {"labels": torch.tensor([1, 0, 0, 0])}
    measured = scores.measure_classes({"logits": logits}, batch)
    assert measured["predictions"].tolist() == [1, 0, 1, 0]
    found = scores.class_scores(measured, setup_for("sequence-classification", ("a", "b", "c")))
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx((0.8 + 2 / 3) / 2)  # class c does not occur
    assert scores.choice_scores(measured, setup_for("multiple-choice")) == {"accuracy": 0.75}


def test_entities_count_where_there_is_a_label():
    labels = torch.tensor([[NO, 2, 0, NO, NO], [NO, 0, 1, 2, NO]])
    guessed = torch.tensor([[0, 2, 0, 1, 1], [0, 0, 2, 2, 2]])
    setup = setup_for("token-classification", ("B-X", "I-X", "O"))
    found = scores.entity_scores({"predictions": guessed, "labels": labels}, setup)
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.8}


def test_hidden_tokens_weigh_the_same_in_every_row():
    logits = torch.randn(2, 3, 7)
    labels = torch.tensor([[NO, 1, 2], [NO, 3, NO]])
    measured = scores.measure_hidden({"logits": logits}, {"labels": labels})
    assert measured["hidden"].tolist() == [2, 1]
    found = scores.hidden_scores(measured, setup_for("masked-lm"))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert found["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-5)
    sure = scores.measure_hidden(
        {"prediction_logits": 9.0 * one_hot(labels.clamp(min=0), 7)}, {"labels": labels}
    )
    assert scores.hidden_scores(sure, setup_for("masked-lm"))["accuracy"] == 1.0


def test_a_hopeless_perplexity_is_still_a_number():
    measured = {"hidden": torch.ones(1), "guessed": torch.zeros(1), "surprise": torch.tensor([1e6])}
    assert math.isfinite(scores.hidden_scores(measured, setup_for("masked-lm"))["perplexity"])


@pytest.mark.parametrize("label", ["next_sentence_label", "sentence_order_label"])
@pytest.mark.parametrize("logits", ["seq_relationship_logits", "sop_logits"])
def test_pairs(label, logits):
    outputs = {
        "prediction_logits": torch.zeros(2, 3, 8),
        logits: torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
    }
    batch = {"labels": torch.tensor([[NO, 1, 2], [NO, 3, NO]]), label: torch.tensor([0, 1])}
    measured = scores.measure_pairs(outputs, batch)
    found = scores.pair_scores(measured, setup_for("pretraining", pair_label=label))
    assert found["pair_accuracy"] == 0.5
    assert found["perplexity"] == pytest.approx(8)


# ---------------------------------------------------------------- baselines


def test_the_most_frequent_class_and_choice():
    train = EncodedDataset({"input_ids": [[[1], [2]]] * 3, "labels": [1, 0, 1]})
    batch = {"labels": torch.tensor([0, 0, 1, 1])}
    for fit, name, labels in (
        (scores.most_frequent_class, "sequence-classification", ("a", "b")),
        (scores.most_frequent_choice, "multiple-choice", ()),
    ):
        logits = fit(train, setup_for(name, labels))(batch)["logits"]
        assert logits.shape == (4, 2)
        assert logits.argmax(dim=-1).tolist() == [1, 1, 1, 1]


def test_the_tag_that_a_token_most_often_has():
    train = EncodedDataset(
        {
            "input_ids": [[2, 5, 6, 3], [2, 5, 7, 3], [2, 5, 7, 3]],
            "labels": [[NO, 1, 0, NO], [NO, 0, 2, NO], [NO, 1, 2, NO]],
        }
    )
    setup = setup_for("token-classification", ("B-X", "I-X", "O"))
    batch = {"input_ids": torch.tensor([[5, 6, 7, 9]])}
    logits = scores.most_frequent_tag(train, setup)(batch)["logits"]
    guessed = logits.argmax(dim=-1).tolist()[0]
    assert guessed[:3] == [1, 0, 2]
    assert guessed[3] in (0, 1, 2)
    assert logits[0, 3].tolist() == pytest.approx([2 / 7, 2 / 7, 2 / 7])


def test_how_often_tokens_occur():
    train = EncodedDataset({"input_ids": [[2, 5, 5, 6, 3, 0]], "attention_mask": [[1] * 5 + [0]]})
    predict = scores.most_frequent_token(train, setup_for("masked-lm"))
    logits = predict({"labels": torch.full((2, 6), NO)})["logits"]
    size = len(make_tokenizer())
    assert logits.shape == (2, 6, size)
    shares = logits[1, 3].exp()
    assert shares.sum().item() == pytest.approx(1)
    assert shares[[5, 6, 7, 2]].tolist() == pytest.approx([n / (3 + size) for n in (3, 2, 1, 1)])


@pytest.mark.parametrize("name", TASKS)
def test_a_baseline_answers_as_the_model_does(name):
    tiny = build(name, num_hidden_layers=1)
    batch = tiny.batch(6)
    answer = tiny.task.fit_baseline(tiny.train, tiny.setup)(batch)
    outputs = {k: v for k, v in tiny.model(**batch).items() if k in answer}
    assert {k: v.shape for k, v in answer.items()} == {k: v.shape for k, v in outputs.items()}
    for given in (answer, outputs):
        measured = tiny.task.measure(given, batch)
        assert {len(column) for column in measured.values()} == {6}
        found = tiny.task.metrics(measured, tiny.setup)
        assert tiny.task.main_metric in found
        assert all(math.isfinite(value) for value in found.values())
