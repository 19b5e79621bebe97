"""Split over two processes, a model trains as in one: curves, norms (gradients: test_matrix.py)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backends.cluster import jobs
from tests.backends.cluster.matrix import problem
from tests.backends.cluster.processes import Processes

TWO = {"num_stages": 2}
NAMES = ["bert-qa", "gpt2-lm", "t5", "lxmert-qa"]
TIED = ("gpt2-lm", "t5")


def assert_equal(found: list[dict[str, Any]]) -> None:
    """Check the gradients of all ranks."""
    assert problem(found) == ""


@pytest.mark.parametrize("recompute", ["all", pytest.param("none", marks=pytest.mark.acceptance)])
@pytest.mark.parametrize(
    "name",
    [*NAMES[1:3], *(pytest.param(n, marks=pytest.mark.acceptance) for n in NAMES[::3])],
)
def test_curves_with_dropout_equal_the_local_targets(
    two: Processes, name: str, recompute: str
) -> None:
    steps = 6
    options = {"max_grad_norm": 0.5, "loss_scaling": 8.0}
    found = two.run("curve", name=name, planned=TWO, steps=steps, recompute=recompute, **options)
    made, batch = jobs.compiled(name, target="local", planned={"dropout": True, **TWO}, **options)
    with made:
        expected = [made.train_step(batch) for _ in range(steps)]
    assert found[0]["losses"] == found[1]["losses"]
    assert found[0]["norms"] == found[1]["norms"]
    assert found[0]["losses"] == pytest.approx([e.loss for e in expected], rel=1e-5)
    assert found[0]["norms"] == pytest.approx([e.grad_norm for e in expected], rel=1e-4)
    assert max(found[0]["norms"]) > 0.5  # clipping was on
    own = [rank["own"] for rank in found]
    both = own[0].keys() & own[1].keys()
    assert bool(both) == (name in TIED)
    assert all(own[0][n] == own[1][n] for n in both)  # to the bit
    assert found[0]["state"] == found[1]["state"]
