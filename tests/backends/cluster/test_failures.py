"""What is refused at the start, and what happens when a rank raises or dies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.backends.cluster import jobs
from tests.backends.cluster.processes import Processes, start_server
from tests.later import every_second, now

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


WHERE = {
    "forward": "stage 1, block 'bert.encoder.layer.3', forward pass of microbatch 1, step 1",
    "backward": "stage 1, block 'bert.encoder.layer.3', backward pass of microbatch 1, step 1",
    "optimizer": "the optimizer step, step 1",
}


@dataclass(frozen=True)
class Job:
    """What a fresh pair of processes does; ``rank`` fails, and cannot answer if it is ``mute``."""

    how: str = ""
    where: str = "forward"
    rank: int = 1
    mute: bool = False
    name: str = "fault_jobs.failure"
    joined: bool = False

    def run(self) -> list[tuple[bool, Any]]:
        """Return the answers, with its exit code for a rank that died."""
        processes = Processes(2, joined=self.joined)
        given = {"how": self.how, "where": self.where, "rank": self.rank} if self.how else {}
        mute = (self.rank,) if self.mute else ()
        answers = processes.answers(self.name, mute=mute, planned=TWO, **given)
        for rank, (_, said) in enumerate(answers):
            if said == "died":
                processes.processes[rank].join()
                answers[rank] = False, processes.processes[rank].exitcode
        processes.close()
        return answers


class Answers:
    """The answers of jobs in their order; while one runs, which is to wait, so do the next two."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        start_server()
        self.pool = ThreadPoolExecutor(3)
        self.found: dict[Job, Future[list[tuple[bool, Any]]]] = {}

    def __getitem__(self, job: Job) -> list[tuple[bool, Any]]:
        first = self.jobs.index(job)
        for wanted in self.jobs[first : first + 3]:
            if wanted not in self.found:
                self.found[wanted] = self.pool.submit(wanted.run)
        return self.found[job].result()


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest) -> Iterator[Answers]:
    items = [item for item in request.session.items if item.path == request.path]
    chosen = [getattr(item, "callspec", None) for item in items]
    found = Answers([one.params["job"] for one in chosen if one and "job" in one.params])
    yield found
    found.pool.shutdown()


@pytest.mark.parametrize("job", [Job(name="leaving")])
def test_a_rank_that_leaves_is_named_by_the_others(answers: Answers, job: Job) -> None:
    first, second = answers[job]
    assert first[1].startswith("rank 1 left after step 0: KeyError: 'mine'; rank 0 was ")
    assert second == (True, "left")


@pytest.mark.parametrize(
    "job",
    now(
        [Job("raises", "backward"), Job("raises", "optimizer")],
        [Job("raises", where) for where in WHERE],
    ),
    ids=WHERE,
)
def test_a_rank_that_raises_is_named_by_all(answers: Answers, job: Job) -> None:
    first, second = answers[job]
    message = f"StageError: rank 1 failed ({WHERE[job.where]}): ValueError: the disk is on fire"
    assert first[1].startswith(message)
    assert re.search(r"rank 0 was .*, step \d and stopped", first[1])
    assert second[1].startswith(message)
    assert "cannot run after a failure (rank 1 failed" in second[1]


@pytest.mark.parametrize("job", [Job("dies")])
def test_a_rank_that_dies_is_named_by_the_others(answers: Answers, job: Job) -> None:
    first, second = answers[job]
    message = r"StageError: rank 1 showed no sign of life for \d+ s: its process has ended or can"
    assert re.match(message, first[1])
    assert second == (False, 9)


@pytest.mark.parametrize(
    "job",
    [
        Job("sleeps"),
        pytest.param(Job("spins", "backward"), marks=pytest.mark.acceptance),
        pytest.param(Job("sleeps", "optimizer"), marks=pytest.mark.acceptance),
    ],
    ids=lambda job: f"{job.how}-{job.where}",
)
def test_a_rank_that_hangs_is_named_by_the_others_and_ends(answers: Answers, job: Job) -> None:
    first, second = answers[job]
    place = r"at .*fault_jobs.py:\d+ "
    message = rf"StallError: rank 1 hangs \({re.escape(WHERE[job.where])}\) since \d+ s, {place}"
    assert re.match(message, first[1])
    assert second == (False, 1)


# The others see the same of both: no sign of life.
@pytest.mark.parametrize(
    "job",
    every_second([Job("freezes", mute=True), Job("is stopped", mute=True)]),
    ids=lambda job: job.how,
)
def test_a_process_that_cannot_run_is_named_by_the_others(answers: Answers, job: Job) -> None:
    first, _ = answers[job]
    message = r"StageError: rank 1 showed no sign of life for \d+ s: its process has ended or can"
    assert re.match(message, first[1])


@pytest.mark.parametrize("job", [Job("is stopped", rank=0, mute=True)])
def test_the_process_that_holds_the_store_is_stopped(answers: Answers, job: Job) -> None:
    _, second = answers[job]
    message = "StageError: the store of the process group did not answer for 4 s: the process "
    assert second[1].startswith(message)
    assert "rank 0 was last seen in: " in second[1]


@pytest.mark.parametrize("job", [Job(name="fault_jobs.desertion")])
def test_a_rank_that_never_comes_back_ends(answers: Answers, job: Job) -> None:
    first, second = answers[job]
    message = r"rank 0 \(.*step 2\) has waited \d+ s for others: rank 1 in the caller's own code"
    assert re.match(message, first[1])
    assert second == (False, 1)


@pytest.mark.parametrize("job", [Job(name="fault_jobs.absent_at_the_start", joined=True)])
def test_a_rank_that_dies_before_it_starts_is_missed(answers: Answers, job: Job) -> None:
    first, _ = answers[job]
    assert "rank 1 has not started" in first[1]


@pytest.mark.parametrize(
    "planned", now([{"num_stages": 1, "replicas": 2}], [{"num_stages": 1, "replicas": 2}, TWO])
)
@pytest.mark.parametrize("where", now(["forward"], ["forward", "backward", "optimizer"]))
def test_what_an_error_leaves_behind_reaches_no_later_executable(
    planned: dict[str, Any], where: str
) -> None:
    processes = Processes(2)
    found = processes.run("fault_jobs.after_an_error", planned=planned, where=where, rank=0)
    processes.close()
    batches = {"num_stages": 1, "microbatches": 4 * planned.get("replicas", 1)}
    made, batch = jobs.compiled("bert-qa", planned=batches, target="local")
    with made:
        expected = [made.train_step(batch).loss for _ in range(3)]
    assert found == [pytest.approx(expected, rel=1e-6)] * 2
