"""Models and parts that ``torch.compile`` has wrapped are captured as they were written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from tests.capture.toys import WIDTH, Toy, last, toy


def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
    return last(self, torch.tanh(self.layers[0](x)))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = toy(body)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.inner(x=x)


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def inner(model: nn.Module) -> nn.Module:
    model.inner = torch.compile(model.inner, backend="eager")
    return model


def every_layer(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.inner.layers):
        model.inner.layers[index] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.parametrize("change", [wrapped, in_place, inner, every_layer])
def test_they_give_the_same_stages_and_gradients(change: Callable[[nn.Module], nn.Module]):
    torch.manual_seed(0)
    x = torch.randn(4, WIDTH)
    plain = Nested()
    plain.load_state_dict(Nested().state_dict())
    model = Nested()
    model.load_state_dict(plain.state_dict())
    loss = plain(x)["loss"]
    loss.backward()
    model = change(model)
    plan = ipp.plan(model, {"x": x[:2]}, num_stages=2, microbatches=2)
    assert [len(stage.blocks) for stage in plan.stages] == [1, 1]
    with ipp.compile(model, plan) as executable:
        assert executable.forward_backward({"x": x}) == pytest.approx(loss.item())
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad) for a, b in pairs)
