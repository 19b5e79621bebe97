"""Every module runs in the mode in which the user left it, and in which the call was made."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.stages.training import in_evaluation, kept_modes
from tests.capture.toys import WIDTH, Toy, toy
from tests.stages.test_glue import MACHINE, assert_alike, halves, inputs


class Noisy(nn.Module):
    """A layer with batch norm, and dropout that doubles or zeroes everything in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.scale = Doubling()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.norm(self.linear(x)))


class Doubling(nn.Module):
    """A module without random numbers that its mode changes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def in_order(self: Toy, x: Tensor) -> dict[str, Tensor]:
    return {"loss": self.layers[1](self.layers[0](x)).square().mean()}


def switches_off(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    self.layers[0].eval()
    return {"loss": self.layers[1](h).square().mean()}


def student_and_teacher(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[1](self.layers[0](x))
    self.layers.eval()
    with torch.no_grad():
        target = self.layers[1](self.layers[0](x))
    self.layers.train()
    return {"loss": (h - target).square().mean()}


def one_part(self: Toy, x: Tensor) -> dict[str, Tensor]:
    self.layers[1].scale.eval()
    h = self.layers[0](x)
    found = self.layers[1](h)
    self.layers[1].scale.train(mode=self.training)
    return {"loss": found.square().mean()}


def eval_of_part(model: Any, step: int) -> None:
    model.layers[0].norm.eval()
    model.layers[1].scale.train(step % 2 == 0)


def all_train(model: Any, step: int) -> None:
    model.train()


def all_eval(model: Any, step: int) -> None:
    model.eval()


class Modal(nn.Module):
    """A layer without buffers that its mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.Identity()
        self.scale = Doubling()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.linear(x))


@pytest.mark.parametrize("advance", [eval_of_part, all_train, all_eval])
@pytest.mark.parametrize("body", [in_order, switches_off, student_and_teacher, one_part])
def test_training(body: Any, advance: Any) -> None:
    layer = Modal if body is student_and_teacher else Noisy
    found = assert_alike(lambda: toy(body, layer), advance)
    buffers = {n: b.clone() for n, b in found.named_buffers()}
    expected = toy(body, layer).train()
    modes = [module.training for module in found.modules()]
    for step in range(4):
        advance(expected, step)
        for part in halves(inputs(step)):
            expected(**part)
    assert [module.training for module in expected.modules()] == modes
    for name in buffers:
        if name.endswith("num_batches_tracked"):
            assert torch.equal(buffers[name], dict(expected.named_buffers())[name])


def test_draws_beside_running_statistics() -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x) * random.random()
        return {"loss": self.layers[1](h).square().mean()}

    assert_alike(lambda: toy(body, Noisy))


def test_evaluation_puts_every_module_back() -> None:
    model = toy(in_order, Noisy).train()
    model.layers[0].norm.eval()
    plan = ipp.plan(model, halves(inputs(0))[0], machine=MACHINE, num_stages=2, microbatches=2)
    before = [module.training for module in model.modules()]
    with ipp.compile(model, plan) as executable:
        found = executable.eval_step(inputs(0))
        assert [module.training for module in model.modules()] == before
    with in_evaluation(model), torch.no_grad():
        assert found.loss == pytest.approx(float(model(**inputs(0))["loss"]))
    assert [module.training for module in model.modules()] == before


def test_modes_come_back_after_an_error() -> None:
    model = toy(in_order, Noisy).train()

    def fail() -> None:
        with kept_modes(model):
            model.layers[0].eval()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(module.training for module in model.modules())
