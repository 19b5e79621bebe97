"""VQA accuracy on cases counted by hand."""

import pytest

from tasks.visual_question_answering import agreement, score_answers


def test_three_people_who_agree_are_enough():
    given = ["red"] * 7 + ["blue"] * 2 + ["teal"]
    assert agreement(given) == pytest.approx({"red": 1.0, "blue": 2 / 3, "teal": 1 / 3})
    assert agreement([]) == {}


def test_the_mean_weight_of_the_chosen_answers():
    weights = [{0: 1.0, 1: 0.6}, {1: 0.3}, {2: 1.0}, {}]
    scores = score_answers(weights, [1, 1, 0, 2])
    assert scores.accuracy == pytest.approx(100 * 0.9 / 4)
    assert scores.constant_accuracy == pytest.approx(100 * 1.0 / 4)  # always answer 0, or 2
    assert scores.total == 4


def test_hard_labels_give_plain_accuracy():
    scores = score_answers([{0: 1.0}, {1: 1.0}, {1: 1.0}], [0, 1, 0])
    assert scores.accuracy == pytest.approx(200 / 3)
    assert scores.constant_accuracy == pytest.approx(200 / 3)


@pytest.mark.parametrize(("weights", "chosen"), [([], []), ([{0: 1.0}], []), ([{0: 1.0}], [0, 1])])
def test_refuses_other_numbers_of_answers(weights, chosen):
    message = rf"{len(chosen)} chosen answers for {len(weights)} questions; choose one for each"
    with pytest.raises(ValueError, match=message):
        score_answers(weights, chosen)
