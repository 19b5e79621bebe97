"""What a model keeps from batch to batch, over processes; replicas do as torch's data parallel."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from ipu_pipeline.backends.cluster.sharding import same_buffers
from ipu_pipeline.errors import LoweringError
from tests.backends.cluster.processes import Processes
from tests.later import now, one_in
from tests.stateful import (
    MICROBATCHES,
    PROGRAMS,
    SAMPLES,
    assert_alike,
    batch,
    state_of,
    trained_plainly,
)


@pytest.mark.parametrize(
    ("name", "recompute"),
    now(
        [("SpectralNorm", "none"), ("FirstReadsLastWrites", "all"), ("Queue", "none")],
        product(
            [
                "BatchNorm",
                "SpectralNorm",
                "Scaled",
                "FirstReadsLastWrites",
                "MomentumHead",
                "Queue",
                "Renewing",
            ],
            ["all", "none"],
        ),
    ),
)
def test_programs(two: Processes, name: str, recompute: str) -> None:
    losses, state = trained_plainly(PROGRAMS[name]())
    state.pop(".attribute")  # of no block here
    for rank in two.run("state_jobs.train", name=name, recompute=recompute):
        assert_alike(rank, (losses, state))


@pytest.mark.parametrize(
    ("schedule", "depth"), one_in(2, [("interleaved", 4), ("gpipe", 2), ("zbv", 4)])
)
def test_schedules(two: Processes, schedule: str, depth: int) -> None:
    expected = trained_plainly(PROGRAMS["Scaled"]())
    for rank in two.run("state_jobs.train", name="Scaled", schedule=schedule, num_stages=depth):
        assert_alike(rank, expected)


def data_parallel(name: str, steps: int = 3) -> tuple[list[float], dict[str, Any]]:
    """Train two copies as ``DistributedDataParallel`` does: buffers are those of the first."""
    copies = [PROGRAMS[name]() for _ in range(2)]
    optimizers = [torch.optim.SGD(copy.parameters(), 0.1) for copy in copies]
    losses = []
    for step in range(steps):
        total = 0.0
        for own, first in zip(copies[1].buffers(), copies[0].buffers(), strict=True):
            own.copy_(first)
        for number in range(MICROBATCHES):
            size = SAMPLES // MICROBATCHES
            part = {n: v[number * size : (number + 1) * size] for n, v in batch(step).items()}
            loss = copies[number >= MICROBATCHES // 2](**part)["loss"] / MICROBATCHES
            loss.backward()
            total += float(loss.detach())
        for own, other in zip(*(copy.parameters() for copy in copies), strict=True):
            if own.grad is not None and other.grad is not None:
                own.grad += other.grad
                other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
    return losses, state_of(copies[0])


@pytest.mark.parametrize("name", one_in(3, ["BatchNorm", "Scaled", "Renewing"]))
def test_buffers_of_replicas(four: Processes, name: str) -> None:
    expected = data_parallel(name)
    for rank in four.run("state_jobs.train", name=name, replicas=2):
        assert_alike(rank, expected)


def test_a_buffer_that_grows_is_refused_unless_it_is_not_saved() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.zeros(2), persistent=False)
    with same_buffers(module, []):
        module.table = torch.zeros(3)
    assert len(module.table) == 3
    module.register_buffer("table", torch.zeros(2))
    with (
        pytest.raises(
            LoweringError, match=r"Module replaces its buffer 'table' by a \(3,\) .*full"
        ),
        same_buffers(module, []),
    ):
        module.table = torch.zeros(3)
