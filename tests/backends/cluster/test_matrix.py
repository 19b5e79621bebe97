"""A part of the tables of ``matrix.py``: each architecture, each schedule, 2 and 4 processes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backends.cluster import jobs
from tests.backends.cluster.matrix import (
    CURVE_STEPS,
    CURVE_TOLERANCE,
    SCHEDULES,
    TIED_STEPS,
    case,
    difference,
    local_losses,
    problem,
    tied,
)
from tests.backends.cluster.processes import Processes
from tests.later import one_in
from tests.tiny_models import TINY


def spread(per_name: int, *, first: int) -> list[tuple[str, str]]:
    """Return some schedules for each architecture, every schedule about equally often."""
    schedules = list(SCHEDULES)
    return [
        (name, schedules[(first + number * per_name + turn) % len(schedules)])
        for number, name in enumerate(TINY)
        for turn in range(per_name)
    ]


# Every second schedule, with an architecture of its own; the others are acceptance tests.
_CELLS = spread(2, first=0)
_NOW = _CELLS[: 2 * len(SCHEDULES) : 4]
_LATER = [pytest.param(*cell, marks=pytest.mark.acceptance) for cell in _CELLS if cell not in _NOW]


@pytest.mark.parametrize(("name", "schedule"), [*_NOW, *_LATER])
def test_two_processes(two: Processes, name: str, schedule: str) -> None:
    assert problem(two.run("gradients", name=name, **case(schedule, 2))) == ""


@pytest.mark.parametrize(("name", "schedule"), one_in(5, spread(1, first=2)))
def test_four_processes(four: Processes, name: str, schedule: str) -> None:
    assert problem(four.run("gradients", name=name, **case(schedule, 4))) == ""


def test_gradients_that_are_not_contiguous_are_sent(two: Processes) -> None:
    found = two.run("gradients", name="convnext", **case("zbv", 2))
    assert problem(found) == ""


def test_what_cannot_run_is_refused_by_every_rank(two: Processes) -> None:
    planned = {"num_stages": 4, "microbatches": 3}
    answers = two.run("gradients_or_refusal", name="vit", planned=planned, schedule="dualpipev")
    assert problem(answers) == ""
    assert "needs at least as many microbatches as stages" in answers[0]["refused"]


@pytest.mark.acceptance
def test_fifty_steps_with_dropout_and_tied_weights_after_a_hundred(two: Processes) -> None:
    compare_curves(two, "gpt2-lm", 2)


@pytest.mark.acceptance
def test_fifty_steps_over_four_stages(four: Processes) -> None:
    compare_curves(four, "bert-mlm", 4)


def compare_curves(processes: Processes, name: str, num_stages: int) -> None:
    planned: dict[str, Any] = {"num_stages": num_stages}
    found = processes.run("curve", name=name, planned=planned, steps=TIED_STEPS)
    expected = local_losses(name, planned, CURVE_STEPS)
    assert difference(found[0]["losses"][:CURVE_STEPS], expected) <= CURVE_TOLERANCE
    assert expected[-1] < expected[0]
    assert len({tuple(rank["losses"]) for rank in found}) == 1
    assert tied(found) == (1, [])
    assert all(rank["state"] == found[0]["state"] for rank in found)


def test_the_tables_find_what_is_wrong() -> None:
    good: dict[str, Any] = {"loss": 1.0, "expected_loss": 1.0, "expected": {"a", "b"}}
    good |= {"error": 0.0, "own_error": 0.0}
    first, second = {**good, "found": {"a"}}, {**good, "found": {"b"}}
    assert problem([first, second]) == ""
    assert "refuse differently" in problem([{"refused": "no"}, {"refused": "never"}])
    assert "losses" in problem([{**first, "loss": 1.1}, second])
    assert "gradients of ['b']" in problem([first, first])
    assert "whole model" in problem([{**good, "found": {"a", "b"}}, second])
    assert "error 1.0e-03" in problem([{**first, "error": 1e-3}, second])
    assert "own" in problem([{**first, "own_error": 0.1}, second])
    assert case("1f1b", 2)["planned"]["microbatches"] == jobs.MICROBATCHES
    ranks = [{"own": {"a": "1", "b": "2"}}, {"own": {"b": "3"}}]
    assert tied(ranks) == (1, ["b"])
