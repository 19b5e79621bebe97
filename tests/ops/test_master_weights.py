"""Master weights: a 16-bit weight is the float32 weight that plain torch would have, rounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ipu_pipeline.ops.master_weights import MASTER_WEIGHT, MasterWeights

OPTIMIZERS = {
    "AdamW": {"lr": 1e-3},
    "SGD": {"lr": 1e-2},
    "Adagrad": {"lr": 1e-2},
    "Adafactor": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
}


def twins(dtype: torch.dtype, kind: str) -> tuple[Any, ...]:
    torch.manual_seed(0)
    narrow = torch.nn.Linear(5, 3).to(dtype)
    wide = torch.nn.Linear(5, 3)
    wide.load_state_dict(narrow.state_dict())
    make = getattr(torch.optim, kind)
    ours = make(narrow.parameters(), **OPTIMIZERS[kind])
    return narrow, wide, ours, make(wide.parameters(), **OPTIMIZERS[kind]), MasterWeights(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad"])
def test_steps_are_those_of_a_float32_model(kind: str, dtype: torch.dtype) -> None:
    narrow, wide, ours, theirs, masters = twins(dtype, kind)
    memory = [p.data_ptr() for p in narrow.parameters()]
    for seed in range(3):
        torch.manual_seed(seed)
        narrow(torch.randn(4, 5).to(dtype)).square().sum().backward()
        for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
            assert a.grad is not None
            b.grad = a.grad.float()
        with masters.in_place():
            ours.step()
        theirs.step()
        for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
            assert a.grad is None
            assert torch.equal(ours.state[a][MASTER_WEIGHT], b)
            assert torch.equal(a, b.to(dtype))
    assert [p.data_ptr() for p in narrow.parameters()] == memory


def test_a_weight_that_somebody_changed_is_the_new_beginning() -> None:
    narrow, _, ours, _, masters = twins(torch.bfloat16, "AdamW")
    weight = narrow.weight
    for value in (None, 2.0):
        if value is not None:
            with torch.no_grad():
                weight.fill_(value)
        weight.grad = torch.ones_like(weight)
        with masters.in_place():
            ours.step()
    assert torch.allclose(ours.state[weight][MASTER_WEIGHT], torch.tensor(2.0), atol=3e-3)


def test_a_skipped_step_and_an_error_leave_weights_as_they_are() -> None:
    narrow, _, ours, _, masters = twins(torch.bfloat16, "AdamW")
    before = narrow.weight.clone()
    narrow.weight.grad = torch.ones_like(before)
    with masters.in_place():
        assert narrow.weight.dtype is torch.float32
    assert torch.equal(narrow.weight, before)
    narrow.weight.grad = torch.ones_like(before)
    with pytest.raises(ZeroDivisionError), masters.in_place():
        raise ZeroDivisionError
    assert narrow.weight.dtype is torch.bfloat16
    narrow.weight.grad = torch.ones_like(before)
    with masters.in_place():
        ours.step()
    assert not torch.equal(ours.state[narrow.weight][MASTER_WEIGHT], before.float())


@pytest.mark.parametrize("kind", ["Adafactor", "NAdam"])  # state of other shapes than the weight's
def test_all_that_is_loaded_keeps_its_precision(kind: str) -> None:
    first, again = (twins(torch.bfloat16, kind) for _ in range(2))

    def step(twin: tuple[Any, ...]) -> None:
        narrow, _, ours, _, masters = twin
        narrow(torch.linspace(0.0, 0.7, 20).view(4, 5).bfloat16()).square().sum().backward()
        with masters.in_place():
            ours.step()

    step(first)
    state = copy.deepcopy(first[2].state_dict())
    again[0].load_state_dict(first[0].state_dict())
    again[2].load_state_dict(state)
    again[4].load(state)
    step(first)
    step(again)
    for a, b in zip(first[0].parameters(), again[0].parameters(), strict=True):
        expected, found = first[2].state[a], again[2].state[b]
        assert all(torch.equal(found[name], value) for name, value in expected.items())
