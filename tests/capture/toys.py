"""Small models whose glue does one unusual thing each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.ir.machine import Device, Link, Machine

WIDTH = 4


class Layer(nn.Module):
    """The element of a repeated list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Toy(nn.Module):
    """Two layers; what happens between them is given as a function of model and inputs."""

    def __init__(self, body: Callable[..., Any], layer: type[nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])
        self.body = body

    def forward(self, **inputs: Any) -> Any:
        return self.body(self, **inputs)


def toy(body: Callable[..., Any], layer: type[nn.Module] = Layer, seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy(body, layer)


def last(self: nn.Module, h: Tensor) -> dict[str, Tensor]:
    """The second layer and the loss."""
    return {"loss": self.layers[1](h).square().mean()}


def batch(seed: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, WIDTH, generator=generator), **more}


def results_and_gradients(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Run ``run()``, which returns results by name, and its backward pass."""
    model.zero_grad(set_to_none=True)
    results = run()
    if results["loss"].requires_grad:
        results["loss"].backward()
    found = {"loss": results["loss"].detach()}
    found.update({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def assert_replays(model: nn.Module, captured: Any, inputs: dict[str, Any]) -> None:
    """The capture computes the model's loss and every gradient for ``inputs``."""

    def copies() -> dict[str, Any]:
        return {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}

    expected = results_and_gradients(model, lambda: model(**copies()))
    found = results_and_gradients(model, lambda: captured.run(copies()))
    assert_same(found, expected)


def assert_trains_in_stages(model: nn.Module, inputs: dict[str, Any], stages: int = 2) -> None:
    """A plan with stages computes the model's loss and every gradient for two microbatches."""

    def half(first: int) -> dict[str, Any]:
        return {n: v[first : first + 1] if isinstance(v, Tensor) else v for n, v in inputs.items()}

    model.zero_grad(set_to_none=True)
    losses = [model(**half(n))["loss"] / 2 for n in range(2)]
    total = torch.stack(losses).sum()
    total.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    devices = tuple(Device(f"d{i}", 10**9, {"float32": 1e9}, 1e9) for i in range(stages))
    machine = Machine("toy", devices, Link(bytes_per_s=1e9))
    plan = ipp.plan(model, half(0), machine=machine, num_stages=stages, microbatches=2)
    assert plan.num_stages == stages
    with ipp.compile(model, plan, self_check=False) as executable:
        loss = executable.forward_backward(inputs)
    assert abs(loss - float(total.detach())) <= 1e-6 * abs(loss)
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    model.zero_grad(set_to_none=True)
