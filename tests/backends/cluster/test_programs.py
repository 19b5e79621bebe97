"""Programs of ``tests/programs`` over two processes: equal to plain torch, or refused by name."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from tests.backends.cluster.processes import Processes
from tests.backends.local.test_batch_losses import SAMPLES, Model, uneven_batch
from tests.backends.local.test_mixed_samples import contrast
from tests.programs.census import RIGHT, drawn
from tests.programs.program import Program

NUMBER = int(os.environ.get("IPU_PIPELINE_PROGRAMS", 20_000)) // 100

FEW = [
    Program(read="attribute", mode="switched between steps", buffer="batch norm", side="hook"),
    Program(read="counter", use="loss", loss="sum", side="tuple", tied=True, clipped=True),
    Program(read="numpy", use="integer", entry="axis 1", schedule="gpipe", microbatches=3),
    Program(loss="token mean", side="all hidden states", lengths="change between steps"),
    Program(mode="eval inside forward", buffer="moving weights", recompute="all"),
]


def test_programs_are_equal_over_two_processes(two: Processes) -> None:
    for rank in two.run("program_jobs.outcomes", programs=FEW):
        assert rank == ["equal"] * len(FEW)


def test_a_loss_that_mixes_samples_is_refused_by_all_and_then_equal(two: Processes) -> None:
    model, batch = Model(contrast), uneven_batch()
    parts = [{n: v[i : i + 2] for n, v in batch.items()} for i in range(0, SAMPLES, 2)]
    mean = sum(model(**part)["loss"].item() for part in parts) / 4
    for refusal, asked in two.run("program_jobs.mixed_samples"):
        assert "the loss of Model (cross_entropy) is not that of its microbatches" in refusal
        assert float(asked) == pytest.approx(mean, abs=1e-5)


def test_a_branch_that_processes_might_take_differently_is_refused_by_all() -> None:
    program = Program(
        log="count by value",
        entry="shared rows",
        lengths="change between steps",
        layers=2,
        schedule="gpipe",
    )
    processes = Processes(2, joined=False)
    found = processes.run("program_jobs.outcomes", programs=[program])
    processes.close()
    assert found == [["refused"]] * 2


@pytest.mark.acceptance
def test_random_programs_over_two_processes() -> None:
    """What is refused in the middle of a step leaves processes that cannot go on."""
    draw, processes = random.Random(), Processes(2, answer_s=300)
    equal = 0
    for _ in range(NUMBER):
        program = drawn(draw)
        program = replace(program, stages=2, microbatches=max(2, program.microbatches))
        ranks = [found for (found,) in processes.run("program_jobs.outcomes", programs=[program])]
        assert set(ranks) <= {*RIGHT}, f"{program}: {ranks}"
        equal += set(ranks) <= {"equal", "equal when asked"}
        if set(ranks) != {"equal"}:
            processes.close()
            processes = Processes(2, answer_s=300)
    processes.close()
    assert equal > NUMBER / 2
