"""What the local target refuses before anything runs."""

from __future__ import annotations

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError
from tests.tiny_models import TINY


@pytest.fixture(scope="module")
def planned() -> tuple[torch.nn.Module, ipp.Plan]:
    model, example = TINY["bert-qa"].build()
    return model, ipp.plan(model, example, num_stages=2, microbatches=2)


def test_state_divided_among_replicas_is_refused(
    planned: tuple[torch.nn.Module, ipp.Plan],
) -> None:
    with pytest.raises(LoweringError, match=r"those of the local target share it; leave it out"):
        ipp.compile(*planned, replicated_tensor_sharding=True)


def test_unknown_schedules_are_refused(planned: tuple[torch.nn.Module, ipp.Plan]) -> None:
    model, plan = planned
    with pytest.raises(LoweringError, match="schedule 'zigzag' is unknown; use one of 1f1b, gpipe"):
        ipp.compile(model, plan, schedule="zigzag")


def test_unknown_targets_are_refused(planned: tuple[torch.nn.Module, ipp.Plan]) -> None:
    model, plan = planned
    with pytest.raises(LoweringError, match=r"target 'moon' is unknown; available: .*local"):
        ipp.compile(model, plan, target="moon")


def test_foreign_optimizers_are_refused(planned: tuple[torch.nn.Module, ipp.Plan]) -> None:
    model, plan = planned
    other, _ = TINY["bert-qa"].build()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(LoweringError, match="holds parameters that are not the model's"):
        ipp.compile(model, plan, optimizer=optimizer)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"precision": "fp8"}, "precision 'fp8' is unknown"),
        ({"loss_scaling": 0}, "loss_scaling must be above 0, got 0"),
        ({"loss_scaling": "dynamic"}, "got 'dynamic'; give a number, or a torch.amp.GradScaler"),
        ({"loss_scaling": torch.tensor(8.0)}, r"loss_scaling must be above 0, got tensor\(8\.\)"),
        ({"loss_scaling": float("inf")}, "loss_scaling is inf, with which every step overflows"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be above 0, got nan"),
        ({"master_weights": "no"}, "master_weights must be True or False, got 'no'"),
        ({"max_grad_norm": -1}, "max_grad_norm must be above 0, got -1"),
        ({"stall_timeout_s": 0}, "stall_timeout_s must be above 0, got 0"),
        ({"colour": 1}, "unknown option colour; known options: precision"),
    ],
)
def test_wrong_options_are_refused(
    planned: tuple[torch.nn.Module, ipp.Plan], option: dict[str, object], message: str
) -> None:
    model, plan = planned
    with pytest.raises(ValueError, match=message):
        ipp.compile(model, plan, **option)
