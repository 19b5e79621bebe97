"""Answer selection: exact over all spans, merged over windows, written as JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipu_pipeline.errors import PipelineError
from tasks.question_answering import (
    SquadExample,
    Window,
    build_features,
    select_answers,
    write_predictions,
)

CONTEXT = "ab cd ef gh ij kl"
WORD_OFFSETS = np.array([[3 * i, 3 * i + 2] for i in range(6)])


def example(identifier="q"):
    return SquadExample(identifier, "which?", CONTEXT, ())


def window(first_word, count, first=2, index=0):
    return Window(index, first, WORD_OFFSETS[first_word : first_word + count])


def logits(length, **at):
    row = np.full(length, -5.0)
    for position, value in at.items():
        row[int(position[1:])] = value
    return row


def test_takes_the_best_span_of_context_tokens():
    start, end = logits(10, t0=99, t3=4, t5=2), logits(10, t0=99, t9=99, t4=3, t2=50)
    found = select_answers([example()], [window(0, 6)], [start], [end])["q"]
    best = found[0]
    # Token 0 is no context; token 9 is padding; an end at token 2 lies before the start at 3 but
    # makes a one-token span of its own, of 45.
    assert (best.text, best.start, best.stop) == ("ab", 0, 2)
    assert found[1].text == "cd ef"
    assert found[1].score == pytest.approx(7)


def test_respects_the_longest_answer():
    start, end = logits(8, t2=9), logits(8, t7=9)
    (long,) = select_answers([example()], [window(0, 6)], [start], [end], n_best_size=1)["q"]
    assert long.text == CONTEXT
    short = select_answers([example()], [window(0, 6)], [start], [end], max_answer_length=2)["q"]
    assert all(c.text.count(" ") <= 1 for c in short)


def test_a_span_seen_in_two_windows_counts_once_with_its_best_score():
    windows = [window(0, 4), window(2, 4)]
    starts, ends = [logits(6, t4=1), logits(6, t2=3)], [logits(6, t4=1), logits(6, t2=3)]
    found = select_answers([example()], windows, starts, ends)["q"]
    spans = [(c.start, c.stop) for c in found]
    assert len(set(spans)) == len(spans)
    assert found[0].text == "ef"
    assert found[0].score == pytest.approx(6)


def test_probabilities_are_a_softmax_of_the_kept_candidates():
    start, end = logits(8, t2=2, t3=1), logits(8, t2=2, t3=1)
    found = select_answers([example()], [window(0, 6)], [start], [end], n_best_size=3)["q"]
    assert len(found) == 3
    assert sum(c.probability for c in found) == pytest.approx(1)
    ratio = found[0].probability / found[1].probability
    assert ratio == pytest.approx(math.exp(found[0].score - found[1].score))


def test_huge_logits_do_not_overflow():
    start = end = logits(8, t2=1e6)
    assert select_answers([example()], [window(0, 6)], [start], [end])["q"][0].probability == 1


def test_each_example_gets_its_own_windows():
    examples = [example("a"), example("b")]
    windows = [window(0, 6, index=0), window(0, 6, index=1)]
    rows = [logits(8, t2=5), logits(8, t7=5)]
    found = select_answers(examples, windows, rows, rows)
    assert {name: candidates[0].text for name, candidates in found.items()} == {
        "a": "ab",
        "b": "kl",
    }


scores = st.lists(st.integers(-20, 20), min_size=8, max_size=8)


@given(st.lists(scores, min_size=4, max_size=4), st.integers(1, 6), st.integers(1, 30))
def test_equals_brute_force(rows, longest, n_best):
    """Compare with every span of both windows, one by one."""
    starts, ends = np.array(rows[:2], float), np.array(rows[2:], float)
    windows = [window(0, 4), window(1, 5)]
    best: dict[tuple[int, int], float] = {}
    for row, w in enumerate(windows):
        for i in range(len(w.offsets_C2)):
            for j in range(i, min(i + longest, len(w.offsets_C2))):
                span = int(w.offsets_C2[i, 0]), int(w.offsets_C2[j, 1])
                score = starts[row, w.first + i] + ends[row, w.first + j]
                best[span] = max(score, best.get(span, -math.inf))
    found = select_answers(
        [example()], windows, starts, ends, n_best_size=n_best, max_answer_length=longest
    )["q"]
    assert [c.score for c in found] == sorted(best.values(), reverse=True)[:n_best]
    assert all(best[c.start, c.stop] == c.score for c in found)
    assert all(c.text == CONTEXT[c.start : c.stop] for c in found)


def test_labels_as_logits_give_the_gold_answer(tokenizer):
    """Features and post-processing are inverse to each other."""
    from tasks.question_answering import Answer

    context = "the house was built in rain and snow. " * 3 + "Zoe was born in 1887."
    gold = SquadExample("q", "when", context, (Answer("1887", context.index("1887")),))
    data = build_features([gold], tokenizer, max_seq_length=32, doc_stride=8)
    starts, ends = np.zeros((len(data), 32)), np.zeros((len(data), 32))
    for row in range(len(data)):
        starts[row, data.tensors["start_positions"][row]] += 5
        ends[row, data.tensors["end_positions"][row]] += 5
    found = select_answers(data.examples, data.windows, starts, ends)["q"]
    expected = "1887" if tokenizer.cls_token_id is not None else None
    assert expected is None or found[0].text == expected
    assert "1887" in [c.text for c in found]


def test_refuses_wrong_sizes():
    rows = [logits(8)]
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 30"):
        select_answers([example()], [window(0, 6)], rows, rows, n_best_size=0)
    with pytest.raises(ValueError, match="must be at least 1, got 20 and 0"):
        select_answers([example()], [window(0, 6)], rows, rows, max_answer_length=0)


def test_refuses_logits_of_another_shape():
    with pytest.raises(ValueError, match=r"logits have shape \(2, 8\) for 1 windows"):
        select_answers([example()], [window(0, 6)], np.zeros((2, 8)), np.zeros((2, 8)))
    with pytest.raises(
        ValueError, match="logits cover 7 tokens, a window has context up to token 8"
    ):
        select_answers([example()], [window(0, 6)], np.zeros((1, 7)), np.zeros((1, 7)))


def test_refuses_an_example_without_a_window():
    with pytest.raises(ValueError, match="question 'b' has no window with context tokens"):
        select_answers([example("a"), example("b")], [window(0, 6)], [logits(8)], [logits(8)])
    with pytest.raises(ValueError, match="question 'q' has no window with context tokens"):
        select_answers([example()], [window(0, 0)], [logits(8)], [logits(8)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_logits_that_are_not_finite(value):
    rows = [logits(8), logits(8, t3=value)]
    with pytest.raises(PipelineError, match="logits of window 1 are not finite; the model has div"):
        select_answers([example()], [window(0, 6)] * 2, rows, rows)


def test_writes_predictions_and_runners_up(tmp_path):
    row = logits(8, t3=5)
    answers = select_answers([example("é")], [window(0, 6)], [row], [row], n_best_size=2)
    best, every = write_predictions(tmp_path / "out", answers)
    assert best.name == "predictions.json"
    assert every.name == "nbest_predictions.json"
    assert json.loads(best.read_text(encoding="utf-8")) == {"é": "cd"}
    (first, second) = json.loads(every.read_text(encoding="utf-8"))["é"]
    assert first["text"] == "cd"
    assert first["probability"] > second["probability"]
    assert set(first) == {"text", "probability", "start_logit", "end_logit", "start", "stop"}
