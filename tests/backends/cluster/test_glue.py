"""Every rank runs the model's glue, so that Python is the same on all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.backends.cluster import glue_jobs
from tests.backends.cluster.processes import Processes
from tests.stages.test_glue import halves, inputs


def eager() -> tuple[Any, list[float]]:
    model = glue_jobs.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(glue_jobs.STEPS):
        model.weight = 1.0 + step / 5
        found = [model(**part)["loss"] for part in halves(inputs(step))]
        for loss in found:
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(float(loss.detach()) for loss in found) / 2)
    return model, losses


@pytest.mark.parametrize("replicas", [1, 2])
def test_numbers_branches_and_modes(two: Processes, four: Processes, replicas: int) -> None:
    model, losses = eager()
    for rank in (four if replicas == 2 else two).run("glue_jobs.trained", replicas=replicas):
        assert rank["losses"] == pytest.approx(losses, rel=1e-6)
        assert rank["calls"] == model.calls == 2 * glue_jobs.STEPS
        assert rank["modes"] == [module.training for module in model.modules()]
        for name, value in model.state_dict().items():
            np.testing.assert_allclose(rank["state"][name], value.numpy(), rtol=1e-5, atol=1e-7)


def test_ranks_with_other_numbers_are_named() -> None:
    processes = Processes(2, joined=False)
    found = processes.run("glue_jobs.trained", odd=1)
    processes.close()
    for rank in found:
        assert "by the model's own code in step 0, but rank 0 with [[" in rank["error"]
        assert "do the same on every rank: the same seeds" in rank["error"]


def test_ranks_whose_hooks_leave_something_else_are_named() -> None:
    processes = Processes(2, joined=False)
    found = processes.run("glue_jobs.hooked")
    processes.close()
    assert all("or their hooks fill, of which a rank runs its own only" in text for text in found)
