"""Exact match and F1 against what transformers' own scorer says (see record_squad_scores.py)."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.question_answering import Answer, SquadExample, metrics
from tasks.question_answering.metrics import best_over_gold, exact_match, f1

RECORDED = json.loads(Path(__file__).with_name("squad_scores.json").read_text(encoding="utf-8"))[
    "cases"
]
words = st.lists(
    st.sampled_from(["the", "a", "cat", "Dog", "New-York", "été", "5,000", ".", "x"]), max_size=6
)
texts = st.one_of(words.map(" ".join), st.text(max_size=20))


def example(identifier, *gold):
    return SquadExample(identifier, "q?", "", tuple(Answer(text, 0) for text in gold))


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: repr(case["prediction"])[:30])
def test_agrees_with_transformers(case):
    assert metrics.normalize_answer(case["prediction"]) == case["normalized"]
    assert best_over_gold(exact_match, case["prediction"], case["gold"]) == case["exact_match"]
    assert best_over_gold(f1, case["prediction"], case["gold"]) == pytest.approx(case["f1"])


def test_the_recorded_cases_are_awkward():
    assert len(RECORDED) > 200
    assert {0, 1} <= {case["exact_match"] for case in RECORDED}
    assert sum(0 < case["f1"] < 1 for case in RECORDED) > 40
    assert sum(case["prediction"].strip() == "" for case in RECORDED) >= 3
    assert sum(len(case["gold"]) > 1 for case in RECORDED) > 100


@given(texts, texts)
def test_scores_are_symmetric_shares_and_exact_implies_full_f1(left, right):
    assert 0 <= f1(left, right) <= 1
    assert f1(left, right) == pytest.approx(f1(right, left))
    assert exact_match(left, right) == exact_match(right, left)
    if exact_match(left, right):
        assert f1(left, right) == 1


@given(texts)
def test_articles_and_trailing_punctuation_do_not_count(text):
    assert exact_match(f"the {text} .!", text) == 1


@given(texts)
def test_normalising_white_space_is_stable(text):
    once = metrics.normalize_answer(text)
    assert once == " ".join(once.split())


@given(texts, st.lists(texts, min_size=1, max_size=4))
def test_another_gold_answer_never_hurts(prediction, gold):
    score = best_over_gold(f1, prediction, gold)
    if any(metrics.normalize_answer(text) for text in gold):
        assert best_over_gold(f1, prediction, [*gold, prediction or "x"]) >= score


def test_mean_over_questions_in_percent():
    examples = [example("a", "red fox", "fox"), example("b", "blue sea"), example("c", "x")]
    scores = metrics.score_predictions(examples, {"a": "Fox!", "b": "sea", "c": "y"})
    assert scores.total == 3
    assert scores.exact_match == pytest.approx(100 / 3)
    assert scores.f1 == pytest.approx((100 + 200 / 3 + 0) / 3)


def test_refuses_a_missing_prediction():
    examples = [example("a", "x"), example("b", "y")]
    with pytest.raises(ValueError, match=r"1 of 2 questions have no prediction \(such as 'b'\)"):
        metrics.score_predictions(examples, {"a": "x"})


def test_refuses_no_examples():
    with pytest.raises(ValueError, match="there is no example to score"):
        metrics.score_predictions([], {})
