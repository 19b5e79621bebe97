"""Hooks on gradients act as in plain torch, and never while a plan is made; or they are refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.capture import capture
from ipu_pipeline.errors import CaptureError, LoweringError
from tests.capture.toys import assert_replays, assert_trains_in_stages, batch, last, toy


def halved(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    h.register_hook(lambda gradient: gradient * 0.5)
    return last(self, h)


def clipped_late(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    result = last(self, h)
    h.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return result


def plain(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return last(self, self.layers[0](x))


@pytest.mark.parametrize("body", [halved, clipped_late])
def test_hooks_on_tensors_between_blocks(body: Any) -> None:
    model = toy(body)
    assert_replays(model, capture(model, batch()), batch(1))
    assert_trains_in_stages(model, batch(2))
    found = [node for node in capture(model, batch())._trace.graph.nodes if "effect" in node.meta]
    assert "lambda" in repr(capture(model, batch())._trace.attributes[found[0].target])


def test_a_hook_that_a_block_puts_on_its_gradient_and_that_reads_it() -> None:
    model, norms = toy(plain), list[float]()

    def watch(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: norms.append(gradient.norm().item()))

    model.layers[0].register_forward_hook(watch)
    assert capture(model, batch()).graph.blocks
    assert not norms
    assert_trains_in_stages(model, batch(2))
    assert sorted(norms[:2]) == pytest.approx(sorted(norms[2:]), rel=1e-6)
    assert len(norms) == 4


def test_hooks_on_the_backward_pass_of_blocks_and_on_parameters() -> None:
    model = toy(plain)
    model.layers[1].register_full_backward_hook(lambda _m, inputs, _o: (inputs[0] * 0.5,))
    mask = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    model.layers[0].linear.weight.register_hook(lambda gradient: gradient * mask)
    assert_replays(model, capture(model, batch()), batch(1))
    assert_trains_in_stages(model, batch(2))


def test_a_hook_on_the_backward_pass_of_the_whole_model_is_refused() -> None:
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        model = toy(plain)
        getattr(model, register)(lambda *_: None)
        with pytest.raises(CaptureError, match="'Toy' has a hook on its backward pass"):
            capture(model, batch())


def stepping(model: nn.Module) -> None:
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    model.steps = optimizers
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)


def test_planning_steps_no_optimizer_and_training_refuses_it() -> None:
    model = toy(plain)
    stepping(model)
    seen: list[Tensor] = []
    model.layers[1].register_full_backward_hook(lambda _m, _i, o: seen.append(o[0]))
    model.layers[1].linear.bias.register_hook(seen.append)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = batch()
    plan = ipp.plan(model, {"x": inputs["x"][:1]}, num_stages=2, microbatches=2)
    assert not seen
    assert not any(optimizer.state for optimizer in model.steps.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with (
        ipp.compile(model, plan) as executable,
        pytest.raises(
            LoweringError, match=r"'layers.0.linear.weight' has a hook that runs as soon"
        ),
    ):
        executable.forward_backward(inputs)
    assert len(model.layers[0].linear.weight._post_accumulate_grad_hooks) == 1
    assert len(model.layers[1]._backward_hooks) == 1


class Stepper:
    """Steps when it sees a gradient."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.held = {"optimizer": torch.optim.SGD([parameter], lr=0.1)}

    def __call__(self, gradient: Tensor) -> None:
        self.held["optimizer"].step()

    def seen(self, name: str, gradient: Tensor) -> None:
        self(gradient)


@pytest.mark.parametrize("way", ["object", "closure", "partial", "method"])
def test_a_hook_that_steps_an_optimizer_is_refused(way: str) -> None:
    model = toy(plain)
    weight = model.layers[1].linear.weight
    stepper, optimizer = Stepper(weight), torch.optim.SGD([weight], lr=0.1)
    hooks: dict[str, Any] = {
        "object": stepper,
        "closure": lambda _: optimizer.step(),
        "partial": functools.partial(stepper.seen, "name"),
        "method": stepper.__call__,
    }
    weight.register_hook(hooks[way])
    before, inputs = weight.detach().clone(), batch()
    plan = ipp.plan(model, {"x": inputs["x"][:1]}, num_stages=2, microbatches=2)
    with (
        ipp.compile(model, plan) as executable,
        pytest.raises(LoweringError, match=r"'layers.1.linear.weight' has a hook .* on its grad"),
    ):
        executable.forward_backward(inputs)
    assert torch.equal(weight, before)


def test_a_hook_on_the_gradient_of_a_tied_parameter_is_refused() -> None:
    model = toy(plain)
    model.layers[1].linear.weight = model.layers[0].linear.weight
    model.layers[0].linear.weight.register_hook(torch.sign)
    inputs = batch()
    plan = ipp.plan(model, {"x": inputs["x"][:1]}, num_stages=2, microbatches=2)
    with (
        ipp.compile(model, plan) as executable,
        pytest.raises(LoweringError, match="is used by several stages, each of which has a part"),
    ):
        executable.forward_backward(inputs)
