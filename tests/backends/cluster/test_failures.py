"""What is refused at the start, and what happens when a rank raises or dies."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from tests.backends.cluster.processes import Processes
from tests.later import every_second

TWO = {"num_stages": 2}


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


WHERE = {
    "forward": "stage 1, block 'bert.encoder.layer.3', forward pass of microbatch 1, step 1",
    "backward": "stage 1, block 'bert.encoder.layer.3', backward pass of microbatch 1, step 1",
    "optimizer": "the optimizer step, step 1",
}


@pytest.fixture
def fresh() -> Iterator[Processes]:
    processes = Processes(2, joined=False)
    started = time.monotonic()
    yield processes
    assert time.monotonic() - started < 60
    processes.close()


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_a_rank_that_raises_is_named_by_all(fresh: Processes, where: str) -> None:
    first, second = fresh.answers("fault_jobs.failure", how="raises", where=where, planned=TWO)
    message = f"StageError: rank 1 failed ({WHERE[where]}): ValueError: the disk is on fire"
    assert first[1].startswith(message)
    assert re.search(r"rank 0 was .*, step \d and stopped", first[1])
    assert second[1].startswith(message)
    assert "cannot run after a failure (rank 1 failed" in second[1]


def test_a_rank_that_dies_is_named_by_the_others(fresh: Processes) -> None:
    first, second = fresh.answers("fault_jobs.failure", how="dies", where="forward", planned=TWO)
    message = r"StageError: rank 1 showed no sign of life for [45] s: its process has ended or can"
    assert re.match(message, first[1])
    assert second == (False, "died")


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("sleeps", "forward"),
        ("spins", "backward"),
        pytest.param("sleeps", "optimizer", marks=pytest.mark.acceptance),
    ],
)
def test_a_rank_that_hangs_is_named_by_the_others_and_ends(
    fresh: Processes, how: str, where: str
) -> None:
    first, second = fresh.answers("fault_jobs.failure", how=how, where=where, planned=TWO)
    place = r"at .*fault_jobs.py:\d+ "
    message = rf"StallError: rank 1 hangs \({re.escape(WHERE[where])}\) since \d+ s, {place}"
    assert re.match(message, first[1])
    assert second == (False, "died")
    fresh.processes[1].join()
    assert fresh.processes[1].exitcode == 1


# The others see the same of both: no sign of life.
@pytest.mark.parametrize("how", every_second(["freezes", "is stopped"]))
def test_a_process_that_cannot_run_is_named_by_the_others(fresh: Processes, how: str) -> None:
    first, _ = fresh.answers("fault_jobs.failure", mute=(1,), how=how, where="forward", planned=TWO)
    message = r"StageError: rank 1 showed no sign of life for [45] s: its process has ended or can"
    assert re.match(message, first[1])


def test_the_process_that_holds_the_store_is_stopped(fresh: Processes) -> None:
    _, second = fresh.answers(
        "fault_jobs.failure", mute=(0,), how="is stopped", where="forward", planned=TWO, rank=0
    )
    message = "StageError: the store of the process group did not answer for 4 s: the process "
    assert second[1].startswith(message)
    assert "rank 0 was last seen in: " in second[1]


def test_a_rank_that_never_comes_back_ends(fresh: Processes) -> None:
    first, second = fresh.answers("fault_jobs.desertion", planned=TWO)
    message = r"rank 0 \(.*step 2\) has waited \d+ s for others: rank 1 in the caller's own code"
    assert re.match(message, first[1])
    assert second == (False, "died")


def test_a_rank_that_dies_before_it_starts_is_missed() -> None:
    processes = Processes(2)
    first, _ = processes.answers("fault_jobs.absent_at_the_start", planned=TWO)
    processes.close()
    assert "rank 1 has not started" in first[1]
