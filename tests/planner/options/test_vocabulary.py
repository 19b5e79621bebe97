"""Rows of a spread vocabulary: who holds them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.cli.options import read_shares
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.plan import Plan, VocabularyRows
from ipu_pipeline.ir.verify import verify_plan
from ipu_pipeline.planner.options.vocabulary import (
    check_vocabulary,
    known_shares,
    lookups,
    spread_head,
    vocabulary_rows,
)
from tests.ir.plan_example import example_plan
from tests.planner.options.table_graph import VOCAB, table_graph
from tests.tiny_models import TINY


def test_rows_are_shared_as_asked() -> None:
    graph = table_graph()
    even = vocabulary_rows(graph, 2, "even")
    assert even.rows == ((0, 0, VOCAB // 2), (1, VOCAB // 2, VOCAB))
    uneven = vocabulary_rows(graph, 3, [1, 0, 3])
    assert uneven.by_stage == {0: (0, VOCAB // 4), 2: (VOCAB // 4, VOCAB)}
    assert uneven.size == VOCAB


def test_the_head_and_the_lookups_as_long_are_spread() -> None:
    head = spread_head(table_graph())
    assert (head.head.name, head.loss.name) == ("head", "loss")
    assert lookups(table_graph(), head) == {"wte": "wte.weight"}


@pytest.mark.parametrize("shares", ["evenly", [1], [0, 0], [1, -1], [1, float("nan")]])
def test_shares_that_are_none(shares: Any) -> None:
    with pytest.raises(ValueError, match="give 'even', or one share for each of the 2 stages"):
        vocabulary_rows(table_graph(), 2, shares)


@pytest.mark.parametrize("asked", ["evenly", "1,2", 5, [], [torch.tensor(1)], [None, 1]])
def test_what_is_no_word_and_no_shares(asked: Any) -> None:
    with pytest.raises(ValueError, match="give 'auto', 'even', or one share for each stage"):
        known_shares(asked)


def test_words_and_numbers_of_every_type() -> None:
    assert [known_shares(asked) for asked in (None, "auto", "even")] == [None, "auto", "even"]
    assert known_shares(np.array([1, 2])) == known_shares((1, Fraction(2))) == (1.0, 2.0)


def test_more_stages_than_rows() -> None:
    with pytest.raises(PlanError, match="one would hold none; give fewer stages a share"):
        vocabulary_rows(table_graph(), 2, [1, 1e-9])


def test_what_has_no_such_head() -> None:
    graph = table_graph()
    with pytest.raises(PlanError, match="inference, where no loss is computed"):
        spread_head(replace(graph, training=False))
    with pytest.raises(PlanError, match="no output projection whose logits only a cross entropy"):
        spread_head(replace(graph, blocks=graph.blocks[:1]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (((2, 0, 10),), "spread over stages 2, but the plan has stages 0 to 1"),
        ((), "spread over stages none"),
        (((0, 0, 4), (0, 4, 10)), "a stage may hold one share only"),
        (((0, 0, 4), (1, 5, 10)), "hold rows 0 to 4, 5 to 10 of the vocabulary"),
        (((0, 0, 4), (1, 4, 4)), "each stage at least one"),
    ],
)
def test_rows_are_verified(rows: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        verify_plan(replace(example_plan(), vocabulary=VocabularyRows(rows)))


def test_the_plan_keeps_its_rows(tmp_path: Path) -> None:
    model, batch = TINY["gpt2-lm"].build(device="meta")
    made = ipp.plan(model, batch, num_stages=2, vocabulary="even")
    assert made.vocabulary is not None
    size = made.vocabulary.size
    middle = round(size / 2)
    path = tmp_path / "plan.json"
    made.save(path)
    assert json.loads(path.read_text())["vocabulary"]["rows"] == [
        [0, 0, middle],
        [1, middle, size],
    ]
    assert Plan.load(path) == made
    assert f"vocabulary spread: rows 0-{middle - 1} (stage 0)" in made.explain()
    assert replace(made, vocabulary=None).edited
    with pytest.raises(PlanError, match=rf"spreads 4 rows of the vocabulary.* has {size}"):
        check_vocabulary(replace(made, vocabulary=VocabularyRows(((0, 0, 2), (1, 2, 4)))))
    stages = (replace(made.stages[0], serialize={made.stages[0].blocks[0]: 2}), made.stages[1])
    with pytest.raises(PlanError, match="is serialized and its table is spread"):
        check_vocabulary(replace(made, stages=stages))
    moved = made.stages[1].blocks
    apart = (
        replace(made.stages[0], blocks=(*made.stages[0].blocks, *moved[:-1])),
        replace(made.stages[1], blocks=moved[-1:]),
    )
    with pytest.raises(PlanError, match="is not in the last one, which computes the softmax"):
        check_vocabulary(replace(made, stages=apart))


def test_the_command_line_reads_shares() -> None:
    assert read_shares(None) is None
    assert read_shares("even") == "even"
    assert read_shares("1,2.5") == [1.0, 2.5]
    with pytest.raises(ValueError, match="--vocabulary is '1,x'; give auto, even, or one share"):
        read_shares("1,x")
