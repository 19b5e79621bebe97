"""Entities by hand: the kinds of tags, broken sequences, and the scores."""

import pytest

from tasks.entities import entities, score_entities

CASES = [
    ("O B-PER I-PER O B-LOC", {("PER", 1, 2), ("LOC", 4, 4)}),
    ("B-PER B-PER I-PER", {("PER", 0, 0), ("PER", 1, 2)}),
    ("I-PER I-PER I-LOC O I-LOC", {("PER", 0, 1), ("LOC", 2, 2), ("LOC", 4, 4)}),  # IOB1
    ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),  # broken
    ("S-PER B-LOC I-LOC E-LOC S-LOC", {("PER", 0, 0), ("LOC", 1, 3), ("LOC", 4, 4)}),  # BIOES
    ("I-PER E-PER I-PER E-PER", {("PER", 0, 1), ("PER", 2, 3)}),  # IOE
    ("NOUN NOUN VERB O", {("NOUN", 0, 1), ("VERB", 2, 2)}),
    ("B-A-B I-A-B x-y", {("A-B", 0, 1), ("x-y", 2, 2)}),
    ("", set()),
    ("O O", set()),
]


@pytest.mark.parametrize(("tags", "expected"), CASES)
def test_finds_entities(tags, expected):
    assert entities(tags.split()) == expected


def test_scores_count_whole_entities_of_the_same_sentence():
    gold = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "B-LOC"], ["O"]]
    found = [["B-PER", "O", "O"], ["B-LOC", "O", "B-PER"], ["B-LOC"]]
    scores = score_entities(found, gold)
    assert (scores.precision, scores.recall) == (1 / 4, 1 / 3)
    assert scores.f1 == pytest.approx(2 / 7)


def test_nothing_found_and_nothing_to_find():
    assert score_entities([["O"]], [["B-X"]]).f1 == 0
    assert score_entities([["O"]], [["O"]]).f1 == 0
    assert score_entities([["B-X"]], [["B-X"]]).f1 == 1
