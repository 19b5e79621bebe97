"""Split over two processes, a model trains as in one: curves, norms (gradients: test_matrix.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backends.cluster import jobs
from tests.backends.cluster.matrix import problem
from tests.backends.cluster.processes import Processes
from tests.later import now

TWO = {"num_stages": 2}
NAMES = ["bert-qa", "gpt2-lm", "t5", "lxmert-qa"]
TIED = ("gpt2-lm", "t5")
SHARDED = {"replicated_tensor_sharding": True}


def assert_equal(found: list[dict[str, Any]]) -> None:
    """Check the gradients of all ranks."""
    assert problem(found) == ""


@pytest.mark.parametrize("recompute", ["all", pytest.param("none", marks=pytest.mark.acceptance)])
@pytest.mark.parametrize("name", now(["gpt2-lm"], NAMES))
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


def test_an_overflow_on_one_rank_is_that_of_all(two: Processes) -> None:
    for found in two.run("overflow_on_the_last_rank", planned=TWO):
        assert found == {"factors": [128.0, 64.0, 128.0], "skipped": [False, True, False]}


@pytest.mark.parametrize(
    ("name", "planned", "options"),
    [
        ("gpt2-lm", TWO, {"precision": "fp16"}),
        ("llama", {"num_stages": 1, "replicas": 2}, {"master_weights": True, **SHARDED}),
    ],
)
def test_16_bits_over_two_processes_are_those_of_one(
    two: Processes, name: str, planned: dict[str, Any], options: dict[str, Any]
) -> None:
    """Gradients of replicas are added in another order: one rounding of bf16 is 4e-3 of them."""
    autocast = "precision" in options
    common: dict[str, Any] = {"optimizer_class": torch.optim.SGD, "max_grad_norm": 0.5, **options}
    if autocast:  # the first step overflows
        common["loss_scaling"] = torch.amp.GradScaler(
            "cpu", init_scale=2.0**24, backoff_factor=2.0**-10
        )
    planned = {**planned, "dtype": None if autocast else torch.bfloat16}
    found = two.run("curve", name=name, planned=planned, steps=3, **common)
    number = planned.get("replicas", 1) * jobs.MICROBATCHES
    made, batch = jobs.compiled(
        name,
        target="local",
        planned={**planned, "dropout": True, "replicas": 1, "microbatches": number},
        **{k: v for k, v in common.items() if k not in SHARDED},
    )
    with made:
        expected = [made.train_step(batch) for _ in range(3)]
    tolerance = 1e-5 if autocast else 1e-3
    for rank in found:
        assert rank["skipped"] == [e.skipped for e in expected] == [autocast, False, False]
        assert rank["losses"] == pytest.approx([e.loss for e in expected], rel=tolerance)
        assert rank["norms"][1:] == pytest.approx(
            [e.grad_norm for e in expected[1:]], rel=10 * tolerance
        )
        assert rank["state"] == found[0]["state"]
