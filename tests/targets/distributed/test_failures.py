"""What is refused at the start, and what happens when a rank raises or dies."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.targets.distributed.processes import Processes

TWO = {"num_stages": 2}


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("plan", "the ranks do not run the same thing (plan: rank 0"),
        ("weights", "the ranks do not run the same thing (weights of the model: rank 0"),
        ("option", "the ranks do not run the same thing (option seed: rank 0 42, rank 1 7)"),
        ("problem", "not all ranks can start: rank 1: recompute names 'nothing'"),
    ],
)
def test_a_mismatch_is_refused_by_every_rank(two: Processes, what: str, message: str) -> None:
    found = two.run("mismatch", what=what, planned=TWO)
    assert found[0] == found[1]
    assert message in found[0]


def test_misuse_is_refused_by_every_rank(two: Processes) -> None:
    for rank in two.run("misuse", planned=TWO):
        assert "train_step needs an optimizer" in rank[0]
        assert "the batch is empty: axis 0 has size 0" in rank[1]
        assert "this executable was closed" in rank[2]


def test_a_rank_that_leaves_is_named_by_the_others() -> None:
    processes = Processes(2, joined=False)
    answers = processes.answers("leaving", planned=TWO)
    processes.close()
    assert answers[0][1].startswith("rank 1 left after step 0: KeyError: 'mine'; rank 0 was ")
    assert answers[1] == (True, "left")


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_failing_rank_is_named_by_the_others(how: str) -> None:
    processes = Processes(2, joined=False)
    started = time.monotonic()
    answers = processes.answers("failure", how=how, planned=TWO)
    seconds = time.monotonic() - started
    processes.close()
    assert seconds < 60
    good, first = answers[0]
    assert good
    where = "stage 1, block 'bert.encoder.layer.3', forward pass of microbatch 1, step 1"
    if how == "raises":
        message = f"rank 1 failed ({where}): ValueError: the disk is on fire"
        assert first.startswith(message)
        assert "rank 0 was waiting for other ranks, step 1 and stopped" in first
        assert answers[1][1].startswith(message)
        assert "cannot run after a failure (rank 1 failed" in answers[1][1]
    else:
        assert first.startswith("rank 1 showed no sign of life for 4 s; last seen in: ")
        assert not answers[1][0]
