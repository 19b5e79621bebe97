"""The demo data: valid SQuAD v1.1, the same bytes for a seed, and no shortcut by position."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest

from tasks.question_answering import read_squad
from tasks.question_answering.metrics import best_over_gold, f1
from tests.examples.conftest import FOLDER

NUM_TRAIN, NUM_VALIDATION = 2000, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    sizes = ["--num_train", str(NUM_TRAIN), "--num_validation", str(NUM_VALIDATION)]
    command = [sys.executable, str(FOLDER / "make_demo_data.py"), "--output_dir", str(folder)]
    subprocess.run([*command, *sizes], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def splits(folder):
    return [read_squad(folder / f"{name}.json") for name in ("train", "validation")]


def test_holds_the_number_of_questions_asked_for(splits):
    train, validation = splits
    assert (len(train), len(validation)) == (NUM_TRAIN, NUM_VALIDATION)


def test_same_seed_same_bytes_other_seed_other_text(folder, example):
    demo = example("make_demo_data")
    written = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    assert written["version"] == "1.1"
    assert demo.make_split("validation", NUM_VALIDATION, 42) == written
    assert demo.make_split("validation", NUM_VALIDATION, 43) != written


def test_the_file_itself_is_deterministic(folder, tmp_path, example):
    example("make_demo_data").main(tmp_path, 42, NUM_TRAIN, NUM_VALIDATION)
    for name in ("train.json", "validation.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_paragraphs_have_three_to_seven_sentences_and_several_subjects(example):
    from random import Random

    demo = example("make_demo_data")
    rng = Random(0)
    written = [demo.write_sentences("train", rng) for _ in range(300)]
    lengths = Counter(len(sentences) for sentences in written)
    assert set(lengths) <= set(range(3, 8))
    assert len(lengths) >= 4
    subjects = Counter(len({f.subject for s in w for f in s.facts}) for w in written)
    assert set(subjects) == {1, 2, 3}
    assert min(subjects.values()) > 20


def test_every_answer_is_unique_in_its_paragraph(splits):
    for examples in splits:
        for question in examples:
            assert question.context.count(question.answers[0].text) == 1, question


def test_validation_asks_about_subjects_that_training_never_names(example):
    from random import Random

    demo, domains = example("make_demo_data"), example("demo_domains_more")
    train, validation = (
        {
            fact.subject.name
            for _ in range(800)
            for sentence in demo.write_sentences(split, rng)
            for fact in sentence.facts
        }
        for split, rng in (("train", Random(1)), ("validation", Random(2)))
    )
    assert len(domains.DOMAINS) == 10
    assert len(train) > 500
    assert len(validation) > 300
    assert not train & validation


def test_some_wordings_are_seen_in_validation_only(splits, example):
    """Look for the words of a template up to its first slot, or behind its last one."""

    def occurring(templates, text):
        pieces = (max(re.split(r"{\w+}", template), key=len) for template in templates)
        return [piece for piece in pieces if piece in text]

    train, validation = (" ".join(f"{e.context} {e.question}" for e in part) for part in splits)
    domains = example("demo_domains_more").DOMAINS
    unseen = [text for domain in domains for text in domain.unseen_statements]
    common = [text for domain in domains for text in domain.statements]
    assert len(occurring(unseen, validation)) > 15
    assert len(occurring(unseen, train)) <= 2  # pieces that happen to be part of another wording
    assert len(occurring(common, train)) == len(common)


def test_every_wording_fits_its_slots(example):
    """Every slot is stated by two sentences or more, and asked in three ways or more."""
    demo, domains = example("make_demo_data"), example("demo_domains_more")
    for domain in domains.DOMAINS:
        assert set(domain.questions) == set(domain.slots)
        told = Counter(s for text in domain.statements for s in demo.fields_of(text))
        assert set(told) == set(domain.slots)
        assert min(told.values()) >= 2
        assert min(len(questions) for questions in domain.questions.values()) >= 3
        assert all("{name}" in q for questions in domain.questions.values() for q in questions)


def test_numbers_with_a_unit_have_two_gold_answers_in_validation(splits):
    train, validation = splits
    assert all(len(e.answers) == 1 for e in train)
    two = [e for e in validation if len(e.answers) == 2]
    assert len(two) > 40
    assert all(e.answers[0].text.startswith(e.answers[1].text + " ") for e in two)


def position_baselines():
    """Yield functions that pick words of the context by their place alone."""
    for start, length in product(range(-20, 40), range(1, 5)):
        yield lambda words, i=start, n=length: words[i:][:n]
    for tenth, length in product(range(10), range(1, 5)):
        yield lambda words, t=tenth, n=length: words[len(words) * t // 10 :][:n]


def mean_f1(examples, pick):
    scores = (
        best_over_gold(f1, " ".join(pick(e.context.split())), [a.text for a in e.answers])
        for e in examples
    )
    return 100 * sum(scores) / len(examples)


def test_position_alone_answers_next_to_nothing(splits):
    train, validation = splits
    best = max(position_baselines(), key=lambda pick: mean_f1(train[:500], pick))
    assert mean_f1(validation, best) < 12


def test_kind_of_answer_alone_is_not_enough(splits):
    """Even told which words are years, the first year of the paragraph is often another's."""
    _, validation = splits
    years = [e for e in validation if e.answers[0].text.isdigit()]
    assert len(years) > 30

    def first_year(words):
        plain = [word.strip(".,") for word in words]
        return [word for word in plain if word.isdigit() and len(word) == 4][:1]

    assert mean_f1(years, first_year) < 75


@pytest.mark.parametrize("split", ["train", "validation"])
def test_refuses_an_empty_file(example, split):
    with pytest.raises(ValueError, match=f"the {split} file needs at least 1 question, got 0"):
        example("make_demo_data").make_split(split, 0, 1)


def test_options_are_spelled_with_underscores():
    command = [sys.executable, str(FOLDER / "make_demo_data.py"), "--num_train", "0"]
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--num_train" in refused.stderr
