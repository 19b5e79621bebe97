"""A vocabulary whose rows are spread over processes: what unsplit models compute."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.backends.cluster import jobs
from tests.backends.cluster.processes import Processes
from tests.tiny_models import VOCAB

EVEN: dict[str, Any] = {"num_stages": 2, "vocabulary": "even"}
CELLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tied": ("gpt2-lm", EVEN, {}),
    "untied, gpipe": ("llama", EVEN, {"schedule": "gpipe", "recompute": "all"}),
    "two lookups of one table, zero bubble": (
        "t5", {"num_stages": 4, "vocabulary": [0, 0, 1, 2]}, {"schedule": "zbv"},
    ),
    "a fixed bias, interleaved": (
        "bart", {"num_stages": 4, "vocabulary": [1, 2, 3, 1]}, {"schedule": "interleaved"},
    ),
    "backward passes in another order": (
        "gpt2-lm", {"num_stages": 4, "vocabulary": "even", "microbatches": 5},
        {"schedule": "looped_bfs"},
    ),
    "a bias, one share": ("bert-mlm", {"num_stages": 2, "vocabulary": [1, 0]}, {}),
}  # fmt: skip


LATER = ("untied, gpipe", "a fixed bias, interleaved", "backward passes in another order")


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, marks=pytest.mark.acceptance) if c in LATER else c for c in CELLS],
)
def test_two_processes(two: Processes, cell: str) -> None:
    name, planned, options = CELLS[cell]
    check(two.run("vocabulary_jobs.own_gradients", name=name, planned=planned, **options))


@pytest.mark.acceptance
def test_four_processes(four: Processes) -> None:
    planned = {"num_stages": 4, "vocabulary": [1, 2, 1, 3]}
    for name in ("gpt2-lm", "llama", "t5", "bart", "bert-mlm"):
        check(four.run("vocabulary_jobs.own_gradients", name=name, planned=planned))


def check(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["loss"] == pytest.approx(rank["expected_loss"], rel=1e-6)
        assert rank["error"] <= 1e-6
    assert set().union(*(rank["found"] for rank in found)) == found[0]["expected"]
    rows = sorted(rank["rows"] for rank in found if rank["tables"])
    assert rows[0][0] == 0
    assert rows[-1][1] == VOCAB
    assert all(a[1] == b[0] for a, b in pairwise(rows))


def test_curves_checkpoints_and_other_splits(two: Processes, tmp_path: Path) -> None:
    check_curves(two, EVEN, tmp_path)


@pytest.mark.acceptance
def test_curves_and_checkpoints_of_replicas(four: Processes, tmp_path: Path) -> None:
    check_curves(four, {**EVEN, "replicas": 2, "microbatches": 2}, tmp_path)


def check_curves(processes: Processes, planned: dict[str, Any], folder: Path) -> None:
    found = processes.run(
        "vocabulary_jobs.train_and_reload", planned=planned, path=str(folder / "one")
    )
    local = {"dropout": True, "num_stages": 2}
    made, batch = jobs.compiled("gpt2-lm", target="local", planned=local, max_grad_norm=0.5)
    with made:
        expected = [made.train_step(batch) for _ in range(4)]
    losses, norms = [one.loss for one in expected], [one.grad_norm for one in expected]
    whole = sum(p.numel() for p in made.model.parameters())
    for rank in found:
        assert rank["losses"] == pytest.approx(losses[:2], rel=1e-5)
        assert rank["norms"] == pytest.approx(norms[:2], rel=1e-4)
        assert rank["after"] == pytest.approx(losses[2:], rel=1e-5)
        for again in rank["again"].values():
            assert again == pytest.approx(rank["after"], rel=1e-5)
        assert rank["moments"] == 2 * rank["held"]
        assert rank["shape"][0] == VOCAB
        assert rank["state"] == found[0]["state"]
    copies = planned.get("replicas", 1)
    assert sum(rank["held"] for rank in found) == copies * whole, "nothing is held twice"


def test_replicas_train_as_one(four: Processes) -> None:
    planned = {**EVEN, "replicas": 2, "microbatches": 2}
    found = four.run("curve", name="gpt2-lm", planned=planned, steps=2)
    local = {"dropout": True, "num_stages": 2, "microbatches": 4}
    made, batch = jobs.compiled("gpt2-lm", target="local", planned=local)
    with made:
        expected = [made.train_step(batch).loss for _ in range(2)]
    for rank in found:
        assert rank["losses"] == pytest.approx(expected, rel=1e-5)
        assert rank["state"] == found[0]["state"]


def test_as_many_microbatches_are_kept_as_priced(two: Processes) -> None:
    plan = jobs.built("gpt2-lm", **EVEN)[1]
    assert [stage.in_flight for stage in plan.stages] == [3, 2]
    assert two.run("vocabulary_jobs.in_flight", planned=EVEN) == [{0: 3}, {1: 2}]


@pytest.mark.parametrize("name", ["gpt2-lm", "bert-mlm"])
def test_evaluation_gathers_the_logits(two: Processes, name: str) -> None:
    for rank in two.run("vocabulary_jobs.evaluated", name=name, planned=EVEN):
        assert max(rank.values()) < 1e-5
        assert "logits" in rank


def test_each_process_reads_its_own_rows(two: Processes, tmp_path: Path) -> None:
    found = two.run("vocabulary_jobs.from_meta", planned=EVEN, folder=str(tmp_path))
    for rank in found:
        assert rank["losses"] == pytest.approx(rank["expected"], rel=1e-5)
        assert rank["error"] < 1e-5
    assert sum(rank["shape"][0] for rank in found) == VOCAB


@pytest.mark.parametrize(
    ("what", "planned", "message"),
    [
        ("compiled", EVEN, "compile_blocks takes the calls that read tables whose rows"),
        ("an optimizer", EVEN, "with a vocabulary that is spread over stages a rank has a slice"),
    ],
)
def test_what_does_not_go_with_it(
    two: Processes, what: str, planned: dict[str, Any], message: str
) -> None:
    for refusal in two.run("vocabulary_jobs.refusal", what=what, planned=planned):
        assert message in refusal


def test_divided_state_does_not_go_with_it(four: Processes) -> None:
    planned = {**EVEN, "replicas": 2}
    for refusal in four.run("vocabulary_jobs.refusal", what="sharded", planned=planned):
        assert "replicated_tensor_sharding divides the state of tables whose rows" in refusal


@pytest.mark.acceptance
def test_another_use_of_a_table_is_refused() -> None:
    processes = Processes(2)
    for said in processes.run("vocabulary_jobs.another_use"):
        assert "of the vocabulary that is spread over processes is used by" in said
    processes.close()


@pytest.mark.acceptance
def test_a_failure_beside_the_schedule_is_that_of_all() -> None:
    processes = Processes(2)
    for said in processes.run("vocabulary_jobs.wrong_label", planned=EVEN):
        assert "target 10000 is out of bounds for 99 classes" in said
    processes.close()
