"""Four processes: replicas of two ranks (four stages: test_matrix.py)."""

from __future__ import annotations

from itertools import product

import pytest

from tests.backends.cluster import jobs, matrix
from tests.backends.cluster.processes import Processes
from tests.later import every_second, one_in

TWO_BY_TWO = {"num_stages": 2, "replicas": 2}
ONE = {"num_stages": 1, "microbatches": 2 * jobs.MICROBATCHES}


@pytest.mark.parametrize(
    ("name", "schedule"),
    one_in(6, product(("lxmert-qa", "gpt2-lm"), ("interleaved", "zbv", "gpipe"))),
)
def test_gradients_of_two_replicas(four: Processes, name: str, schedule: str) -> None:
    case = matrix.case(schedule, 2)
    case["planned"] |= {"replicas": 2, "microbatches": 8}
    assert matrix.problem(four.run("gradients", name=name, **case)) == ""


@pytest.mark.parametrize("name", every_second(["gpt2-lm", "bert-qa"]))
def test_two_by_two_equals_one_process_at_the_same_batch(four: Processes, name: str) -> None:
    steps = 6
    found = four.run("curve", name=name, planned=TWO_BY_TWO, steps=steps, max_grad_norm=0.5)
    made, batch = jobs.compiled(
        name, target="local", planned={"dropout": True, **ONE}, max_grad_norm=0.5
    )
    with made:
        expected = [made.train_step(batch) for _ in range(steps)]
        total = sum(t.double().sum().item() for t in made.state_dict().values())
    for rank in found:
        assert rank["losses"] == pytest.approx([e.loss for e in expected], rel=1e-5)
        assert rank["norms"] == pytest.approx([e.grad_norm for e in expected], rel=1e-4)
        assert rank["state"] == found[0]["state"]
        assert rank["sum"] == pytest.approx(total, abs=1e-2)
    assert found[0]["own"] == found[2]["own"]
    assert found[1]["own"] == found[3]["own"]
    both = set(found[0]["own"]) & set(found[1]["own"])
    assert bool(both) == (name == "gpt2-lm")  # tied over ranks
    assert all(found[0]["own"][n] == found[1]["own"][n] for n in both)
