"""Labels in every form; answers by number and by text; what does not fit is refused by name."""

import numpy as np
import pytest
import torch

from ipu_pipeline.errors import DatasetError
from tasks.visual_question_answering import AnswerSet, GivenLabel, Labels, read_label

COLOURS = AnswerSet(("red", "green", "blue"))

FORMS = [
    (2, {2: 1.0}, False),
    (np.int64(2), {2: 1.0}, False),
    ("green", {"green": 1.0}, False),
    ({"ids": [3, 1], "weights": [1.0, 0.3]}, {3: 1.0, 1: 0.3}, True),
    ({"ids": np.array([1]), "weights": np.array([0.6])}, {1: 0.6}, True),
    ({"red": 0.9, "blue": None}, {"red": 0.9}, True),
    ([0.0, 0.25, 1.0], {1: 0.25, 2: 1.0}, True),
    (["red", "red", "blue"], {"red": 2 / 3, "blue": 1 / 3}, True),
    ([], {}, True),
]


@pytest.mark.parametrize(("value", "weights", "soft"), FORMS)
def test_reads_every_form(value, weights, soft):
    label = read_label(value, "row 0")
    assert label.weights == pytest.approx(weights)
    assert label.soft is soft


UNREADABLE = [
    (1.5, r"row 7: a label of float is not understood \(1\.5\); give the answer's number or text"),
    (True, "row 7: a label of bool is not understood"),
    ([{"a": 1}], "row 7: a label of list is not understood"),
    ({"ids": [1, 2], "weights": [1.0]}, "row 7: 2 'ids' but 1 'weights' in the label"),
    ({"red": 1.5}, "row 7: answer 'red' has weight 1.5; weights are between 0 and 1"),
]


@pytest.mark.parametrize(("value", "message"), UNREADABLE)
def test_refuses_what_is_no_label(value, message):
    with pytest.raises(DatasetError, match=message):
        read_label(value, "row 7")


def test_hard_labels_are_numbers():
    given = [read_label("blue", "r"), read_label(0, "r")]
    labels = Labels.of(given, COLOURS, "data")
    assert [labels[0].item(), labels[1].item()] == [2, 0]
    assert labels[0].dtype == torch.int64
    assert (labels.soft, len(labels)) == (False, 2)


def test_soft_labels_are_weights_of_all_answers():
    given = [read_label({"red": 1.0, "blue": 0.5}, "r"), read_label([], "r")]
    labels = Labels.of(given, COLOURS, "data")
    assert labels[0].tolist() == [1.0, 0.0, 0.5]
    assert labels[1].tolist() == [0.0, 0.0, 0.0]
    assert labels.soft


def test_the_answers_of_labels():
    texts = [read_label("no", "r"), read_label(["yes", "a"], "r")]
    assert AnswerSet.of_labels(texts).names == ("a", "no", "yes")
    assert len(AnswerSet.of_labels([read_label(4, "r"), read_label(2, "r")])) == 5
    assert len(AnswerSet.of_labels([read_label([1.0, 0.0, 0.0], "r")])) == 3
    assert len(AnswerSet.of_labels([])) == 0
    assert AnswerSet.numbered(2).names == ("0", "1")


@pytest.mark.parametrize("answer", [3, -1, "pink"])
def test_an_answer_out_of_range_is_refused(answer):
    given = [GivenLabel({0: 1.0}, soft=False), GivenLabel({answer: 1.0}, soft=False)]
    message = (
        rf"data row 1: answer {answer!r} is out of range, the model chooses from 3 answers "
        r"\(\['red', 'green', 'blue'\]\); train with --replace_qa_head"
    )
    with pytest.raises(DatasetError, match=message):
        Labels.of(given, COLOURS, "data")


def test_a_dense_label_of_another_size_is_refused():
    message = "data row 0: the label has 2 weights, the model chooses from 3 answers; train with"
    with pytest.raises(DatasetError, match=message):
        Labels.of([read_label([0.5, 1.0], "r")], COLOURS, "data")


def test_mixed_labels_are_refused():
    given = [read_label(0, "r"), read_label([0.5, 1.0, 0.0], "r")]
    with pytest.raises(DatasetError, match="data mixes hard and soft labels; write all of them"):
        Labels.of(given, COLOURS, "data")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (10**9, "r: answer 1000000000 is out of range; number answers from 0 to 99999"),
        ({"ids": 3, "weights": [1.0]}, "r: 'ids' and 'weights' of a label are lists, got"),
        ({"ids": ["x"], "weights": [1.0]}, "r: 'x' in a label is no number; give one"),
        ({"yes": True}, "r: True in a label is no number; give one"),
    ],
)
def test_labels_that_make_no_sense_are_refused(value, message):
    with pytest.raises(DatasetError, match=message):
        read_label(value, "r")
