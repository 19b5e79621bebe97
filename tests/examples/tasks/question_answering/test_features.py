"""Sliding windows: static shapes, labels that give the answer back, full cover of the context."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.question_answering import Answer, SquadExample, build_features

LENGTH, STRIDE = 32, 8
FILLER = "the house was built in rain and snow. "


def example(context, answer, question="when was it born", identifier="q"):
    return SquadExample(identifier, question, context, (Answer(answer, context.index(answer)),))


def text_of(data, row, first, last):
    """Return the context between two tokens of a row."""
    window = data.windows[row]
    offsets = window.offsets_C2
    context = data.examples[window.example].context
    return context[offsets[first - window.first, 0] : offsets[last - window.first, 1]]


def labels(data):
    start, end = data.tensors["start_positions"], data.tensors["end_positions"]
    return list(zip(start.tolist(), end.tolist(), strict=True))


def test_every_column_has_one_static_shape(tokenizer):
    data = build_features(
        [example("born in 1887.", "1887"), example(FILLER * 3 + "1999", "1999")],
        tokenizer,
        max_seq_length=LENGTH,
        doc_stride=STRIDE,
    )
    names = {"input_ids", "attention_mask", "start_positions", "end_positions"}
    has_types = "token_type_ids" in tokenizer.model_input_names
    assert set(data.tensors) == names | ({"token_type_ids"} if has_types else set())
    for name, column in data.tensors.items():
        assert column.dtype == torch.int64
        assert column.shape == ((len(data),) if "positions" in name else (len(data), LENGTH))
    assert len(data) == len(data.windows) > 2
    assert data[1]["input_ids"].equal(data.tensors["input_ids"][1])
    assert data[0]["start_positions"].shape == ()


def test_labels_give_the_answer_back(tokenizer):
    data = build_features(
        [example("Zoe was born in 1887, in Bern.", "1887")],
        tokenizer,
        max_seq_length=LENGTH,
        doc_stride=STRIDE,
    )
    ((start, end),) = labels(data)
    assert text_of(data, 0, start, end) == "1887"
    assert end == start + 3  # one token per digit


def test_windows_without_the_whole_answer_are_labelled_cls(bert_tokenizer):
    context = FILLER * 4 + "born in 1887 " + FILLER * 4
    data = build_features(
        [example(context, "1887")], bert_tokenizer, max_seq_length=LENGTH, doc_stride=STRIDE
    )
    inside = [i for i, label in enumerate(labels(data)) if label != (0, 0)]
    assert 1 <= len(inside) < len(data)
    assert all(text_of(data, i, *labels(data)[i]) == "1887" for i in inside)
    assert (data.tensors["input_ids"][:, 0] == bert_tokenizer.cls_token_id).all()


def test_an_answer_cut_in_two_is_labelled_cls(bert_tokenizer):
    # 25 context tokens fit: the answer's first half ends the first window.
    context = "in " * 23 + "abcd"
    data = build_features(
        [example(context, "abcd", question="in")],
        bert_tokenizer,
        max_seq_length=29,
        doc_stride=0,
    )
    assert [len(w.offsets_C2) for w in data.windows] == [25, 2]
    assert labels(data) == [(0, 0), (0, 0)]


def test_an_answer_that_ends_inside_a_token_gets_that_token(bert_tokenizer):
    data = build_features(
        [example("it was builting", "buil")], bert_tokenizer, max_seq_length=24, doc_stride=2
    )
    ((start, end),) = labels(data)
    assert text_of(data, 0, start, end).startswith("buil")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["the", "in", "born", "x1", "yz", "1887"]), min_size=1, max_size=60),
    st.integers(0, 8),
    st.data(),
)
def test_windows_cover_the_context_and_overlap_by_the_stride(bert_tokenizer, words, stride, data):
    answer = data.draw(st.sampled_from(words))
    features = build_features(
        [example(" ".join(words), answer)], bert_tokenizer, max_seq_length=24, doc_stride=stride
    )
    all_tokens = bert_tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    seen: list[int] = []
    for row, window in enumerate(features.windows):
        ids = features.tensors["input_ids"][row, window.first : window.stop].tolist()
        seen = seen + (ids[stride:] if row else ids)
    assert seen == all_tokens
    for row, label in enumerate(labels(features)):
        if label != (0, 0):
            assert text_of(features, row, *label) == answer


def test_examples_keep_their_order_over_several_calls(bert_tokenizer, monkeypatch):
    monkeypatch.setattr("tasks.question_answering.features.EXAMPLES_PER_CALL", 2)
    examples = [example(FILLER * (1 + i % 2) + str(i), str(i)) for i in range(5)]
    data = build_features(examples, bert_tokenizer, max_seq_length=LENGTH, doc_stride=STRIDE)
    assert [w.example for w in data.windows] == [0, 1, 1, 2, 3, 3, 4]
    assert data.examples == tuple(examples)


def test_question_white_space_takes_no_room(bert_tokenizer):
    padded = example("in 1887", "1887", question="   " * 50 + "when")
    data = build_features([padded], bert_tokenizer, max_seq_length=LENGTH, doc_stride=STRIDE)
    plain = example("in 1887", "1887", question="when")
    same = build_features([plain], bert_tokenizer, max_seq_length=LENGTH, doc_stride=STRIDE)
    assert data.tensors["input_ids"].equal(same.tensors["input_ids"])


def test_refuses_no_examples(bert_tokenizer):
    with pytest.raises(ValueError, match="there is no example to tokenise"):
        build_features([], bert_tokenizer)


def test_refuses_a_slow_tokenizer():
    with pytest.raises(ValueError, match="object is not a fast tokenizer"):
        build_features([example("in 1887", "1887")], object())


def test_refuses_a_length_that_the_model_cannot_take(bert_tokenizer):
    with pytest.raises(ValueError, match="max_seq_length 65 exceeds the 64 tokens"):
        build_features([example("in 1887", "1887")], bert_tokenizer, max_seq_length=65)


def test_refuses_a_question_that_leaves_no_room(bert_tokenizer):
    long = example("in 1887", "1887", question="when " * 20, identifier="q7")
    message = r"leaves 9 tokens for the context of question 'q7' \(20 tokens\), .* doc_stride 9"
    with pytest.raises(ValueError, match=message):
        build_features([long], bert_tokenizer, max_seq_length=LENGTH, doc_stride=9)
